"""What several test files share: where the real scans are."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """`$FEDMEDUET_DATA`, or ../shared/data beside the project; skips the test when neither is there."""
    root = Path(os.environ.get("FEDMEDUET_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip("needs the real scans: set FEDMEDUET_DATA to their folder")
    return root
