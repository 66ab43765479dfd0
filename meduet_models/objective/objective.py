"""The whole MeDUET loss on one page: named terms, named weights.

The first steps of a run may hide tokens and ask for them alone (`masked_share`): they cost a fifth of a step
with all terms, and without them the encoder learns little about a token's neighbours (docs/log.md). After
them, one step pairs the scans, exchanges tokens within each pair, and asks for everything back: both volumes
(reconstruction), their sites (adversary, site from style), their factors (MFTD), and factors that survive a
swap of styles (SiQC) and a restyling (invariance). Passes are shared wherever the result is the same: one
encode of the mixtures, one decode of plain and swapped streams, one re-encode of both; the teacher likewise.
Random choices come in `StepDraws`; the loss is a deterministic function of its arguments. It updates nothing.

Every stream is ordered by owner: row i of a stream belongs to volume i, whichever grid its tokens were
encoded in. Stream `kept` shows the tokens that i kept in its own grid, stream `lent` those that it lent to
its partner's. Streams are stacked whole, so row r of any layer's input belongs to volume r % b.

The loss mixes the scans of a batch, so a gradient per scan means nothing. With `group_size` the rows i of a
batch are groups i // group_size that do not meet: the loss is the mean over groups of each group's own loss
(`privacy/group_gradients.py` takes that apart again).

Axes: b = volumes, n = tokens, p = values in a token.
Source: MeDUET (arXiv:2602.17901); departures are listed in docs/architecture.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from meduet_models.factors import Factors
from meduet_models.meduet import FactorNetwork, MeDUET
from meduet_models.objective.adversary import reverse_gradient
from meduet_models.objective.contrast import (
    by_group,
    pool_tokens,
    restyling_invariance,
    supervised_contrast,
)
from meduet_models.objective.demixing import (
    draw_exchanged,
    draw_partners,
    hidden_mean,
    mix_tokens,
    unmix_tokens,
)
from meduet_models.objective.distillation import distil_factors, squared_distance
from meduet_models.objective.settings import ObjectiveConfig
from meduet_models.objective.teacher import Teacher


@dataclass(frozen=True)
class StepBatch:
    """What a step sees of a site."""

    latents: Float[Tensor, "b c d h w"]
    site: Int[Tensor, " b"]
    """The site of the style that each scan has (0 ... number of sites - 1)."""
    restyled: Float[Tensor, "b c d h w"] | None = None
    """Scan i in the style of its partner's site: the known answer of the swap."""
    restyled_site: Int[Tensor, " b"] | None = None
    """Whose style that is; the partner's site when None."""
    subject: Int[Tensor, " b"] | None = None
    """Equal for scans of one patient, so that they are never contrasted; every scan its own when None."""


@dataclass(frozen=True)
class StepDraws:
    """Every random choice of a step."""

    partner: Int[Tensor, " b"]
    """Pairs: partner[partner[i]] == i != partner[i]."""
    exchanged: Bool[Tensor, "b n"]
    """Where partners exchange tokens; the same for both."""
    show_lent: Bool[Tensor, " b"]
    """`one_stream`: which stream of each scan is re-encoded (set: lent; clear: kept)."""
    turn: Literal["mftd", "siqc"]
    """`alternate`: which of the two is computed."""
    target_site: Int[Tensor, " b"] | None = None
    """The target style of each scan in this step; the two of a pair differ when there is a choice."""

    def to(self, device: torch.device | str) -> "StepDraws":
        """The same choices on another device."""
        target = None if self.target_site is None else self.target_site.to(device)
        return StepDraws(
            self.partner.to(device), self.exchanged.to(device), self.show_lent.to(device), self.turn, target
        )


@dataclass(frozen=True)
class Losses:
    """The loss to descend, and its terms before weighting (only those that were computed), with their
    graph."""

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]


def draw_step(
    generator: torch.Generator,
    batch_size: int,
    num_tokens: int,
    config: ObjectiveConfig,
    site_choices: tuple[int, ...] = (),
    group_size: int | None = None,
) -> StepDraws:
    """Draw a step on the CPU. `site_choices`: the sites whose styles this client can restyle its scans to,
    itself included. `group_size`: partners come from the same group of so many scans.

    Which draws a group gets follows from its place in the batch, so they say who is missing unless the
    generator is secret. Raises `ValueError` when the batch, or a group, is odd, when the batch is not whole
    groups, and when the mask ratio exchanges nothing.
    """
    partner = draw_partners(generator, batch_size, group_size)
    exchanged = draw_exchanged(generator, partner, num_tokens, config.mask_ratio)
    show_lent = torch.rand(batch_size, generator=generator) < 0.5
    turn: Literal["mftd", "siqc"] = "mftd" if torch.rand((), generator=generator) < 0.5 else "siqc"
    target = None
    if site_choices:
        lower = torch.minimum(torch.arange(batch_size), partner)
        first = torch.randint(len(site_choices), (batch_size,), generator=generator)[lower]
        step = torch.randint(1, max(2, len(site_choices)), (batch_size,), generator=generator)[lower]
        is_upper = torch.arange(batch_size) != lower
        target = torch.tensor(site_choices)[(first + step * is_upper) % len(site_choices)]
    return StepDraws(partner, exchanged, show_lent, turn, target)


@dataclass(frozen=True)
class _Plan:
    """Which quantities this step needs, and with what weight."""

    mftd: float
    siqc: float
    invariance: float
    reversal: float

    @staticmethod
    def of(config: ObjectiveConfig, draws: StepDraws, progress: float) -> "_Plan":
        weights, masked = config.weights, config.masked_share
        progress = (progress - masked) / (1.0 - masked)
        mftd = weights.mftd if progress >= config.mftd_warmup else 0.0
        siqc = weights.siqc
        if config.estimator == "alternate" and mftd and siqc:
            mftd, siqc = (2 * mftd, 0.0) if draws.turn == "mftd" else (0.0, 2 * siqc)
        reversal = 1.0 if config.reversal_warmup == 0 else min(1.0, progress / config.reversal_warmup)
        return _Plan(mftd, siqc, weights.invariance, reversal)


class MeduetObjective:
    """The loss of one step."""

    mixes: ClassVar[bool] = True
    """A scan's gradient depends on the other scans of its batch, or of its group."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def __call__(
        self,
        student: MeDUET,
        teacher: Teacher,
        batch: StepBatch,
        draws: StepDraws,
        progress: float,
        group_size: int | None = None,
    ) -> Losses:
        """Compute the loss at a share `progress` in [0, 1] of all steps; with `group_size` the mean over
        groups of each group's own, every term alike.

        Raises `ValueError` when the invariance term is on and there is no `batch.restyled`, and when the
        batch is not whole groups or a scan has its partner in another group.
        """
        if group_size is not None:
            _check_groups(draws, group_size)
        config, weights = self.config, self.config.weights
        needs_restyled = [n for n in ("invariance", "restyled_reconstruction") if getattr(weights, n)]
        if needs_restyled and batch.restyled is None:
            raise ValueError(
                f"Expected batch.restyled, which the {needs_restyled[0]} term compares with; got None. "
                f"Exchange styles, or set weights.{needs_restyled[0]} to 0."
            )
        if config.masked_at(progress):
            return self._masked(student, batch, draws)
        plan = _Plan.of(config, draws, progress)
        subject = torch.arange(len(batch.site), device=batch.site.device)
        subject = subject if batch.subject is None else batch.subject
        kept, lent = ~draws.exchanged, draws.exchanged  # b n, what each stream shows of volume i

        own, restyled = self._encode_mixed(student, batch, draws, bool(needs_restyled))
        swapped = Factors(own.content, own.style[draws.partner])

        # Student: one decode, one re-encode.
        chosen = torch.where(draws.show_lent.unsqueeze(1), lent, kept)
        swap_visible = [chosen] if config.estimator == "one_stream" else [kept, lent]
        streams = [(own, kept), (own, lent)]
        streams += [(swapped, visible) for visible in swap_visible] if plan.siqc else []
        if weights.restyled_reconstruction and restyled is not None:
            streams.append((Factors(own.content, restyled.style), chosen))
        decoded = self._decode(student, streams)
        answer = decoded.pop() if weights.restyled_reconstruction else None
        plain, swaps = decoded[:2], decoded[2:]
        again_visible: list[Tensor] = []
        if plan.mftd and config.estimator == "one_stream":
            again_visible = [chosen]
            plain = [torch.where(draws.show_lent.reshape(-1, 1, 1), decoded[1], decoded[0])]
        elif plan.mftd:
            again_visible = [kept, lent]
        again = self._reencode(student, plain[: len(again_visible)] + swaps)
        again_plain, again_swaps = again[: len(again_visible)], again[len(again_visible) :]

        terms = self._reconstruction(student, batch, decoded[:2], [kept, lent])
        if answer is not None and batch.restyled is not None:
            wanted = student.target_tokens(batch.restyled)
            terms["restyled_reconstruction"] = squared_distance(answer, wanted).mean()
        terms |= self._sites(student, batch, own, [kept, lent], plan.reversal)
        clean, keys = self._teach(teacher, batch, draws, plan, swap_visible)
        if plan.mftd and clean is not None:
            share = 2 / len(again_visible)
            terms["mftd"] = share * sum_of(
                [distil_factors(f, clean, ~v) for f, v in zip(again_plain, again_visible, strict=True)]
            )
        if plan.siqc:
            queries = [(own, kept), (own, lent), *((f, None) for f in again_swaps)]
            terms["siqc"] = self._siqc(queries, keys, batch, draws, subject, group_size)
        if plan.invariance and clean is not None and restyled is not None:
            terms["invariance"] = restyling_invariance(
                restyled.content, clean.content, subject, config.temperature_invariance, group_size
            )

        factor = {name: getattr(weights, name) for name in terms} | {"mftd": plan.mftd, "siqc": plan.siqc}
        return Losses(sum_of([factor[name] * term for name, term in terms.items()]), terms)

    # Student

    def _masked(self, student: MeDUET, batch: StepBatch, draws: StepDraws) -> Losses:
        """Masked autoencoding: what is not hidden is encoded alone, and everything predicted from it."""
        visible = ~draws.exchanged
        features = student.encoder.forward_visible(student.embed_latents(batch.latents, visible), visible)
        (decoded,) = self._decode(student, [(student.factors(batch.latents, features), visible)])
        terms = self._reconstruction(student, batch, [decoded], [visible])
        return Losses(
            sum_of([getattr(self.config.weights, name) * term for name, term in terms.items()]), terms
        )

    def _encode_mixed(
        self, student: MeDUET, batch: StepBatch, draws: StepDraws, with_restyled: bool
    ) -> tuple[Factors, Factors | None]:
        """Encode the mixtures, and the restyled scans in the same call; factors by owner."""
        b = len(batch.latents)
        latents = batch.latents
        if with_restyled and batch.restyled is not None:
            latents = torch.cat([latents, batch.restyled])
        tokens = student.seen_tokens(latents)  # mixed first: an embedding may look at neighbours
        mixed = mix_tokens(tokens[:b], draws.partner, draws.exchanged)
        features: Tensor = student.encoder(student.embed_tokens(torch.cat([mixed, tokens[b:]])))
        features = torch.cat([unmix_tokens(features[:b], draws.partner, draws.exchanged), features[b:]])
        factors = student.factors(latents, features)
        return factors[:b], factors[b:] if with_restyled else None

    def _decode(self, network: FactorNetwork, streams: list[tuple[Factors, Tensor]]) -> list[Tensor]:
        """Standardised tokens of each stream (factors, visible), in one call."""
        factors = _stack([f for f, _ in streams])
        visible = torch.cat([v for _, v in streams])
        return list(network.predict_tokens(factors, visible).chunk(len(streams)))

    def _reencode(self, network: FactorNetwork, decoded: list[Tensor]) -> list[Factors]:
        """Factors of each decoded volume, in one call."""
        if not decoded:
            return []
        factors = network.encode(network.tokens_to_latents(torch.cat(decoded)))
        return _split(factors, len(decoded))

    def _reconstruction(
        self, student: MeDUET, batch: StepBatch, decoded: list[Tensor], visible: list[Tensor]
    ) -> dict[str, Tensor]:
        """Squared error of both streams, hidden and visible positions apart, in units of the latent scale."""
        target = student.target_tokens(batch.latents)
        error = torch.cat([squared_distance(tokens, target) for tokens in decoded])
        shown, weights = torch.cat(visible), self.config.weights
        terms = {}
        if weights.reconstruction:
            terms["reconstruction"] = hidden_mean(error, ~shown)
        if weights.visible_reconstruction:
            terms["visible_reconstruction"] = hidden_mean(error, shown)
        return terms

    def _sites(
        self, student: MeDUET, batch: StepBatch, own: Factors, visible: list[Tensor], reversal: float
    ) -> dict[str, Tensor]:
        """Cross-entropy of the site, read from the pooled factors of each half."""
        terms, labels = {}, batch.site.repeat(2)
        if self.config.weights.site_adversary:
            content = torch.cat([_mean_visible(own.content, v) for v in visible])
            logits = student.site_from_content(reverse_gradient(content, reversal))
            terms["site_adversary"] = F.cross_entropy(logits.float(), labels)
        if self.config.weights.site_from_style:
            logits = student.site_from_style(torch.cat([_mean_visible(own.style, v) for v in visible]))
            terms["site_from_style"] = F.cross_entropy(logits.float(), labels)
        return terms

    # Teacher

    @torch.no_grad()
    def _teach(
        self, teacher: Teacher, batch: StepBatch, draws: StepDraws, plan: _Plan, swap_visible: list[Tensor]
    ) -> tuple[Factors | None, list[tuple[Factors, Tensor | None]]]:
        """The teacher's factors of the clean scans, and SiQC's keys; every pass at most once."""
        network, b = teacher.network, len(batch.latents)
        answers = [batch.restyled] if plan.siqc and batch.restyled is not None else []
        decodes = bool(plan.siqc) and not answers
        needs_clean = bool(plan.mftd or plan.invariance or answers)
        whole = [batch.latents, *answers] if needs_clean else []
        mixed = [batch.latents] if decodes else []
        if not whole + mixed:
            return None, []
        latents = torch.cat(whole + mixed)
        tokens = network.seen_tokens(latents)
        if decodes:  # its mixtures complement the student's
            tokens = torch.cat([tokens[:-b], mix_tokens(tokens[-b:], draws.partner, ~draws.exchanged)])
        features: Tensor = network.encoder(network.embed_tokens(tokens))
        if decodes:
            features = torch.cat(
                [features[:-b], unmix_tokens(features[-b:], draws.partner, ~draws.exchanged)]
            )
        views = _split(network.factors(latents, features), len(whole + mixed))
        clean = views[0] if needs_clean else None
        if not decodes:
            return clean, [(view, None) for view in views] if answers else []
        own = views[-1]
        swapped = Factors(own.content, own.style[draws.partner])
        decoded = self._decode(network, [(swapped, ~visible) for visible in swap_visible])
        keys: list[tuple[Factors, Tensor | None]] = [(own, draws.exchanged), (own, ~draws.exchanged)]
        return clean, [*keys, *((f, None) for f in self._reencode(network, decoded))]

    def _siqc(
        self,
        queries: list[tuple[Factors, Tensor | None]],
        keys: list[tuple[Factors, Tensor | None]],
        batch: StepBatch,
        draws: StepDraws,
        subject: Tensor,
        group_size: int | None,
    ) -> Tensor:
        """Content must find its subject, style its site. The first two queries are halves, the others swaps.

        Without restyled scans, keys are the teacher's own halves and swaps, as published, and the key made as
        the query was is excluded. With them, keys are the scans and their restylings: the answer of the swap
        is known, the teacher decodes nothing, and nothing is excluded. Groups have keys of their own.
        """
        partner_site = batch.site[draws.partner]
        swaps = len(queries) - 2
        query_site = torch.cat([batch.site, batch.site, *[partner_site] * swaps])
        if batch.restyled is None:
            own = len(queries) * (group_size or len(subject))
            key_site, excluded = query_site, torch.eye(own, dtype=torch.bool, device=query_site.device)
        else:
            restyled_site = partner_site if batch.restyled_site is None else batch.restyled_site
            key_site, excluded = torch.cat([batch.site, restyled_site]), None
        q, m = len(queries), len(keys)
        content = supervised_contrast(
            by_group(torch.cat([pool_tokens(f.content, v) for f, v in queries]), group_size, q),
            by_group(torch.cat([pool_tokens(f.content, v) for f, v in keys]), group_size, m),
            by_group(subject.repeat(q), group_size, q),
            by_group(subject.repeat(m), group_size, m),
            self.config.temperature_content,
            excluded,
        )
        style = supervised_contrast(
            by_group(torch.cat([pool_tokens(f.style, v) for f, v in queries]), group_size, q),
            by_group(torch.cat([pool_tokens(f.style, v) for f, v in keys]), group_size, m),
            by_group(query_site, group_size, q),
            by_group(key_site, group_size, m),
            self.config.temperature_style,
            excluded,
        )
        return content + style


def _check_groups(draws: StepDraws, group_size: int) -> None:
    """Raise `ValueError` unless the batch is whole groups with all partners inside."""
    size = len(draws.partner)
    if group_size < 2 or group_size % 2 or size % group_size:
        raise ValueError(
            f"Expected a batch of whole groups of an even group_size of at least 2; got {size} scans and "
            f"group_size {group_size}."
        )
    own = torch.arange(size, device=draws.partner.device) // group_size
    if bool((draws.partner // group_size != own).any()):
        raise ValueError("Expected partners inside each group; draw the step with the same group_size.")


def sum_of(terms: list[Tensor]) -> Float[Tensor, ""]:
    """Sum of scalars; raises `ValueError` when every weight is zero, as there is nothing to train."""
    if not terms:
        raise ValueError("Expected at least one positive weight in objective.weights; all are 0.")
    return torch.stack(terms).sum()


def _mean_visible(tokens: Tensor, visible: Tensor) -> Tensor:
    weight = visible.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1)


def _stack(parts: list[Factors]) -> Factors:
    return Factors(torch.cat([f.content for f in parts]), torch.cat([f.style for f in parts]))


def _split(factors: Factors, parts: int) -> list[Factors]:
    content, style = factors.content.chunk(parts), factors.style.chunk(parts)
    return [Factors(c, s) for c, s in zip(content, style, strict=True)]
