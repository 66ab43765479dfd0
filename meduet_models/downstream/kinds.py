"""What predicts, as plans name it; a file of its own, as plans are read without MONAI, which takes
seconds."""

from typing import Literal

NetworkKind = Literal["tokens", "volume_unet", "joined"]
"""A head on content tokens and latents, a U-Net on the volume, or that U-Net with the tokens."""
