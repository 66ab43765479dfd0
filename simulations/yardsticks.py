"""What probes are to be read beside: hidden error and the neighbours' ridge, covariates, people fitted on.

A site probe at chance says little when the erasure was fitted on the very people that are probed, and a
probe above chance little when age and sex alone tell the site; so both are told, with patients per site.
Where there are label maps: Dice of the mean training label map, which reads no scan, of ridge on raw latents,
and of the same closed form on content of this network and of a random one.
What this file does not do: the probes themselves (`evaluation.py`), and words (`findings.py`).

Axes: b = scans, k = content channels, c d h w = latents.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from client.latents.labelled import LabelledScans
from federation.plan.plan import RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.probes.anatomy import anatomy_probe
from meduet_models.probes.hidden import hidden_errors
from meduet_models.probes.quick import site_probe
from simulations.downstream.evaluate import DownstreamRow, DownstreamSettings, Mode, evaluate_downstream
from simulations.downstream.report import comparisons_of
from simulations.evaluation import encode_all
from simulations.hospitals.held_out import Held

_LABEL_ROWS: tuple[Mode, ...] = ("label_map", "ridge", "random", "frozen")
_COVARIATES = ("age", "sex")
_RESAMPLES = 200
_MOST_NUMBERS = 2e8  # of the weights of a ridge per position
_BATCH = 16


def yardsticks(
    model: MeDUET, plan: RunPlan, held: Held, training: Sequence[Float[Tensor, "b c d h w"]]
) -> dict[str, float]:
    """Read beside `simulations.evaluation.measure`, whose arguments these are.

    `hidden_error`, `hidden_error_ridge` (same masks), `hidden_error_ridge_all` (every neighbour seen);
    `fitted_patients_per_site` and `fresh_patients_per_site`, of the smallest site; `site_from_<content|code>
    _fitted`, of training scans; where covariates are known and patients belong to one site each,
    `site_from_covariates` (age and sex alone) and `site_from_content_given_covariates` (content without what
    they explain linearly); `anatomy_from_content` and `anatomy_from_style` (R², mean over targets).
    """
    model.eval()
    known = torch.cat(list(training))
    names = [f"{site}/{i}" for site, own in enumerate(training) for i in range(len(own))]
    sites = [site for site, own in enumerate(training) for _ in range(len(own))]
    hidden = hidden_errors(model, known, names, held.latents, plan.seed)
    measured = {
        "hidden_error": hidden.network,
        "hidden_error_ridge": hidden.neighbours,
        "hidden_error_ridge_all": hidden.all_neighbours,
        "fitted_patients_per_site": float(min(len(own) for own in training)),
        "fresh_patients_per_site": _fewest(held),
    }
    content, style = _pooled(model, held.latents)
    if sum(len(own) > 0 for own in training) > 1:
        fitted, _ = _pooled(model, known)
        measured["site_from_content_fitted"] = site_probe(fitted, sites, names, plan.seed).score
        if model.has_content_code:
            with torch.inference_mode():
                codes = torch.cat([model.content_code(chunk) for chunk in torch.split(known, _BATCH)])
            measured["site_from_code_fitted"] = site_probe(codes, sites, names, plan.seed).score
    if len(set(held.site)) > 1 and not held.paired:
        measured |= _beside_covariates(content, held, plan.seed)
    if len(set(held.patient)) > 2:
        for factor, features in (("content", content), ("style", style)):
            read = anatomy_probe(features, held.anatomy, held.patient, plan.seed)
            if bool((found := ~torch.isnan(read)).any()):
                measured[f"anatomy_from_{factor}"] = float(read[found].mean())
    return measured


@dataclass(frozen=True)
class LabelRows:
    """Segmentation in closed form, with every label of the training patients."""

    dice: dict[str, float]
    """By mode."""
    rows: list[DownstreamRow]


def label_rows(
    model: MeDUET, plan: RunPlan, learn: LabelledScans, test: LabelledScans, classes: int
) -> LabelRows | None:
    """Fit on the scans to learn from, measure on the others; None where the weights of a ridge for every
    place would not fit into memory."""
    if learn.answers[0].numel() * classes * min(len(learn), plan.network.width) > _MOST_NUMBERS:
        return None
    settings = DownstreamSettings(
        task="segmentation",
        classes=classes,
        spacing_mm=plan.volumes.spacing_mm,
        label_shares=(1.0,),
        modes=_LABEL_ROWS,
        bootstrap=_RESAMPLES,
        plan_seed=plan.seed,
    )
    none = learn.rows([])
    evaluated = evaluate_downstream(model, learn, none, {"seen": test}, settings, plan.seed).rows
    main = [row for row in evaluated if row.resamples]
    return LabelRows({row.mode: row.value for row in main}, main)


def told_of_labels(found: LabelRows) -> Mapping[str, object]:
    """As JSON values: Dice by mode, and every comparison with a yardstick that has a value."""
    compared = [one for one in comparisons_of(found.rows) if math.isfinite(one.low + one.high)]
    dice = {mode: value for mode, value in found.dice.items() if math.isfinite(value)}
    return {"dice": dice, "comparisons": [asdict(one) for one in compared]}


@torch.inference_mode()
def _pooled(model: MeDUET, latents: Tensor) -> tuple[Tensor, Tensor]:
    factors = encode_all(model, latents)
    return model.erased(factors.content).mean(1), factors.style.mean(1)


def _fewest(held: Held) -> float:
    """Patients of the site that has fewest."""
    return float(min(Counter(site for site, _ in set(zip(held.site, held.patient, strict=True))).values()))


def _beside_covariates(content: Float[Tensor, "b k"], held: Held, seed: int) -> dict[str, float]:
    """Site from age and sex alone, and from content without what they explain."""
    columns = [held.anatomy_names.index(name) for name in _COVARIATES if name in held.anatomy_names]
    known = held.anatomy[:, columns].double()
    rows = (~torch.isnan(known).any(1)).nonzero()[:, 0].tolist()
    sites = [held.site[row] for row in rows]
    if not columns or len(set(sites)) < 2:
        return {}
    patients, known = [held.patient[row] for row in rows], known[rows]
    design = torch.cat([known - known.mean(0), torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    own = content[rows].double()
    left = own - design @ torch.linalg.lstsq(design, own, driver="gelsd").solution
    return {
        "site_from_covariates": site_probe(known, sites, patients, seed).score,
        "site_from_content_given_covariates": site_probe(left, sites, patients, seed).score,
    }
