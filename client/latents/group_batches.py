"""The groups of a noisy step: a scan of one patient and public scans beside it, each group drawn by itself.

Each patient is in a step with the plan's chance, and what is drawn for her (a scan, a view, her public
partners, masks, styles) comes from a secret stream of hers and of the step: nobody's group depends on who
else is there. Her scan is taken out of the site's style as the bank tells it, noise included, never as the
site knows it; a public scan out of its own. Both are restyled to what was drawn.

What this file does not do: bound a group's gradient or add noise (`client/training/private.py`); draw whole
scans, which plans with privacy do not have.

Axes: b = scans of some groups, k = scans of a group, c d h w = latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from client.latents.batches import TrainingScans
from client.scans.patients import rows_by_patient
from federation.exchanges.private_rounds import noisy_of
from federation.exchanges.survey import survey_layout
from federation.plan import RunPlan
from meduet_models.objective.objective import StepBatch, StepDraws, draw_step
from meduet_models.seeds import generator_of
from meduet_models.style.bank import StyleBank
from meduet_models.style.restyling import own_entries, restyle_each
from privacy.step_secrets import StepSecrets


@dataclass(frozen=True)
class Group:
    """Everything that was drawn for one patient in one step."""

    scan: int
    """Which scan of hers."""
    view: int
    """Which cached view of it."""
    public: Int[Tensor, " others"]
    """Which public scans are beside it."""
    step: StepDraws
    """Partners within the group, exchanged tokens, target styles."""


class GroupBatches:
    """The groups of one site in one round. Raises `ValueError` when the bank has no style of this site."""

    def __init__(
        self,
        scans: TrainingScans,
        plan: RunPlan,
        style_bank: StyleBank,
        public: Float[Tensor, "m c d h w"],
        site: str,
    ) -> None:
        if site not in style_bank.present:
            raise ValueError("Expected this site's own protected style in the bank; it has none.")
        self._scans, self._plan, self._style_bank, self._public = scans, plan, style_bank, public
        self._own = plan.sites.index(site)
        self._public_own = own_entries(public, survey_layout(plan))
        self._choices = tuple(style_bank.sites.index(name) for name in style_bank.present)
        self._rows = rows_by_patient(scans.patients, scans.indices("train"))

    @property
    def patients(self) -> float:
        """How many patients the site's style code told, noise included; what the centre knows as well."""
        return float(self._style_bank.count[self._own].sum())

    def drawn(self, noise: StepSecrets, step: int) -> list[Group]:
        """The groups of a step of the round: as many as patients happened to be in it, none as well."""
        rate, groups = noisy_of(self._plan).sampling_rate, []
        for patient, rows in self._rows.items():
            if (generator := noise.drawn(step, patient, rate)) is not None:
                groups.append(self._group(rows, generator))
        return groups

    def _group(self, rows: Sequence[int], generator: torch.Generator) -> Group:
        plan, size = self._plan, noisy_of(self._plan).group_size
        return Group(
            scan=rows[int(torch.randint(len(rows), (), generator=generator))],
            view=int(torch.randint(plan.volumes.views, (), generator=generator)),
            public=torch.randperm(len(self._public), generator=generator)[: size - 1],
            step=draw_step(generator, size, plan.network.num_tokens, plan.objective, self._choices),
        )

    def turn(self, round_number: int, step: int) -> Literal["mftd", "siqc"]:
        """`objective.estimator=alternate`: which of the two all groups of a step compute; public."""
        draws = generator_of("turn of a noisy step", self._plan.seed, round_number, step)
        return "mftd" if torch.rand((), generator=draws) < 0.5 else "siqc"

    def apply(
        self, groups: Sequence[Group], turn: Literal["mftd", "siqc"], device: torch.device
    ) -> tuple[StepBatch, StepDraws]:
        """These groups as one batch on `device`, group after group, and their draws."""
        size = noisy_of(self._plan).group_size
        draws = StepDraws(
            partner=torch.cat([i * size + group.step.partner for i, group in enumerate(groups)]),
            exchanged=torch.cat([group.step.exchanged for group in groups]),
            show_lent=torch.cat([group.step.show_lent for group in groups]),
            turn=turn,
            target_site=torch.cat([_target(group) for group in groups]),
        )
        parts = [self._styled(group) for group in groups]
        site = torch.cat([_target(group) for group in groups])
        batch = StepBatch(
            latents=torch.cat([latents for latents, _ in parts]).to(device),
            site=site.to(device),
            restyled=torch.cat([restyled for _, restyled in parts]).to(device),
            restyled_site=site[draws.partner].to(device),
            subject=torch.cat(
                [torch.cat([torch.tensor([len(self._public)]), group.public]) for group in groups]
            ).to(device),  # compared within a group only
        )
        return batch, draws.to(device)

    def _styled(self, group: Group) -> tuple[Float[Tensor, "k c d h w"], Float[Tensor, "k c d h w"]]:
        """The scans of a group in their target styles, and in those of their partners."""
        target = _target(group)
        hers, beside = self._scans.latents([group.scan], group.view), self._public[group.public]
        own = self._public_own.each(lambda values: values[group.public])

        def in_style(site: Tensor) -> Tensor:
            mine = self._style_bank.restyle(hers, torch.tensor([self._own]), site[:1])
            return torch.cat([mine, restyle_each(beside, own, self._style_bank, site[1:])])

        return in_style(target), in_style(target[group.step.partner])


def _target(group: Group) -> Int[Tensor, " k"]:
    assert group.step.target_site is not None, "a bank has a style"
    return group.step.target_site
