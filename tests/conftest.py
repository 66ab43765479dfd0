"""What several test files share: where the real scans are, and which files begin."""

import os
from pathlib import Path

import pytest

_FIRST = ("simulations", "rounds", "client", "server")
"""Folders of tests, the longest first: a file stays with one process, and one that began last would keep a
core waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs before whole rounds before the rest; within each, as they are collected."""
    tests = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(tests).parts[0]
        return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """`$FEDMEDUET_DATA`, or ../shared/data beside the project; skips the test when neither is there."""
    root = Path(os.environ.get("FEDMEDUET_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip("needs the real scans: set FEDMEDUET_DATA to their folder")
    return root
