"""A site's share of a round, and what it keeps of it."""
