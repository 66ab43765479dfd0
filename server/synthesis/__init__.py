"""Volumes from a generative model."""
