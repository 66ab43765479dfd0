"""What the centre asks, checks and uses, one file per exchange."""
