"""What a run's page is drawn with."""
