"""What sites released, encrypted."""
