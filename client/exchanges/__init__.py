"""What a site answers, one file per exchange."""
