"""Appearance: moments, the bank of every site's, and what is done with them."""
