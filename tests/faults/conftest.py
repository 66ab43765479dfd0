"""Not collected unless asked for (`make faults`, which runs the files beside each other): minutes, gigabytes,
and ports.

With `--faults-page FILE`, what the tests saw is written there at the end, if all of them passed.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.page import Book, write_page


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-page", type=Path, default=None, help="write the outcome of the faults here")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = "faults" in config.option.markexpr or any("faults" in argument for argument in config.args)
    return None if asked else True


@pytest.fixture(scope="session")
def book(request: pytest.FixtureRequest) -> Iterator[Book]:
    begun, book = time.monotonic(), Book()
    yield book
    path = request.config.getoption("--faults-page")
    if path is not None and not request.session.testsfailed:
        write_page(path, [book], time.monotonic() - begun)
