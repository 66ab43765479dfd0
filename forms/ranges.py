"""What a number in a form may be, and how many entries a list may have: the range stands beside the setting.

`rounds: Annotated[int, Range(at_least=1, at_most=1000)]` is checked wherever the form is filled in
(`forms/form.py`). Bounds are wide: they refuse what nobody can mean, and what would ask for more memory or
time than a machine has; they recommend nothing. NaN and infinity are in no range.

Does not do: rules between two settings; those stand in the form's `__post_init__`.
"""

from collections.abc import Sized
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number, or of each number of a list; give one lower and one upper bound."""

    at_least: float | None = None
    """Lower bound that is itself allowed."""
    above: float | None = None
    """Lower bound that is not."""
    at_most: float | None = None
    """Upper bound that is itself allowed."""
    below: float | None = None
    """Upper bound that is not."""

    def __post_init__(self) -> None:
        """A range without an end, or with two at one end, is a mistake of ours."""
        assert (self.at_least is None) != (self.above is None) and (self.at_most is None) != (
            self.below is None
        )

    def __contains__(self, value: float) -> bool:
        """Whether `value` lies inside; NaN never does."""
        low = value >= self.at_least if self.at_least is not None else value > self.above  # type: ignore[operator]
        high = value <= self.at_most if self.at_most is not None else value < self.below  # type: ignore[operator]
        return bool(low and high)

    def __str__(self) -> str:
        """In words: "from 1 to 9", "above 0 and at most 1"."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least:,} to {self.at_most:,}"
        low = f"at least {self.at_least:,}" if self.at_least is not None else f"above {self.above:,}"
        high = f"at most {self.at_most:,}" if self.at_most is not None else f"below {self.below:,}"
        return f"{low} and {high}"

    def check(self, value: float, where: str) -> None:
        """Raise `ValueError` naming the setting `where` unless `value` lies inside."""
        if value not in self:
            raise ValueError(f"Expected {where} {self}; got {shown(value)}.")


@dataclass(frozen=True)
class Entries:
    """How many entries a list or a mapping may have."""

    most: int
    """Most entries."""
    least: int = 0
    """Fewest entries."""

    def check(self, value: Sized, where: str) -> None:
        """Raise `ValueError` naming the setting `where` unless `value` has as many."""
        if not self.least <= len(value) <= self.most:
            raise ValueError(
                f"Expected {where} to have {self.least} to {self.most} entries; got {len(value)}."
            )


Share = Range(at_least=0, at_most=1)
"""A share, with none and all of it allowed."""


def shown(value: object) -> str:
    """`value` as an error shows it: one line, not long, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes out, or deeper than it goes
        return "a value that is too long to show"
    return text if len(text) <= 100 else f"{text[:100]}…"


def brief(error: BaseException) -> str:
    """What another library says of an error, on one line and not long."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
