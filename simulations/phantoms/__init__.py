"""Phantoms: draw, then apply."""
