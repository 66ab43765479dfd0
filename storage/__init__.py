"""How files are written: whole, and for their owner alone."""
