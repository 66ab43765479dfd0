"""A site's part in a round as a secure sum: it announces, shares, trains and masks, and opens one list.

What may be said is decided in `privacy/secure_sum/`; that it is said once, and to one question, stands in the
ledger as for every exchange. So a round's sum is opened for one list whatever is asked, and an attempt that
was given up for another is never opened.

Does not do: steps (`client/exchanges/pretraining.py`, with privacy `private_rounds.py`), keep secrets by
itself (`client/secrets/sum_secrets.py`).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from client.exchanges.exchange import Answer, AskRefused, OnStep, Site, SiteAtWork
from client.exchanges.pretraining import answer_round
from client.exchanges.private_rounds import answer_private_round
from client.release import TEXT, Gate, Released
from client.secrets.sum_secrets import SumSecrets
from federation.exchanges.secure_sum import (
    SUM_KEYS,
    SUM_MASKED,
    SUM_PRIVATE,
    SUM_SHARES,
    SUM_UNMASK,
    SumKeysAsk,
    SumMaskedAsk,
    SumMaskedReply,
    SumPrivateAsk,
    SumSharesAsk,
    SumTextReply,
    SumUnmaskAsk,
    SumVectorAsk,
    announced_text,
    attempt_of,
    list_of,
    roster_of,
    shares_of,
    texts_of,
)
from federation.keys.certificates import utc_now
from federation.keys.identity import Peers
from federation.plan.plan import RunPlan
from federation.summed_noise import check_summed
from federation.wire.sum_layout import MASKED, SumLayout
from federation.wire.wire import RefusalKind
from privacy.secure_sum.party import Party
from privacy.secure_sum.ring import to_grid
from privacy.secure_sum.transcript import checked_roster, threshold

PEERS = "peers.json"
"""The keys of other sites as this one first saw them, in the state folder."""


def answer_keys(site: Site, ask: SumKeysAsk, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
    """Announce fresh keys. Raises `AskRefused` for a site without a key of its own, and `SumRefused` when it
    has begun a later attempt."""
    attempt, identity = attempt_of(ask), site.identity()
    secrets = SumSecrets(site.state_dir, ask.plan_sha256)
    if (party := secrets.begun(attempt)) is None:
        party = Party.new(attempt, site.name)
        secrets.keep(party)
    return gate.release_text(announced_text(party.announcement, attempt, plan, identity))


def answer_shares(site: Site, ask: SumSharesAsk, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
    """Divide the secrets of this attempt among those who announced. Raises `SumRefused` for a roster that was
    not signed by those it names, or is not one to share secrets among."""
    attempt, least = attempt_of(ask), threshold(len(plan.sites))
    secrets = SumSecrets(site.state_dir, ask.plan_sha256)
    party = secrets.of(attempt)
    roster, fingerprints = roster_of(ask.roster, attempt, plan, site.identity(), utc_now())
    checked_roster(roster, plan.sites, site.name, party.announcement, least)
    Peers(site.state_dir / PEERS).met(fingerprints)
    divided, texts = party.divided(roster, least)
    return gate.release_text(
        texts_of(texts), keep=lambda: secrets.keep(divided), said={"recipients": sorted(texts)}
    )


def answer_masked(
    site: SiteAtWork, ask: SumMaskedAsk, plan: RunPlan, gate: Gate, on_step: OnStep
) -> Released:
    """Train the round and release its vector, masked with those whose shares came. Raises `SumRefused`,
    before any scan is read, for shares that do not open or are too few; and as `answer_round`."""
    masking, keep = masking_of(site, ask, plan)
    return answer_round(site, ask, plan, gate, on_step, masking, keep)


def answer_private(
    site: SiteAtWork, ask: SumPrivateAsk, plan: RunPlan, gate: Gate, on_step: OnStep
) -> Released:
    """Take a noisy step and release its vector, masked with those whose shares came. Raises as
    `answer_masked`, and as `answer_private_round`; and `AskRefused` for a sum that would spoil its noise."""
    masking, keep = masking_of(site, ask, plan)
    try:
        check_summed(plan, masking.layout)
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.MALFORMED) from error
    return answer_private_round(site, ask, plan, gate, on_step, masking, keep)


def masking_of(
    site: SiteAtWork, ask: SumVectorAsk, plan: RunPlan
) -> tuple["PartyMasking", Callable[[], None]]:
    """How the vector of this attempt is masked, and what is to be kept when it leaves."""
    secrets = SumSecrets(site.state_dir, ask.plan_sha256)
    party = secrets.of(attempt_of(ask)).joined(shares_of(ask.texts), threshold(len(plan.sites)))
    layout = SumLayout.of(plan, {name: tensor.shape for name, tensor in ask.shared.items()})
    return PartyMasking(party, layout), lambda: secrets.keep(party)


def answer_unmask(site: Site, ask: SumUnmaskAsk, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
    """Open the sum of one list. Raises `SumRefused` for a list that this site may not open."""
    party = SumSecrets(site.state_dir, ask.plan_sha256).of(attempt_of(ask))
    said = list_of(ask.said)
    opened = party.opened(said, threshold(len(plan.sites)))
    return gate.release_text(
        opened.to_text(), said={"survivors": sorted(said.survivors), "lost": sorted(said.lost)}
    )


class PartyMasking:
    """How this site's weighted update becomes its masked vector in one attempt, in the vector's memory."""

    def __init__(self, party: Party, layout: SumLayout) -> None:
        self.party, self.layout = party, layout
        self._vector = np.empty(layout.size, dtype=np.uint32)

    @property
    def rounding(self) -> float:
        """As `Masking`."""
        return self.layout.rounding

    def memory(self) -> dict[str, Tensor]:
        """As `Masking`."""
        return self.layout.tensors(self._vector)

    def rounded(self, tensor: Tensor) -> Tensor:
        """As `Masking`."""
        to_grid(tensor.view(-1).numpy(), self.layout.bits)
        return tensor

    def masked(self, weight: float, metrics: Mapping[str, float]) -> dict[str, Tensor]:
        """As `Masking`."""
        self.layout.encode(self._vector, int(weight), metrics)
        self.party.mask(self._vector)
        return {MASKED: torch.from_numpy(self._vector)}


def text_mail(released: Released, ask: SumKeysAsk | SumSharesAsk | SumUnmaskAsk, site: str) -> SumTextReply:
    """The reply to the stages that are texts."""
    text = bytes(released.tensors[TEXT].tolist()).decode("ascii")
    return SumTextReply(
        plan_sha256=ask.plan_sha256, site=site, round=ask.round, attempt=ask.attempt, text=text
    )


def masked_mail(released: Released, ask: SumVectorAsk, site: str) -> SumMaskedReply:
    """The reply to the stage that trains: the masked vector, and nothing beside it."""
    return SumMaskedReply(
        plan_sha256=ask.plan_sha256,
        site=site,
        round=ask.round,
        attempt=ask.attempt,
        masked=dict(released.tensors),
    )


KEYS = Answer(SUM_KEYS, answer_keys, text_mail, reads_scans=False)
SHARES = Answer(SUM_SHARES, answer_shares, text_mail, reads_scans=False)
VECTOR = Answer(SUM_MASKED, answer_masked, masked_mail, masking=masking_of)
PRIVATE_VECTOR = Answer(SUM_PRIVATE, answer_private, masked_mail, masking=masking_of)
OPENING = Answer(SUM_UNMASK, answer_unmask, text_mail, reads_scans=False)
