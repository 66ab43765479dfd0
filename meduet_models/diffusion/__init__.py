"""The latent diffusion model: a 3-D diffusion transformer on latents, told content and style."""
