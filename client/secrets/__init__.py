"""What only a site knows: its secrets, and those of the secure sum that is going on."""
