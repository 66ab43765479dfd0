"""Every test checks types and shapes of what it calls: wrong ones are found wherever a function was made."""

from collections.abc import Callable
from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

from meduet_models.factors import normalise
from tests.typed import jaxtyped

Rows = Float[Tensor, "b c"]


@jaxtyped(typechecker="")
def joined(one: Rows, other: Rows, flat: bool = False) -> Rows:
    return (one + other).flatten() if flat else one + other


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    @jaxtyped(typechecker="")
    def scale(values: Rows) -> Rows:
        return values * factor if factor else values[0]

    return scale


@jaxtyped(typechecker="")
@dataclass
class Kept:
    rows: Rows
    name: "str"


def test_types_shapes_of_arguments_together_and_of_what_is_returned_are_checked() -> None:
    rows = torch.ones(2, 3)
    assert torch.equal(joined(rows, rows), 2 * rows)
    for arguments in ((rows, torch.ones(3, 2)), (rows, rows[0]), (rows.long(), rows), (rows, rows, True)):
        with pytest.raises(BeartypeCallHintViolation):
            joined(*arguments)


def test_a_function_that_is_made_again_is_itself_and_checked() -> None:
    assert [float(scaled(k)(torch.ones(1, 1))) for k in (2.0, 3.0)] == [2.0, 3.0]
    for factor, values in ((2.0, torch.ones(1)), (0.0, torch.ones(1, 1))):
        with pytest.raises(BeartypeCallHintViolation):
            scaled(factor)(values)


def test_dataclasses_are_checked_and_so_is_the_product() -> None:
    assert Kept(torch.ones(1, 2), "a").name == "a"
    with pytest.raises(BeartypeCallHintViolation):
        Kept(torch.ones(1), "a")
    assert jaxtyping.jaxtyped is jaxtyped
    with pytest.raises(BeartypeCallHintViolation):
        normalise(torch.ones(3))
