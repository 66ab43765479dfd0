"""What an observer who sees every hospital measures: fresh probes, recognition, anatomy, swaps.

Only a simulation can do this: scans of several hospitals sit side by side here. Measured on patients that
trained nothing; where patients were rendered by every scanner (phantoms), against the truth. `thorough` is
for tables: nested cross-validation with a permutation null, spatial features, anatomy, leakage.

Does not do: train, or send anything. A consortium's own federated measures come from sums
(`meduet_models/probes/sums.py`, `server/exchanges/probes.py`).

Axes: b = scans, n = tokens, k = content channels, s = style channels, c d h w = latents.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.content_code import erase_own_site
from meduet_models.factors import Factors
from meduet_models.meduet import MeDUET, layer_normed
from meduet_models.probes.anatomy import anatomy_probe, content_through_style
from meduet_models.probes.nested import nested_site_probe, token_features
from meduet_models.probes.quick import site_probe
from meduet_models.probes.recognition import recognition_among_all, retrieval_across_sites
from meduet_models.probes.swap_fidelity import (
    counterfactual_ratio,
    match_histogram,
    psnr_db,
    quantiles,
    style_gap_closed,
)
from meduet_models.style.moments import StyleEntry, StyleMoments, restyle
from meduet_models.tokenizer.tokenizer import Tokenizer
from simulations.hospitals.held_out import Held

_BATCH = 16
_PROBES: tuple[Literal["linear", "mlp"], ...] = ("linear", "mlp")


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
    tokenizer: Tokenizer | None = None,
) -> dict[str, float]:
    """Probe `model` on `held`; `training[i]` are some training latents of site i, for its style tokens.

    There may be more sites than in the plan (a hospital that was held out or joined late). Keys: `scans`,
    `patients` (how many were measured on); `site_from_content`, `site_from_content_mlp`, `site_from_style`
    (balanced accuracy), `chance_site`; `patient_from_content`, `patient_from_style` (top-1),
    `chance_patient`, across scanners where patients were scanned at several sites, else between a scan and
    its restylings; `style_gap_closed` (mean over pairs of sites), `reconstruction_error` (relative to the
    latents' variance), and `counterfactual_ratio` (0 is the truth, 1 did nothing) where there is one; with a
    `tokenizer` also `counterfactual_psnr` of our swap, `counterfactual_psnr_identity` of doing nothing and
    `counterfactual_psnr_histogram` of histogram matching (dB, on decoded volumes). Where a content code was
    fitted, `site_from_code`, `site_from_code_mlp` and `patient_from_code` are the same readings of it; a site
    that is not in the plan is erased from its codes by its own training scans (`erase_own_site`).

    `thorough` adds `nested_site_from_<factor>_<features>_<probe>` with `_p` (p-value) and `_null` (95th
    percentile of the null), features mean, deviation (mean and deviation over tokens), tokens or code, probe
    linear or mlp; `patient_from_<factor>_among_all` and `chance_patient_among_all`;
    `anatomy_from_<factor>_<target>` (R² out of fold) with its mean over targets `anatomy_from_<factor>`, from
    pooled vectors, `…_tokens` from all tokens and, for the factor `code`, from the content code;
    `content_through_style` (R²).
    """
    model.eval()
    factors = _tokens(model, held.latents)
    content, style = _means(factors)
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
        pair = (content, style) if seen is held else _means(_tokens(model, seen.latents))
        recognised = retrieval_across_sites(pair[0], seen.site, seen.patient)
        measured |= {
            "patient_from_content": recognised.score,
            "patient_from_style": retrieval_across_sites(pair[1], seen.site, seen.patient).score,
            "chance_patient": recognised.chance,
        }
        if model.has_content_code:
            measured |= _code(model, plan, held, seen, training, thorough)
        if thorough:
            measured |= _nested(factors, held, plan.seed) | _among_all(pair, seen)
    if thorough and len(set(held.patient)) > 2:
        measured |= _anatomy(factors, held, plan.seed)
        measured["content_through_style"] = content_through_style(content, style, held.patient, plan.seed)
    styles = [mean_style(model, own) for own in training]
    measured |= _swaps(model, plan, held, styles)
    return measured | (_psnr(model, held, training, styles, tokenizer) if tokenizer and held.paired else {})


def _nested(factors: Factors, held: Held, seed: int) -> dict[str, float]:
    read = {
        "content": ("mean_linear", "deviation_linear", "tokens_linear", "mean_mlp"),
        "style": ("mean_linear", "deviation_linear", "tokens_linear"),
    }
    measured: dict[str, float] = {}
    for factor, tokens in (("content", factors.content), ("style", factors.style)):
        for what in read[factor]:
            features, probe = what.split("_")
            reading = nested_site_probe(
                token_features(tokens, features),  # type: ignore[arg-type]
                held.site,
                held.patient,
                seed,
                probe,  # type: ignore[arg-type]
            )
            name = f"nested_site_from_{factor}_{what}"
            measured |= {name: reading.score, f"{name}_p": reading.p_value, f"{name}_null": reading.null_95}
    return measured


@torch.inference_mode()
def _codes(
    model: MeDUET, plan: RunPlan, held: Held, training: Sequence[Float[Tensor, "b c d h w"]]
) -> Float[Tensor, "b q"]:
    """Content codes; of a site that is not in the plan, without the direction that its own scans show."""
    codes = torch.cat([model.content_code(chunk) for chunk in torch.split(held.latents, _BATCH)])
    for late in range(len(plan.sites), len(training)):
        own = torch.cat([model.content_code(chunk) for chunk in torch.split(training[late], _BATCH)])
        rows = [row for row, site in enumerate(held.site) if site == late]
        codes[rows] = codes[rows] @ erase_own_site(own, [str(i) for i in range(len(own))]).T
    return codes


def _code(
    model: MeDUET,
    plan: RunPlan,
    held: Held,
    seen: Held,
    training: Sequence[Float[Tensor, "b c d h w"]],
    thorough: bool,
) -> dict[str, float]:
    codes = _codes(model, plan, held, training)
    seen_codes = codes if seen is held else _codes(model, plan, seen, training)
    measured = {
        "site_from_code": site_probe(codes, held.site, held.patient, plan.seed).score,
        "site_from_code_mlp": site_probe(codes, held.site, held.patient, plan.seed, "mlp").score,
        "patient_from_code": retrieval_across_sites(seen_codes, seen.site, seen.patient).score,
    }
    if thorough:
        for probe in _PROBES:
            reading = nested_site_probe(codes, held.site, held.patient, plan.seed, probe)
            name = f"nested_site_from_code_{probe}"
            measured |= {name: reading.score, f"{name}_p": reading.p_value, f"{name}_null": reading.null_95}
        measured["patient_from_code_among_all"] = recognition_among_all(
            seen_codes, seen.site, seen.patient
        ).score
        read = anatomy_probe(codes, held.anatomy, held.patient, plan.seed)
        if bool((known := ~torch.isnan(read)).any()):
            measured["anatomy_from_code"] = float(read[known].mean())
            scores = zip(held.anatomy_names, read.tolist(), strict=True)
            measured |= {f"anatomy_from_code_{name}": value for name, value in scores if value == value}
    return measured


def _among_all(pair: tuple[Float[Tensor, "b k"], Float[Tensor, "b s"]], seen: Held) -> dict[str, float]:
    content, style = (recognition_among_all(values, seen.site, seen.patient) for values in pair)
    return {
        "patient_from_content_among_all": content.score,
        "patient_from_style_among_all": style.score,
        "chance_patient_among_all": content.chance,
    }


def _anatomy(factors: Factors, held: Held, seed: int) -> dict[str, float]:
    measured: dict[str, float] = {}
    for factor, tokens in (("content", factors.content), ("style", factors.style)):
        for suffix, features in (("", tokens.mean(1)), ("_tokens", tokens.flatten(1))):
            read = anatomy_probe(features, held.anatomy, held.patient, seed)
            known = ~torch.isnan(read)
            if not bool(known.any()):
                continue
            measured[f"anatomy_from_{factor}{suffix}"] = float(read[known].mean())
            for name, value in zip(held.anatomy_names, read.tolist(), strict=True):
                if value == value:
                    measured[f"anatomy_from_{factor}{suffix}_{name}"] = value
    return measured


@torch.inference_mode()
def _tokens(model: MeDUET, latents: Float[Tensor, "b c d h w"]) -> Factors:
    """Content tokens (layer-normed, erased) and layer-normed style tokens of many scans."""
    encoded = encode_all(model, latents)
    return Factors(model.erased(encoded.content), layer_normed(encoded.style))


def _means(tokens: Factors) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b s"]]:
    """Pooled content and style, from their tokens."""
    return tokens.content.mean(1), tokens.style.mean(1)


def _restyled(plan: RunPlan, held: Held, training: Sequence[Float[Tensor, "b c d h w"]]) -> Held:
    """Each held-out scan in the style of every site; a row's site is that of its target style."""
    entries = [_entry(plan, latents) for latents in training]
    rows = [
        (restyle(held.latents[i : i + 1], entries[own], entry), target, held.patient[i])
        for i, own in enumerate(held.site)
        for target, entry in enumerate(entries)
    ]
    latents, sites, patients = zip(*rows, strict=True)
    unknown = torch.zeros(len(rows), 0)
    return Held(torch.cat(latents), sites, patients, unknown, ())


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


@torch.inference_mode()
def _psnr(
    model: MeDUET,
    held: Held,
    training: Sequence[Float[Tensor, "b c d h w"]],
    styles: Sequence[Float[Tensor, "n s"]],
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """Decibels against the same patients on the other scanner: of our swap, of nothing, of histogram
    matching to the target's training scans. All decoded by the tokenizer, so it bounds none of them.
    """
    sites = sorted(set(held.site))
    own = {a: _decoded(tokenizer, held.latents[held.rows(a)]) for a in sites}
    target = {b: quantiles(_decoded(tokenizer, training[b])) for b in sites}
    found: dict[str, list[float]] = {"": [], "_identity": [], "_histogram": []}
    for a in sites:
        for b in sites:
            if a == b or [held.patient[i] for i in held.rows(a)] != [held.patient[i] for i in held.rows(b)]:
                continue
            ours = _decoded(tokenizer, swap(model, held.latents[held.rows(a)], styles[b]))
            found[""].append(psnr_db(ours, own[b]))
            found["_identity"].append(psnr_db(own[a], own[b]))
            found["_histogram"].append(psnr_db(match_histogram(own[a], target[b]), own[b]))
    return {f"counterfactual_psnr{name}": sum(v) / len(v) for name, v in found.items() if v}


def _decoded(tokenizer: Tokenizer, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b 1 D H W"]:
    return torch.cat([tokenizer.decode(chunk) for chunk in torch.split(latents, _BATCH)]).clamp(0, 1)


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
