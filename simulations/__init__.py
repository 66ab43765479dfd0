"""Several hospitals on one machine: the only place where both sides meet."""
