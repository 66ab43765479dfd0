"""Starts, conditions and sources of the diffusion model compared."""
