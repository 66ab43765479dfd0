"""What a secure sum costs: a site and the centre, by the number of sites and of values.

    python bench/secure_sum.py [--sites 3 5 10 20] [--values 1000000 20000000]

For each pair: CPU seconds of one site beside training (keys and shares; rounding and masking), bytes that it
sends, and CPU seconds of the centre (adding up; taking masks out, with nobody lost and with as many lost as
may be). The baseline is the plain sum of the same vectors (`strategies/aggregation.py`), which must be
cheaper. The vector of one site stands in for all, as the masks of the others cost the sites, not the centre.

Then an update passes the gate of the last number of sites, masked and not, each in a process of its own: the
most memory that was held meanwhile, the update included, over the vector's, and CPU seconds (bounding, hash,
file and books included). The baseline is the float32 update as it leaves unmasked.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from client.books.answers import KeptAnswers
from client.exchanges.secure_sum import PartyMasking
from client.release import Gate
from federation.journal import Journal
from federation.wire.sum_layout import SumLayout
from privacy.ledger import Ledger, Place
from privacy.promise import Promise
from privacy.secure_sum.opening import unmask
from privacy.secure_sum.party import Opened, Party
from privacy.secure_sum.ring import encode
from privacy.secure_sum.transcript import Attempt, SurvivorList, threshold
from strategies.aggregation import Bounds, StreamingSum

ATTEMPT = Attempt("0" * 64, 1, 1)
CLIP = 20.0
_LAYER = (1000, 1000)


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--sites", type=int, nargs="*", default=[3, 5, 10, 20])
    arguments.add_argument("--values", type=int, nargs="*", default=[1_000_000, 20_000_000])
    arguments.add_argument("--leaves", choices=("masked", "plain"), help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.leaves:
        with tempfile.TemporaryDirectory() as folder:
            leaves(given.leaves, given.sites[0], _LAYER[0] * _LAYER[1], Path(folder) / "first")
            print(leaves(given.leaves, given.sites[0], given.values[0], Path(folder)))
        return
    print(
        "| sites | values | site: keys, shares | site: round, mask | sent | centre: add | unmask, 0 lost | "
        "unmask, most lost | plain sum | centre, ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for values in given.values:
        for sites in given.sites:
            print(row(sites, values), flush=True)
    print("\n| values | leaves | most memory over the vector's, update included | CPU seconds |")
    print("|---|---|---|---|")
    for values in given.values:
        for how in ("masked", "plain"):
            command = [sys.executable, __file__, "--leaves", how]
            command += ["--sites", str(given.sites[-1]), "--values", str(values)]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")


def resident(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def leaves(how: str, num_sites: int, num_values: int, folder: Path) -> str:
    """One line of the second table: an update that is clipped, through the gate."""
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    shapes = {f"layer{n:03d}": _LAYER for n in range(num_values // (_LAYER[0] * _LAYER[1]))}
    before = resident("VmRSS")  # libraries that the first update loaded are in it
    update = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    ledger, journal = Ledger(folder / "ledger.jsonl"), Journal(folder / "journal.jsonl")
    promise = Promise(kind="round", bound=CLIP, unit="site update", enforcement="clip")
    place = Place(plan_sha256=ATTEMPT.plan_sha256, kind="round", round=1)
    reservation = ledger.reserve(place, "0" * 64, promise)
    gate = Gate(reservation, ledger, journal, KeptAnswers(folder / "answers"))
    layout = SumLayout(tuple(sorted(shapes.items())), num_sites, 1000, CLIP)
    masking = PartyMasking(together(num_sites)["site00"], layout) if how == "masked" else None
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    seconds, _ = cpu(lambda: gate.release(update, shapes, weight=50.0, masking=masking))
    share = (resident("VmHWM") - before) / (4 * layout.num_values)
    return f"| {num_values / 1e6:g} M | {how} | {share:.2f} | {seconds:.2f} |"


def together(num_sites: int) -> dict[str, Party]:
    """Sites after they shared."""
    names, least = [f"site{n:02d}" for n in range(num_sites)], threshold(num_sites)
    parties = {name: Party.new(ATTEMPT, name) for name in names}
    roster = {name: party.announcement for name, party in parties.items()}
    divided = {name: party.divided(roster, least) for name, party in parties.items()}
    return {
        name: party.joined({p: divided[p][1][name] for p in names if p != name}, least)
        for name, (party, _) in divided.items()
    }


def row(num_sites: int, num_values: int) -> str:
    """One line of the table."""
    least, joined = threshold(num_sites), together(num_sites)
    names = list(joined)
    roster = joined[names[0]].roster

    def keys_and_shares() -> tuple[Party, dict[str, bytes]]:
        return Party.new(ATTEMPT, names[0]).divided(roster, least)

    keys_s, (_, texts) = cpu(keys_and_shares)
    update = np.random.default_rng(0).normal(scale=1e-3, size=num_values).astype(np.float32)
    vector = np.empty(num_values, dtype=np.uint32)

    def masked() -> None:
        encode(update, 12, vector)
        joined[names[0]].mask(vector)

    mask_s, _ = cpu(masked)
    total = vector.copy()

    def add() -> None:
        for _ in range(num_sites - 1):
            np.add(total, vector, out=total)

    add_s, _ = cpu(add)
    unmask_s = []
    for lost in (0, num_sites - least):
        said = SurvivorList(frozenset(names[lost:]), frozenset(names[:lost]))
        answers = {
            name: Opened.from_text(joined[name].opened(said, least).to_text(), said) for name in names[lost:]
        }
        unmask_s.append(
            cpu(lambda said=said, answers=answers: unmask(total, ATTEMPT, roster, said, answers, least))[0]
        )
    plain_s = plain(num_sites, update)
    sent = 4 * num_values + sum(map(len, texts.values())) + 64 * num_sites + 160
    ratio = (add_s + unmask_s[0]) / plain_s
    return (
        f"| {num_sites} | {num_values / 1e6:g} M | {keys_s:.3f} | {mask_s:.2f} | {sent / 1e6:.1f} MB | "
        f"{add_s:.2f} | {unmask_s[0]:.2f} | {unmask_s[1]:.2f} | {plain_s:.2f} | {ratio:.1f} |"
    )


def plain(num_sites: int, update: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    """CPU seconds of the baseline."""
    tensors = {"update": torch.from_numpy(update)}
    total = StreamingSum(tensors, Bounds(num_replies=num_sites, max_norm=CLIP))

    def fold() -> None:
        for name in range(num_sites):
            total.fold(str(name), tensors, 1)
        total.mean()

    return cpu(fold)[0]


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of some work, and what it gives."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


if __name__ == "__main__":
    main()
