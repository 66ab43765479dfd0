"""A bank in a folder of its own, closed at the end."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.latent_bank.bank import LatentBank


@pytest.fixture
def open_bank(tmp_path: Path) -> Iterator[Callable[..., LatentBank]]:
    opened: list[LatentBank] = []

    def bank(**more: Any) -> LatentBank:
        opened.append(LatentBank(tmp_path / "bank", **more))
        return opened[-1]

    yield bank
    for one in opened:
        one.close()


@pytest.fixture
def bank(open_bank: Callable[..., LatentBank]) -> LatentBank:
    return open_bank()
