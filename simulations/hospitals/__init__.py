"""Simulated hospitals, from phantoms or real scans."""
