"""The journal: what crossed the wall, line by line, in a file that shows tampering.

A site writes one line per release (kind, bytes, hash of what left, norms, plan, round), the server one line
per event of a run. The chain itself is `privacy/chain.py`; this file only gives it its name.

Does not do: hold the released values, or anything about a patient.
"""

from pathlib import Path

from privacy.chain import BrokenChain, Chain

__all__ = ["BrokenChain", "Journal"]


class Journal(Chain):
    """A hash-chained record of what left (at a site) or happened (at the server).

    `append(record)` returns the hash of the new line, `verify()` the number of lines; both raise
    `BrokenChain` naming the line when the file was edited, shortened inside, or reordered.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, purpose="journal")
