"""What a plan says: the plan, and what it says of privacy, canaries, releases and the diffusion model."""
