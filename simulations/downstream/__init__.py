"""What content is worth with few labels."""
