"""The model as the centre sees it: tensors that travel, tensors that stay, and two things to learn from sums.

`SharedModel` is all that the run needs of a model; `MeduetModel` is the one we pretrain. The centre never
trains and never sees a scan: it makes the common start, sets the latent scale from the pooled survey, takes
the axes of the content code from phantoms, and fits the site erasure from the sums of the sites' codes.
What this file does not do: it sends and stores nothing (`server/app.py`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from federation.exchanges.erasure import ErasureReply, erasure_sums, pooled_bound
from federation.exchanges.survey import SurveyReply, smallest_cohort, survey_layout
from federation.plan.canary_plan import in_words
from federation.plan.plan import RunPlan
from federation.wire.limits import MOST_PATIENTS, MOST_SCANS
from federation.wire.messages import Tensors
from meduet_models.content_code import (
    CodeSums,
    code_bound,
    public_code,
    shift_left,
    token_erasure,
    without_sites,
)
from meduet_models.meduet import MeDUET, layer_normed
from meduet_models.published.pretrained import CANARIES
from meduet_models.sharing import home_keys, shared_keys
from meduet_models.style.bank import StyleBank
from meduet_models.style.restyling import own_entries, restyle_each
from meduet_models.threads import fixed_threads
from server.public_latents import public_latents, restyled
from server.public_scans import public_scans
from server.volume_start import start_on_volumes
from strategies.aggregation import ReplyRefused
from strategies.style_bank import StyleSurvey

_CODE = ("code_places", "code_channels", "code_mean", "code_matrix")
_ERASED = ("erasure_mean", "erasure_matrix", *_CODE)
_SCANS_AT_ONCE = 16


@dataclass(frozen=True)
class Surveyed:
    """What a survey changes."""

    shared: Tensors
    bank: Tensors
    summary: dict[str, Any] = field(default_factory=dict)


class SharedModel(Protocol):
    """What the run needs of a model."""

    @property
    def surveyed(self) -> bool:
        """Whether there is anything to ask before the first round."""

    @property
    def erased(self) -> bool:
        """Whether the site is erased after the last round."""

    def start(self) -> tuple[Tensors, Tensors]:
        """The common start, the same whenever it is asked for: (shared, home)."""

    def check_survey(self, reply: SurveyReply) -> None:
        """Raise `ValueError` when a site's sums cannot be used."""

    def after_survey(self, shared: Tensors, replies: Mapping[str, SurveyReply]) -> Surveyed:
        """Shared weights and style bank for the rounds."""

    def with_code(self, shared: Tensors, style_bank: Tensors) -> Tensors:
        """These weights with the axes of a code, in which no site is erased yet."""

    def check_erasure(self, reply: ErasureReply) -> None:
        """Raise `ValueError` when a site's sums cannot be used."""

    def after_erasure(
        self, shared: Tensors, replies: Mapping[str, ErasureReply]
    ) -> tuple[Tensors, dict[str, Any]]:
        """Final shared weights, and a summary."""

    def public_scans(self, folder: Path) -> Tensor:
        """With privacy: latents of the plan's public scans, which lie in the run's folder."""

    def erased_by_public(
        self, shared: Tensors, style_bank: Tensors, public: Tensor
    ) -> tuple[Tensors, dict[str, Any]]:
        """With privacy: final shared weights, from public scans alone, and a summary."""

    def provenance(self) -> dict[str, str]:
        """What goes into the header of the final weights."""


class MeduetModel:
    """MeDUET under a plan."""

    def __init__(self, plan: RunPlan, tokenizer: Path | None = None, anatomy: Path | None = None) -> None:
        """`tokenizer`: the file of the plan's tokenizer; none: the package's, if it is the plan's. `anatomy`:
        that of the plan's start from public anatomy; none: the shipped one."""
        self.plan, self._tokenizer, self._anatomy = plan, tokenizer, anatomy
        self._survey = StyleSurvey(plan)
        self._drawn: Tensor | None = None
        network = self._network()
        method = plan.aggregation.method
        self._shared = shared_keys(network, plan.style.head, method)
        self._home = home_keys(network, plan.style.head, method)

    @property
    def surveyed(self) -> bool:
        """Everywhere but where each site is alone."""
        return bool(self._shared)

    @property
    def erased(self) -> bool:
        """Where there is a shared model and more than one site to tell apart."""
        return bool(self._shared) and len(self.plan.participants) > 1

    def start(self) -> tuple[Tensors, Tensors]:
        """The network's start from the plan's seed and, where it has a U-Net, from public anatomy, divided
        into what travels and what stays. Raises as `start_on_volumes`."""
        weights = self._start
        return {n: weights[n] for n in self._shared}, {n: weights[n] for n in self._home}

    @cached_property
    def _start(self) -> Tensors:
        network = self._network()
        start_on_volumes(network, self.plan, self._tokenizer, self._anatomy)
        return network.state_dict()

    def check_survey(self, reply: SurveyReply) -> None:
        """Judged alone by `StyleSurvey`; raises `ReplyRefused` with its reason."""
        if not 0 < reply.num_patients <= min(reply.num_scans, MOST_PATIENTS):
            raise ReplyRefused(
                f"Expected from 1 to {MOST_PATIENTS} patients with a scan or more each; got "
                f"{reply.num_patients} with {reply.num_scans} scans."
            )
        if reply.num_scans > MOST_SCANS:
            raise ReplyRefused(f"Expected at most {MOST_SCANS} scans; got {reply.num_scans}.")
        counts = reply.moments.get("count")
        if counts is not None and bool((counts > reply.num_patients).any()):
            raise ReplyRefused("Expected style sums of no more patients than the site says it has; got more.")
        if not self._survey.add(self._surveyed_as(reply.site), reply.moments):
            raise ReplyRefused(self._survey.refused[self._surveyed_as(reply.site)])

    def after_survey(self, shared: Tensors, replies: Mapping[str, SurveyReply]) -> Surveyed:
        """Pooled centre and deviation of the latents into the network's constants; entries into the bank."""
        style_bank = self._survey.bank()
        network = self._network()
        network.set_latent_scale(style_bank.centre, style_bank.scale)
        constants = {name: network.state_dict()[name] for name in ("latent_mean", "latent_deviation")}
        sites = {s: {"patients": r.num_patients, "scans": r.num_scans} for s, r in replies.items()}
        summary = {"sites": sites, "latent_deviation": style_bank.scale.tolist()}
        tensors = style_bank.to_tensors() if self.plan.style.exchange != "none" else {}
        return Surveyed(shared | constants, tensors, summary)

    @torch.no_grad()
    def with_code(self, shared: Tensors, style_bank: Tensors) -> Tensors:
        """The principal axes of public content under these weights (and the norm layers of the start, where
        these stay at the sites), in the sites' styles where there is a bank; the same bits whatever
        the number of threads."""
        with fixed_threads(1):
            return shared | self._code_axes(shared, style_bank)

    def _code_axes(self, shared: Tensors, style_bank: Tensors) -> Tensors:
        network = self._network().eval()
        network.load_state_dict({**network.state_dict(), **shared})
        bank = StyleBank.from_tensors(style_bank, self.plan.sites) if style_bank else None
        latents = restyled(self._public(network), self.plan, bank)
        config = self.plan.network
        network.set_content_code(
            public_code(
                self._tokens(network, latents), config.code_places, config.code_channels, config.code_size
            )
        )
        return _constants(network, _CODE)

    def check_erasure(self, reply: ErasureReply) -> None:
        """Sums that whole patients of a whole cohort can have, within what was agreed for each; raises
        `ReplyRefused`."""
        try:
            sums = erasure_sums(reply.moments, self.plan)
            if (count := float(sums.codes.count)) < (least := smallest_cohort(self.plan)):
                raise ReplyRefused(f"Expected code sums of at least {least} patients; got {count:g}.")
            sums.codes.check(MOST_PATIENTS)
            sums.pooled.check(MOST_PATIENTS)
            if (other := float(sums.pooled.count)) not in (0.0, count):
                raise ReplyRefused(f"Expected pooled content of nobody or of {count:g}; got {other:g}.")
        except ValueError as reason:
            raise ReplyRefused(str(reason)) from reason

    def after_erasure(
        self, shared: Tensors, replies: Mapping[str, ErasureReply]
    ) -> tuple[Tensors, dict[str, Any]]:
        """The code without the sites, and the same of every token as the last linear layer of the content
        head."""
        of_sites = {site: erasure_sums(reply.moments, self.plan) for site, reply in replies.items()}
        sums = {site: own.codes for site, own in of_sites.items()}
        pooled = {site: own.pooled for site, own in of_sites.items() if own.pooled.count > 0}
        network = self._network()
        network.load_state_dict({**network.state_dict(), **shared})
        erased, summary = self._without_sites(network, sums, pooled)
        sites = {site: {"patients": int(own.count)} for site, own in sums.items()}
        left = shift_left(self.plan.network.code_size, min(own["patients"] for own in sites.values()))
        return shared | erased, {**summary, "sites": sites, "pooled": sorted(pooled), "shift_left": left}

    def _without_sites(
        self, network: MeDUET, sums: Mapping[str, CodeSums], pooled: Mapping[str, CodeSums]
    ) -> tuple[Tensors, dict[str, Any]]:
        """Code and erasure of `network`, whose code `sums` were told of, and whose `pooled` content."""
        told_of = network.code
        mean, matrix = token_erasure(told_of, sums, pooled)
        network.set_erasure(mean, matrix)
        network.set_content_code(without_sites(told_of, sums))
        rank = round(float(len(mean) - matrix.trace()))  # the erased directions: a projection's trace
        return _constants(network, _ERASED), {"rank": rank}

    def public_scans(self, folder: Path) -> Tensor:
        """Drawn where they are missing (`server/public_scans.py`)."""
        return public_scans(self.plan, folder, self._tokenizer)

    @torch.no_grad()
    def erased_by_public(
        self, shared: Tensors, style_bank: Tensors, public: Tensor
    ) -> tuple[Tensors, dict[str, Any]]:
        """The content code, and the sites erased from it and from every token, by public scans alone: each
        of them in the style of every site. No patient is in it."""
        plan, config = self.plan, self.plan.network
        bank = StyleBank.from_tensors(style_bank, plan.sites)
        network = self._network().eval()
        network.load_state_dict({**network.state_dict(), **shared})
        own = own_entries(public, survey_layout(plan))
        names = [str(row) for row in range(len(public))]
        with fixed_threads(1):
            seen = {
                site: restyle_each(public, own, bank, torch.full((len(public),), plan.sites.index(site)))
                for site in bank.present
            }
            tokens = {site: self._tokens(network, latents) for site, latents in seen.items()}
            turns = [tokens[site][k :: len(tokens)] for k, site in enumerate(tokens)]
            network.set_content_code(
                public_code(torch.cat(turns), config.code_places, config.code_channels, config.code_size)
            )
            bound = code_bound(config.code_size)
            sums = {
                site: CodeSums.of(
                    torch.cat([network.content_code(x) for x in _chunks(latents)]), names, bound
                )
                for site, latents in seen.items()
            }
            pooled = {
                site: CodeSums.of(own.mean(1), names, pooled_bound(plan)) for site, own in tokens.items()
            }
            erased, summary = self._without_sites(network, sums, pooled)
        return shared | erased, {**summary, "fitted_on": "public scans"}

    def provenance(self) -> dict[str, str]:
        """Enough to build the network again, to prepare a scan for it, and to say what it was trained on."""
        return {
            "model": "MeDUET",
            "network": json.dumps(asdict(self.plan.network), sort_keys=True),
            "tokenizer_sha256": self.plan.tokenizer_sha256,
            "volumes": json.dumps(asdict(self.plan.volumes), sort_keys=True),
            **({} if (canaries := self.plan.audit_canaries) is None else {CANARIES: in_words(canaries)}),
        }

    def _tokens(self, network: MeDUET, latents: Tensor) -> Tensor:
        return torch.cat([layer_normed(network.encode(chunk).content) for chunk in _chunks(latents)])

    def _network(self) -> MeDUET:
        return MeDUET(self.plan.network, len(self.plan.sites), seed=self.plan.seed)

    def _public(self, network: MeDUET) -> Tensor:
        """Drawn once: the centre and deviation of a run's latents are those of its survey."""
        if self._drawn is None:
            self._drawn = public_latents(
                self.plan, network.latent_mean, network.latent_deviation, self._tokenizer
            )
        return self._drawn

    def _surveyed_as(self, site: str) -> str:
        """The pooled participant is no site of the plan; only its pooled centre and scale are used."""
        return self.plan.sites[0] if self.plan.aggregation.method == "pooled" else site


def _chunks(latents: Tensor) -> tuple[Tensor, ...]:
    return torch.split(latents, _SCANS_AT_ONCE)


def _constants(network: MeDUET, names: Sequence[str]) -> Tensors:
    tensors = network.state_dict()
    return {name: tensors[name] for name in names}
