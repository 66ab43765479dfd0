"""What an observer who sees every hospital measures: fresh probes, recognition, swaps, pictures.

Only a simulation can do this: scans of several hospitals sit side by side here. Measured on patients that
trained nothing; where patients were rendered by every scanner (phantoms), against the truth.

Does not do: train, or send anything. A consortium's own federated measures come from sums (`probes.py`).

Axes: b = scans, n = tokens, s = style channels, c d h w = latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from federation.plan import RunPlan
from federation.survey import survey_layout
from meduet_models.factors import Factors
from meduet_models.meduet import MeDUET
from meduet_models.probes import (
    counterfactual_ratio,
    retrieval_across_sites,
    site_probe,
    style_gap_closed,
)
from meduet_models.style import StyleEntry, StyleMoments, restyle

_BATCH = 16


@dataclass(frozen=True)
class Held:
    """Scans that trained nothing, one row each."""

    latents: Float[Tensor, "b c d h w"]
    """Their latents."""
    site: tuple[int, ...]
    """Hospital whose scanner made each."""
    patient: tuple[str, ...]
    """Patient of each; the same name at two sites means the same anatomy on both scanners."""

    @property
    def paired(self) -> bool:
        """Whether patients were scanned at more than one site."""
        return len(set(self.patient)) < len(set(zip(self.patient, self.site, strict=True)))

    def rows(self, site: int) -> list[int]:
        """Rows of a site, by patient."""
        return sorted((i for i, s in enumerate(self.site) if s == site), key=lambda i: self.patient[i])


@torch.inference_mode()
def encode_all(model: MeDUET, latents: Float[Tensor, "b c d h w"]) -> Factors:
    """Factors of many scans, in batches."""
    parts = [model.encode(chunk) for chunk in torch.split(latents, _BATCH)]
    return Factors(torch.cat([p.content for p in parts]), torch.cat([p.style for p in parts]))


@torch.inference_mode()
def mean_style(model: MeDUET, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "n s"]:
    """A hospital's style as tokens: the mean over its scans."""
    return encode_all(model, latents).style.mean(0)


@torch.inference_mode()
def swap(
    model: MeDUET, latents: Float[Tensor, "b c d h w"], style: Float[Tensor, "n s"]
) -> Float[Tensor, "b c d h w"]:
    """The content of these scans in another style."""
    decoded = []
    for chunk in torch.split(latents, _BATCH):
        content = model.encode(chunk).content
        decoded.append(model.decode(Factors(content, style.expand(len(chunk), -1, -1))))
    return torch.cat(decoded)


def measure(
    model: MeDUET,
    plan: RunPlan,
    held: Held,
    training: Sequence[Float[Tensor, "b c d h w"]],
    thorough: bool = False,
) -> dict[str, float]:
    """Probe `model` on `held`; `training` are some training latents of each site, for its style tokens.
    `thorough` is for readings that take longer; there are none in this version.

    Keys: `scans`, `patients` (how many were measured on); `site_from_content`, `site_from_content_mlp`,
    `site_from_style` (balanced accuracy), `chance_site`; `patient_from_content`, `patient_from_style`
    (top-1), `chance_patient`, across scanners where patients were scanned at several sites, else between a
    scan and its restylings; `style_gap_closed` (mean over pairs of sites), `reconstruction_error` (relative
    to the latents' variance), and `counterfactual_ratio` (0 is the truth, 1 did nothing) where there is one.
    """
    model.eval()
    content, style = _pooled(model, held.latents)
    measured = {"scans": float(len(held.site)), "patients": float(len(set(held.patient)))}
    if len(set(held.site)) > 1:
        linear = site_probe(content, held.site, held.patient, plan.seed)
        measured |= {
            "site_from_content": linear.score,
            "site_from_content_mlp": site_probe(content, held.site, held.patient, plan.seed, "mlp").score,
            "site_from_style": site_probe(style, held.site, held.patient, plan.seed).score,
            "chance_site": linear.chance,
        }
        seen = held if held.paired else _restyled(plan, held, training)
        if seen is not held:
            content, style = _pooled(model, seen.latents)
        recognised = retrieval_across_sites(content, seen.site, seen.patient)
        measured |= {
            "patient_from_content": recognised.score,
            "patient_from_style": retrieval_across_sites(style, seen.site, seen.patient).score,
            "chance_patient": recognised.chance,
        }
    return measured | _swaps(model, plan, held, [mean_style(model, own) for own in training])


@torch.inference_mode()
def _pooled(
    model: MeDUET, latents: Float[Tensor, "b c d h w"]
) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b s"]]:
    """Pooled content and style of many scans."""
    chunks = torch.split(latents, _BATCH)
    content = torch.cat([model.pooled_content(chunk) for chunk in chunks])
    return content, torch.cat([model.pooled_style(chunk) for chunk in chunks])


def _restyled(plan: RunPlan, held: Held, training: Sequence[Float[Tensor, "b c d h w"]]) -> Held:
    """Each held-out scan in the style of every site; a row's site is whose style it wears."""
    entries = [_entry(plan, latents) for latents in training]
    rows = [
        (restyle(held.latents[i : i + 1], entries[own], entry), target, held.patient[i])
        for i, own in enumerate(held.site)
        for target, entry in enumerate(entries)
    ]
    latents, sites, patients = zip(*rows, strict=True)
    return Held(torch.cat(latents), sites, patients)


def _swaps(
    model: MeDUET, plan: RunPlan, held: Held, styles: Sequence[Float[Tensor, "n s"]]
) -> dict[str, float]:
    gaps, ratios, errors = [], [], []
    sites = sorted(set(held.site))
    for a in sites:
        source = held.latents[held.rows(a)]
        patients = [held.patient[i] for i in held.rows(a)]
        rebuilt = swap(model, source, styles[a])
        errors.append(float((rebuilt - source).square().mean() / source.var()))
        for b in sites:
            if a == b:
                continue
            swapped = swap(model, source, styles[b])
            truth = held.latents[held.rows(b)]
            entries = [_entry(plan, x) for x in (swapped, source, truth)]
            gaps.append(style_gap_closed(*(e.to_vector() for e in entries)))
            if held.paired and patients == [held.patient[i] for i in held.rows(b)]:
                ratios.append(counterfactual_ratio(swapped, source, truth))
    measured = {"reconstruction_error": sum(errors) / len(errors)}
    if gaps:
        measured["style_gap_closed"] = sum(gaps) / len(gaps)
    if ratios:
        measured["counterfactual_ratio"] = sum(ratios) / len(ratios)
    return measured


def _entry(plan: RunPlan, latents: Float[Tensor, "b c d h w"]) -> StyleEntry:
    layout = survey_layout(plan)
    patients = [str(i) for i in range(len(latents))]
    return StyleMoments.of(latents, patients, layout).entry()


def load_model(plan: RunPlan, tensors: Mapping[str, Tensor]) -> MeDUET:
    """The network of `plan` with these weights; raises `ValueError` when a tensor is missing or unknown."""
    model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    expected = set(model.state_dict())
    if odd := sorted(expected ^ set(tensors)):
        raise ValueError(f"Expected the weights of this plan's network; they differ in {odd[0]!r}.")
    model.load_state_dict(dict(tensors))
    return model.eval()
