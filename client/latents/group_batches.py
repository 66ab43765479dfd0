"""The groups of a noisy step: a scan of one patient and public scans beside it, each group drawn by itself.

Each patient is in a step with the plan's chance, and what is drawn for her (a scan, a view, her public
partners, masks, styles) comes from a secret stream of hers and of the step: nobody's group depends on who
else is there. Her scan is taken out of the site's style as the bank tells it, noise included, never as the
site knows it; a public scan out of its own. Both are restyled to what was drawn.

With `partners: private` as many patients as a group has scans stay together for the whole run: all of the
site's, in the order of a hash under its secret, and public scans fill the last group. Nobody but the site
knows that order and any is as likely as any other, so a patient who takes another's place takes it in the
same group: she moves that group alone, however often it is drawn. Groups of whoever was drawn would be cut
anew where one more is there.

What this file does not do: bound a group's gradient or add noise (`client/training/private.py`); draw whole
scans, which plans with privacy do not have.

Axes: b = scans of some groups, k = scans of a group, c d h w = latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from client.latents.batches import TrainingScans
from client.scans.patients import rows_by_patient
from client.secrets.site_secret import digest_of
from federation.exchanges.private_rounds import noisy_of
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.objective.objective import StepBatch, StepDraws, draw_step
from meduet_models.seeds import generator_of
from meduet_models.style.bank import StyleBank
from meduet_models.style.restyling import own_entries, restyle_each
from privacy.step_secrets import StepSecrets


@dataclass(frozen=True)
class Group:
    """Everything that was drawn for one group in one step."""

    scans: tuple[tuple[int, int], ...]
    """Which scan of each of its patients, and which cached view of it."""
    public: Int[Tensor, " others"]
    """Which public scans are beside them."""
    step: StepDraws
    """Partners within the group, exchanged tokens, target styles."""


class GroupBatches:
    """The groups of one site in one round; `secret`: the site's own, which puts private patients together.
    Raises `ValueError` when the bank has no style of this site."""

    def __init__(
        self,
        scans: TrainingScans,
        plan: RunPlan,
        style_bank: StyleBank,
        public: Float[Tensor, "m c d h w"],
        site: str,
        secret: bytes,
    ) -> None:
        if site not in style_bank.present:
            raise ValueError("Expected this site's own protected style in the bank; it has none.")
        self._scans, self._plan, self._style_bank, self._public = scans, plan, style_bank, public
        self._own = plan.sites.index(site)
        self._public_own = own_entries(public, survey_layout(plan))
        self._choices = tuple(style_bank.sites.index(name) for name in style_bank.present)
        rows = rows_by_patient(scans.patients, scans.indices("train"))
        self._members: dict[str, list[Sequence[int]]] = {patient: [own] for patient, own in rows.items()}
        if noisy_of(plan).partners == "private":
            self._members = _together(rows, noisy_of(plan).group_size, plan.sha256, secret)

    @property
    def patients(self) -> float:
        """How many patients the site's style code told, noise included; what the centre knows as well."""
        return float(self._style_bank.count[self._own].sum())

    @property
    def examples(self) -> int:
        """By how many the site's update weighs: that number, in a secure sum at most the plan's cap."""
        whole, settings = max(1, round(self.patients)), self._plan.aggregation
        return min(whole, settings.weight_cap) if settings.secure_sum else whole

    @property
    def expected(self) -> float:
        """Groups that are in a step, as that number and the plan let expect."""
        noisy = noisy_of(self._plan)
        return noisy.sampling_rate * max(1.0, self.patients / noisy.patients_in_group)

    def drawn(self, noise: StepSecrets, step: int) -> list[Group]:
        """The groups of a step of the round: as many as happened to be in it, none as well."""
        rate, groups = noisy_of(self._plan).sampling_rate, []
        for name, members in self._members.items():
            if (generator := noise.drawn(step, name, rate)) is not None:
                groups.append(self._group(members, generator))
        return groups

    def _group(self, members: Sequence[Sequence[int]], generator: torch.Generator) -> Group:
        plan, size = self._plan, noisy_of(self._plan).group_size

        def below(number: int) -> int:
            return int(torch.randint(number, (), generator=generator))

        return Group(
            scans=tuple((rows[below(len(rows))], below(plan.volumes.views)) for rows in members),
            public=torch.randperm(len(self._public), generator=generator)[: size - len(members)],
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
                [torch.cat([len(self._public) + torch.arange(len(g.scans)), g.public]) for g in groups]
            ).to(device),  # compared within a group only
        )
        return batch, draws.to(device)

    def _styled(self, group: Group) -> tuple[Float[Tensor, "k c d h w"], Float[Tensor, "k c d h w"]]:
        """The scans of a group in their target styles, and in those of their partners."""
        target, patients = _target(group), len(group.scans)
        theirs = torch.cat([self._scans.latents([scan], view) for scan, view in group.scans])
        beside = self._public[group.public]
        own = self._public_own.each(lambda values: values[group.public])

        def in_style(site: Tensor) -> Tensor:
            here = torch.full((patients,), self._own)
            mine = self._style_bank.restyle(theirs, here, site[:patients])
            if not len(beside):
                return mine
            return torch.cat([mine, restyle_each(beside, own, self._style_bank, site[patients:])])

        return in_style(target), in_style(target[group.step.partner])


def _together(
    rows: Mapping[str, Sequence[int]], size: int, plan_sha256: str, secret: bytes
) -> dict[str, list[Sequence[int]]]:
    """Rows of each patient of each group: all patients in the order of a hash under the secret, `size` a
    group, the last with those that are left."""
    order = sorted(rows, key=lambda patient: digest_of(secret, "groups of patients", plan_sha256, patient))
    return {
        f"group {at // size}": [rows[patient] for patient in order[at : at + size]]
        for at in range(0, len(order), size)
    }


def _target(group: Group) -> Int[Tensor, " k"]:
    assert group.step.target_site is not None, "a bank has a style"
    return group.step.target_site
