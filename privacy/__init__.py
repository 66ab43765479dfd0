"""Bounds, noise and budgets for what leaves a site. Knows neither Flower nor our models."""
