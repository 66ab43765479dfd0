"""Published weights: read, ready for scans, signed, and marked where somebody withdrew."""
