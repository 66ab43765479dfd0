"""What a secure sum costs: a site and the centre, by the number of sites and of values.

    python bench/secure_sum.py [--sites 3 5 10 20] [--values 1000000 20000000]

For each pair: CPU seconds of one site beside training (keys and shares; rounding and masking), bytes that it
sends, and CPU seconds of the centre (adding up; taking masks out, with nobody lost and with as many lost as
may be). The baseline is the plain sum of the same vectors (`strategies/aggregation.py`), which must be
cheaper. The vector of one site stands in for all, as the masks of the others cost the sites, not the centre.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from privacy.secure_sum.opening import unmask
from privacy.secure_sum.party import Opened, Party
from privacy.secure_sum.ring import encode
from privacy.secure_sum.transcript import Attempt, SurvivorList, threshold
from strategies.aggregation import Bounds, StreamingSum

ATTEMPT = Attempt("0" * 64, 1, 1)


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--sites", type=int, nargs="*", default=[3, 5, 10, 20])
    arguments.add_argument("--values", type=int, nargs="*", default=[1_000_000, 20_000_000])
    given = arguments.parse_args()
    print(
        "| sites | values | site: keys, shares | site: round, mask | sent | centre: add | unmask, 0 lost | "
        "unmask, most lost | plain sum | centre, ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for values in given.values:
        for sites in given.sites:
            print(row(sites, values), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"\nPeak memory: {peak:.0f} MB, in which are the update, two vectors and the plain sum of "
        f"{max(given.values) * 4 / 1e6:.0f} MB each."
    )


def row(num_sites: int, num_values: int) -> str:
    """One line of the table."""
    names, least = [f"site{n:02d}" for n in range(num_sites)], threshold(num_sites)
    parties = {name: Party.new(ATTEMPT, name) for name in names}
    roster = {name: party.announcement for name, party in parties.items()}

    def keys_and_shares() -> tuple[Party, dict[str, bytes]]:
        return Party.new(ATTEMPT, names[0]).divided(roster, least)

    keys_s, (_, texts) = cpu(keys_and_shares)
    divided = {name: party.divided(roster, least) for name, party in parties.items()}
    joined = {
        name: party.joined({p: divided[p][1][name] for p in names if p != name}, least)
        for name, (party, _) in divided.items()
    }
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
    total = StreamingSum(tensors, Bounds(num_replies=num_sites, max_norm=20.0))

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
