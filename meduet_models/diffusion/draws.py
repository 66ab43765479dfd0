"""Generators for the diffusion model's draws: each from a stable hash of what it is for, none global.

What it does not do: draw. The same key gives the same numbers on every machine, in any order of calls.
"""

import hashlib

import torch


def generator_of(purpose: str, *key: int) -> torch.Generator:
    """A CPU generator for this purpose and these numbers (seed, step, sample, ...)."""
    text = " ".join(["fedmeduet diffusion", purpose, *map(str, key)])
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    )
