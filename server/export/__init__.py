"""A run's weights in forms that other tools load; written by the centre, never read back here."""
