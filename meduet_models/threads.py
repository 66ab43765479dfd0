"""One thread where bits matter: sums of floats depend on the number of threads that make them.

Does not do: choose how many threads training takes (`client/site.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(device: torch.device | str = "cpu") -> Iterator[None]:
    """On a CPU, PyTorch computes with one thread within, and with as many as before after."""
    before = torch.get_num_threads()
    if torch.device(device).type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
