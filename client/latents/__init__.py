"""Scans encoded once, and what is read from them."""
