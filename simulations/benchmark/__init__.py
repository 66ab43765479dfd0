"""Every method on every data set: one table."""
