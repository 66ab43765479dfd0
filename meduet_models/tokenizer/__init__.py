"""The frozen VAE: volume to latent and back."""
