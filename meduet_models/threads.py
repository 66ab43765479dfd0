"""Numbers of threads where bits matter: sums of floats depend on how many threads make them.

Does not do: choose how many threads training takes (`client/site_scans.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """On the CPU, PyTorch computes with so many threads within, and with as many as before after."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
