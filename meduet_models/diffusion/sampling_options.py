"""Sampling as options of a command line: the same words at a site (`meduet-site harmonise`) and at the centre
(`meduet-server synthesize`).

What this file does not do: sample (`sampling.py`). Heavy modules are imported when options are read, so that
--help is immediate.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meduet_models.diffusion.conditions import Condition
    from meduet_models.diffusion.sampling import SamplingSettings

OPTIONS = ("steps", "solver", "guidance", "seed")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add --steps, --solver, --guidance and --seed; what is not given is None."""
    parser.add_argument("--steps", type=int, metavar="N", help="solver steps (default 25)")
    parser.add_argument("--solver", choices=("euler", "heun"), help="default heun")
    parser.add_argument(
        "--guidance", nargs="+", metavar="NAME=WEIGHT",
        help="strength of a condition, as content=1.5; 1 is the plain model",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise (default 0)")


def sampling_settings(chosen: argparse.Namespace) -> "SamplingSettings":
    """What the options say; raises `ValueError` for a guidance that is none."""
    from meduet_models.diffusion.sampling import SamplingSettings

    values: dict[str, Any] = {n: v for n in ("steps", "solver") if (v := getattr(chosen, n)) is not None}
    return SamplingSettings(**values, guidance=parse_guidance(chosen.guidance or []))


def parse_guidance(words: Sequence[str]) -> "dict[Condition, float]":
    """`["content=1.5"]` as weights by condition; raises `ValueError` for anything else."""
    from meduet_models.diffusion.conditions import CONDITIONS

    weights: dict[Condition, float] = {}
    for text in words:
        name, _, value = text.partition("=")
        known = [condition for condition in CONDITIONS if condition == name]
        try:
            weight = float(value)
        except ValueError:
            weight = float("nan")
        if not known or not abs(weight) < float("inf"):
            raise ValueError(
                f"Expected --guidance NAME=WEIGHT with a name of {', '.join(CONDITIONS)}; got {text!r}."
            )
        if known[0] in weights:
            raise ValueError(f"Expected one --guidance for {name}; got two.")
        weights[known[0]] = weight
    return weights
