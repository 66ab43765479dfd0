"""Reading the sites' style codes: replies with noise in, a style bank out.

Each reply is judged alone. A cohort is as large as its code says, noise included: below twice the plan's
minimum a style would be mostly noise, and the site is put aside. What this file does not do: it asks nobody
(`server/exchanges/style_code.py`), and cannot tell a plausible lie from the truth.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from federation.exchanges.style_code import CODE, StyleCodeReply, code_shapes, style_code
from federation.exchanges.survey import smallest_cohort, survey_layout
from federation.plan.plan import RunPlan
from federation.wire.limits import MOST_PATIENTS
from meduet_models.style.bank import StyleBank
from meduet_models.style.code import entry_of
from strategies.aggregation import ReplyRefused


class ProtectedStyles:
    """Style codes along the axes of `public`, the plan's public latents."""

    def __init__(self, plan: RunPlan, public: Float[Tensor, "m c d h w"]) -> None:
        self._plan, self._code = plan, style_code(plan, public)

    def check(self, reply: StyleCodeReply) -> None:
        """Raise `ReplyRefused` for a code that no cohort of a useful size can have told."""
        came = {name: tuple(tensor.shape) for name, tensor in reply.code.items()}
        if came != code_shapes(self._plan) or not bool(torch.isfinite(reply.code[CODE]).all()):
            raise ReplyRefused(f"Expected a finite style code of {code_shapes(self._plan)}; got {came}.")
        least, count = 2 * smallest_cohort(self._plan), self.patients(reply)
        if not least <= count <= MOST_PATIENTS:
            raise ReplyRefused(
                f"Expected a style code of {least} to {MOST_PATIENTS} patients, as far as noise lets tell; "
                f"got {count:.0f}. Lower style.minimum_cohort, or leave the site out of the plan."
            )

    def patients(self, reply: StyleCodeReply) -> float:
        """About how many patients are behind a code."""
        return self._code.count(reply.code[CODE])

    def bank(self, replies: Mapping[str, StyleCodeReply]) -> StyleBank:
        """The styles of the sites that answered. Raises as `StyleBank.of_entries`."""
        layout = survey_layout(self._plan)
        entries = {
            site: (self.patients(reply), entry_of(self._code.read(reply.code[CODE]), layout))
            for site, reply in replies.items()
        }
        return StyleBank.of_entries(self._plan.sites, entries, layout)
