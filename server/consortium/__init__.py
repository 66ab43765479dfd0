"""Who takes part, and in what: the office for keys, published plans."""
