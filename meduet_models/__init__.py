"""MeDUET: tensors in, tensors out; and, by `load`, scans in. Knows neither Flower nor Hydra."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from meduet_models.published.scan_model import ScanModel
    from meduet_models.tokenizer.tokenizer import Tokenizer

__all__ = ["load"]


def load(
    source: "str | Path",
    *,
    tokenizer: "str | Path | Tokenizer | None" = None,
    device: "torch.device | str" = "cpu",
    trusted: "str | Path | None" = None,
) -> "ScanModel":
    """The model of a run (its folder, or its `model.safetensors`), ready for scans.

    `embed(path_or_array, affine)` gives the content code (n numbers), `tokens` the grid that it is made of,
    `reconstruct` and `harmonise` volumes on the scan's own grid; see
    `meduet_models/published/scan_model.py`. Nothing is fetched, nothing leaves the machine. With `trusted`,
    the certificate of a consortium, weights that it did not sign are refused; `signature` says who signed
    them. Raises `ValueError`, in one line, for files that do not fit.
    """
    from meduet_models.published.scan_model import load as load_model  # PyTorch takes seconds

    return load_model(source, tokenizer=tokenizer, device=device, trusted=trusted)
