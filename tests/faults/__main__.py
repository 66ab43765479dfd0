"""All faults at once: `python -m tests.faults PAGE`, which is `make faults`.

Every file of tests is a pytest of its own with a consortium of its own, and all of them run at the same time:
most of a fault is waiting for a heartbeat or the end of an outage. What they say appears as it is said, after
the file's name. If all of them passed, the page is written from theirs. Interrupted or killed, it interrupts
each of them, which then stops its processes.

Does not do: choose tests. For one file, or one fault: `pytest -s -m faults tests/faults/FILE -k FAULT`.
"""

import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from federation.processes import die_with_parent
from tests.faults.page import Book, write_page

FILES = sorted(Path(__file__).parent.glob("test_*.py"))


def begin(file: Path, page: Path) -> subprocess.Popen[str]:
    """Start the tests of one file."""
    options = ("-q", "-s", "-p", "no:cacheprovider", "-m", "faults", "--faults-page", str(page))
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes from here, once
        preexec_fn=die_with_parent(signal.SIGINT),  # no thread runs yet
    )


def relay(file: Path, tests: subprocess.Popen[str]) -> int:
    """Say what the tests say, to their end; their exit status."""
    assert tests.stdout is not None
    with tests.stdout:
        for line in tests.stdout:
            if line.strip():
                sys.stdout.write(f"{file.stem.removeprefix('test_'):<18}{line.rstrip()}\n")
                sys.stdout.flush()
    return tests.wait()


def main() -> int:
    """Run every file, write the page; 1 if a test failed."""
    begun = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(FILES)) as pool:
        pages = [Path(folder) / f"{file.stem}.md" for file in FILES]
        tests = [begin(file, page) for file, page in zip(FILES, pages, strict=True)]
        try:
            statuses = list(pool.map(relay, FILES, tests))
        except KeyboardInterrupt:
            for one in tests:
                one.send_signal(signal.SIGINT)
            raise
        took = time.monotonic() - begun
        failed = [file.name for file, status in zip(FILES, statuses, strict=True) if status]
        if failed:
            sys.stdout.write(f"failed: {', '.join(failed)}, after {took:.0f} s; no page was written\n")
            return 1
        write_page(Path(sys.argv[1]), [Book.of_page(page) for page in pages], took)
    sys.stdout.write(f"all passed, {took:.0f} s: {sys.argv[1]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
