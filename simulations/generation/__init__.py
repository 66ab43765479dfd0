"""A generative model measured and shown."""
