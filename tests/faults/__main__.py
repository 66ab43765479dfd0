"""All faults at once: `python -m tests.faults PAGE`, which is `make faults`.

Every file of tests is a pytest of its own with a consortium of its own, and all run beside each other: most
of a fault is waiting for a heartbeat or the end of an outage. What they say appears as it is said, after the
file's name. If all of them passed, the page is written from theirs. Interrupted or killed, it interrupts
each of them, which then stops its processes.

Does not do: choose tests. For one file, or one fault: `pytest -s -m faults tests/faults/FILE -k FAULT`.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from federation.programs.processes import die_with_parent
from tests.faults.page import Book, write_page

FILES = sorted(Path(__file__).parent.glob("test_*.py"), key=lambda file: ("day" not in file.stem, file.stem))
"""In the order in which they begin and stand on the page: the days first, whose faults are timed."""
APART_S = 40.0
"""Between two beginnings: for so long the processes of one consortium keep two cores busy."""


def begin(file: Path, folder: Path) -> subprocess.Popen[str]:
    """Start the tests of one file, which write into `folder`."""
    options = ("-q", "-s", "-p", "no:cacheprovider", "-m", "faults", "--basetemp", str(folder / file.stem))
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, "--faults-page", str(page_of(file, folder)), str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes from here, once
        preexec_fn=die_with_parent(signal.SIGINT),
    )


def page_of(file: Path, folder: Path) -> Path:
    """Where one file of tests writes its page."""
    return folder / f"{file.stem}.md"


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
    begun, page = time.monotonic(), Path(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    folder = Path(tempfile.mkdtemp(prefix="meduet-faults-"))
    tests: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(len(FILES)) as pool:
        try:
            said = []
            for file in FILES:
                time.sleep(APART_S if tests else 0.0)
                tests.append(begin(file, folder))
                said.append(pool.submit(relay, file, tests[-1]))
            statuses = [one.result() for one in said]
        except KeyboardInterrupt:
            for one in tests:
                one.send_signal(signal.SIGINT)
            raise
    took = time.monotonic() - begun
    if failed := [file.name for file, status in zip(FILES, statuses, strict=True) if status]:
        sys.stdout.write(f"failed after {took:.0f} s: {', '.join(failed)}; no page written. See {folder}\n")
        return 1
    write_page(page, [Book.of_page(page_of(file, folder)) for file in FILES], took)
    shutil.rmtree(folder)
    sys.stdout.write(f"all passed, {took:.0f} s: {page}\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.stdout.write("interrupted; every process was stopped\n")
        sys.exit(130)
