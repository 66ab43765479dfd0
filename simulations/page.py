"""The page of a run: one self-contained HTML file, made from what the run left in its folder.

Reads plan.json, metrics.json, versions.json, figures/*.png and each hospital's tables and journal; can be
made again at any time. It trains nothing and measures nothing.
"""

import base64
import csv
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from federation.plan.plan import RunPlan
from federation.plan.privacy_plan import PrivacyPlan
from federation.summed_noise import colluding
from privacy.accounting import Epsilon
from server.promises import made_with_canaries
from simulations.findings import about_content, findings_of
from simulations.generation.page import generation_part
from simulations.report.figures import draw_losses, draw_probes, draw_traffic, human_bytes
from storage.files import write_whole

_TEMPLATE = Path(__file__).with_name("page.html")
_PROBES = (
    ("site_from_content", "hospital from content"),
    ("site_from_content_mlp", "… by an MLP"),
    ("site_from_style", "hospital from style"),
    ("patient_from_content", "patient from content"),
    ("site_from_code", "hospital from content code"),
    ("patient_from_code", "patient from content code"),
    ("patient_from_style", "patient from style"),
    ("style_gap_closed", "style gap closed"),
    ("counterfactual_ratio", "error against truth"),
    ("reconstruction_error", "reconstruction error"),
)
_BESIDE = (
    ("hidden_error", "error at hidden tokens (1: nothing learned)"),
    ("hidden_error_ridge", "… of a ridge from the visible neighbours"),
    ("hidden_error_ridge_all", "… of a ridge from all 26 neighbours"),
    ("anatomy_from_content", "anatomy from content (R²)"),
    ("anatomy_from_style", "anatomy from style (R²)"),
    ("site_from_content_fitted", "hospital from content, people the erasure was fitted on"),
    ("site_from_content", "hospital from content, fresh people"),
    ("site_from_code_fitted", "hospital from content code, people the erasure was fitted on"),
    ("site_from_code", "hospital from content code, fresh people"),
    ("fitted_patients_per_site", "people fitted on at the smallest hospital"),
    ("fresh_patients_per_site", "fresh people at the smallest hospital"),
    ("site_from_covariates", "hospital from age and sex alone"),
    ("site_from_content_given_covariates", "hospital from content without what age and sex explain"),
    ("chance_site", "hospital by guessing"),
)
_LABEL_ROWS = {
    "label_map": "mean training label map (reads no scan)",
    "ridge": "ridge on raw latents, own token",
    "random": "ridge on content of a random encoder",
    "frozen": "ridge on content of this network",
}
_FEDERATED = (
    ("site_from_content", "hospital from content", "site_from_content"),
    ("site_from_style", "hospital from style", "site_from_style"),
    ("patient_from_content_within_site", "patient from content, among own", "patient_from_content"),
    ("patient_from_style_within_site", "patient from style, among own", "patient_from_style"),
    ("style_gap_closed", "style gap closed", "style_gap_closed"),
    ("content_through_style", "content predicted by style (R²)", "content_through_style"),
    ("anatomy_from_content", "anatomy from content (R²)", "anatomy_from_content"),
    ("anatomy_from_style", "anatomy from style (R²)", "anatomy_from_style"),
)
"""What hospitals read together from sums: its name there, its label, and its name among the observer's."""
_END, _WITH_HELD_OUT = "end", "end, with those held out"
_PROMISE = (
    "Releases of this run are bounded, not differentially private: each is clipped to its bound and entered "
    "in the hospital's ledger with epsilon = infinity. Who sees the updates may learn about the patients "
    "behind them."
)


def write_page(folder: Path, hospitals_text: str, held_out: Sequence[str] = ()) -> Path:
    """Write `report.html` into `folder`; `hospitals_text` says in one sentence where the scans come from,
    `held_out` which hospitals took no part.
    """
    plan = RunPlan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    rounds: list[dict[str, Any]] = metrics["rounds"]
    figures = folder / "figures"
    hospitals = [_hospital(folder, site) for site in plan.participants]
    probed = [entry for entry in rounds if entry.get("probes")]
    last = metrics["final"]
    names = [(key, label) for key, label in _PROBES if key in last]
    swaps = [path for site in (*plan.sites, *held_out) if (path := figures / f"swap-{site}.png").is_file()]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template(_TEMPLATE.name).render(
        plan=plan,
        summary=_summary(plan, hospitals, hospitals_text, held_out),
        findings=findings_of(last),
        beside=_beside(last),
        tiles=_tiles(plan, rounds, hospitals, last),
        swaps=[{"data": _embed(path), "caption": _caption(path)} for path in swaps],
        swap_text=_swap_text(last),
        probes=_embed(draw_probes(rounds, figures / "probes.png")) if "chance_site" in last else None,
        probe_names=["round", *(about_content(label, last) for _, label in names)],
        probe_rows=[
            [label, *(f"{probes[key]:.2f}" if key in probes else "" for key, _ in names)]
            for label, probes in [
                *((str(e["round"]), e["probes"]) for e in probed),
                (_END, last),
                *([(_WITH_HELD_OUT, last["with_held_out"])] if last.get("with_held_out") else []),
            ]
        ],
        generation=generation_part(folder),
        erasure_text=erasure_text(metrics.get("erasure") or {}),
        federated=_federated(metrics, last),
        held_out=f"{last.get('scans', 0):.0f} scans of {last.get('patients', 0):.0f} patients",
        losses=_embed(draw_losses(rounds, figures / "losses.png")),
        traffic=_embed(draw_traffic(_traffic(folder, rounds, hospitals), figures / "traffic.png")),
        crossed=[row for hospital in hospitals for row in _crossed(folder, hospital["site"])],
        promise_text=_promise(plan, metrics),
        hospitals=hospitals,
        facts=_facts(plan, versions, last),
        plan_text=json.dumps(json.loads(plan.to_json()), indent=2),
        versions_text=json.dumps(versions, indent=2),
    )
    target = folder / "report.html"
    write_whole(target, page)
    return target


def _promise(plan: RunPlan, metrics: Mapping[str, Any]) -> str:
    """What is promised to each patient."""
    if plan.privacy is None:
        return _PROMISE + plan.latent_policy.page
    told = metrics["survey"]["privacy"]
    noisy = plan.privacy.noisy
    relation = "add or remove one" if noisy is None else noisy.relation
    sums = ""
    if plan.aggregation.secure_sum:
        sums = (
            f" Steps left as secure sums: against the centre and up to {colluding(plan)} of the hospitals "
            f"together epsilon is {Epsilon(*told['epsilon_of_sums'])}, style code included."
        )
    return (
        f"Differential privacy for each patient of each hospital: epsilon {Epsilon(*told['epsilon'])} at "
        f"delta {told['delta']:g} for the whole run, {relation} patient with all her scans, against "
        "everybody outside of her hospital. One style code with noise left each hospital, once; the network "
        f"was trained on {plan.privacy.public_scans} phantoms{_then(plan.privacy, metrics)}."
        f"{sums} {told['promise']} {made_with_canaries(plan)}{plan.latent_policy.page}"
    )


def _then(privacy: PrivacyPlan, metrics: Mapping[str, Any]) -> str:
    """What came after, where hospitals took noisy steps, and what these were worth."""
    if (noisy := privacy.noisy) is None:
        return ""
    worth = next(entry["signal_to_noise"] for entry in metrics["rounds"] if "signal_to_noise" in entry)
    return (
        f", then in {noisy.steps} steps at each hospital on its patients, with noise in each: the signal of "
        f"a step was expected to be {worth:.3f} of its noise"
    )


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _caption(path: Path) -> str:
    return f"A patient of {path.stem.removeprefix('swap-')}: sagittal, coronal and axial middle slices."


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _hospital(folder: Path, site: str) -> dict[str, Any]:
    scans = _rows(folder / "sites" / site / "cohort.csv")
    excluded = Counter(row["reason"] for row in _rows(folder / "sites" / site / "exclusions.csv"))
    splits = {split: {r["patient"] for r in scans if r["split"] == split} for split in _SPLITS}
    return {
        "site": site,
        "patients": len({row["patient"] for row in scans}),
        "scans": len(scans),
        "splits": " / ".join(str(len(splits[split])) for split in _SPLITS),
        "excluded": sum(excluded.values()),
        "reasons": ", ".join(f"{reason.replace('_', ' ')} ({n})" for reason, n in excluded.most_common())
        or "none",
    }


_SPLITS = ("train", "validation", "test")


def _journal(folder: Path, site: str) -> list[dict[str, Any]]:
    lines = (folder / "sites" / site / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if "sha256" in (record := json.loads(line)["record"])]


def _crossed(folder: Path, site: str) -> list[dict[str, str]]:
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in _journal(folder, site):
        by_kind[record["kind"]].append(record)
    words = {
        "survey": "style statistics (sums over patients)",
        "demographics": "patients by age and sex, in whole cohorts",
        "audit_counts": "counts of the site's own audit, in whole cells",
        "style_code": "a style code (one noised sum over patients)",
        "private_round": "update of the weights that noisy steps train (weighted sum)",
        "round": "content branch update (weighted sum)",
        "sum_keys": "fresh keys for a secure sum",
        "sum_shares": "shares of keys, encrypted for each of the others",
        "sum_unmask": "shares that open the sum of all",
        "erasure": "the sum of content codes",
        "probe": "sums of content, style and anatomy, per fold",
        "probe_hits": "counts of a fitted probe's hits",
        "finetuning": "update of a network trained with labels (weighted sum)",
        "latents": "raw latents of training scans: PATIENT DATA",
        "synthetic_latents": "samples of a model trained with noise",
        "latent_moments": "moments of latents (one noised sum over patients)",
        "diffusion": "update of the diffusion model (weighted sum)",
    }
    return [
        {
            "site": site,
            "what": words.get(kind, kind) + (", masked" if "masked" in records[0] else ""),
            "times": _times(records),
            "bytes": human_bytes(sum(r["bytes"] for r in records)),
            "norm": f"{max(r['norm_after'] for r in records):.3g}",
            "bound": f"{records[0]['bound']:.3g}"
            + (" a patient" if "enters release" in records[0].get("noise", "") else "")
            + (" (clipped)" if any(r["clipped"] for r in records) else ""),
            "noise": _noise(records[0]),
        }
        for kind, records in by_kind.items()
    ]


def _noise(record: Mapping[str, Any]) -> str:
    """The noise in a release, by its line of the journal; keys and shares of a secure sum tell of none."""
    said = record.get("noise", "nowhere")
    return "none" if "nowhere" in said else str(said).partition(": ")[2]


def _times(records: list[dict[str, Any]]) -> str:
    """How many releases, and how many of them answered a question that was asked again."""
    if records[0]["kind"] == "latents":  # a round's latents leave in several parts
        return str(len(records))
    again = len(records) - len({(record["plan"], record["round"]) for record in records})
    return f"{len(records)} ({again} asked again)" if again else str(len(records))


def _traffic(
    folder: Path, rounds: list[dict[str, Any]], hospitals: list[dict[str, Any]]
) -> Mapping[str, int]:
    site = hospitals[0]["site"]
    crossed = {record["kind"]: record["bytes"] for record in _journal(folder, site)}
    entry = rounds[-1]["sites"].get(site, {"bytes_down": 0, "bytes_up": 0})  # with privacy none is asked
    kept = sum(p.stat().st_size for p in (folder / "sites" / site / "cache").rglob("*") if p.is_file())
    sizes = {
        "style statistics, once": crossed.get("survey", 0) + crossed.get("style_code", 0),
        "code sums, once": crossed.get("erasure", 0),
        "latents with noise, once": crossed.get("synthetic_latents", 0) + crossed.get("latent_moments", 0),
        "to the hospital, each round": entry["bytes_down"],
        "from the hospital, each round": entry["bytes_up"],
        ("its latents, in its cache" if "latents" in crossed else "its latents: never leave"): kept,
    }
    leaving = sum(r["bytes"] for r in _journal(folder, site) if r["kind"] == "latents")
    sizes["raw latents, released"] = leaving
    return {name: size for name, size in sizes.items() if size}


def _summary(
    plan: RunPlan, hospitals: list[dict[str, Any]], hospitals_text: str, held_out: Sequence[str]
) -> str:
    patients = sum(h["patients"] for h in hospitals)
    method = {
        "content_share": "share the content branch and tell each other their style",
        "fedavg": "average every weight (FedAvg)",
        "fedprox": "average every weight (FedProx)",
        "fedbn": "average every weight but the norm layers (FedBN)",
        "alone": "train alone",
        "pooled": "are pooled in one place, an upper bound that no consortium may run, and",
    }.get(plan.aggregation.method, f"work by the method {plan.aggregation.method}")
    if plan.privacy is not None:
        method = "tell one style each, with noise; the centre trains on phantoms in these styles"
        if plan.privacy.noisy is not None:
            method += f", then they take {plan.privacy.noisy.steps} noisy steps on their patients"
            if plan.privacy.level == "adapters":
                method += ", of the output layer alone"
    steps = f"{plan.training.rounds} rounds of {plan.training.steps_per_round} steps"
    apart = f" Held out, and never asked anything: {', '.join(held_out)}." if held_out else ""
    return f"{hospitals_text} {len(plan.sites)} hospitals with {patients} patients {method}: {steps}.{apart}"


def _tiles(
    plan: RunPlan, rounds: list[dict[str, Any]], hospitals: list[dict[str, Any]], last: Mapping[str, Any]
) -> list[dict[str, str]]:
    tiles = [
        (str(len(plan.sites)), "hospitals"),
        (str(sum(h["scans"] for h in hospitals)), plan.latent_policy.moved),
        (str(len(rounds)), "rounds"),
    ]
    tiles += [
        (f"{last[name]:.2f}", f"of the anatomy's variance told by {factor} (R²)")
        for factor in ("content", "style")
        if (name := f"anatomy_from_{factor}") in last
    ]
    if "site_from_content" in last:
        tiles.append(
            (
                f"{last['site_from_content']:.0%}",
                f"hospital read from content (chance {last['chance_site']:.0%})",
            )
        )
        tiles.append((f"{last['site_from_style']:.0%}", "hospital read from style"))
    if "patient_from_content" in last:
        chance = f"{last['chance_patient']:.0%}"
        tiles.append(
            (f"{last['patient_from_content']:.0%}", f"patients recognised by content (chance {chance})")
        )
    if "style_gap_closed" in last:
        tiles.append((f"{last['style_gap_closed']:.0%}", "of the style gap closed by a swap"))
    return [{"value": value, "label": about_content(label, last)} for value, label in tiles]


def _beside(last: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What probes are to be read beside, and Dice of closed forms; labels and values."""

    def text(name: str) -> str:
        return f"{last[name]:.0f}" if name.endswith("per_site") else f"{last[name]:.2f}"

    rows = [(about_content(label, last), text(name)) for name, label in _BESIDE if name in last]
    dice = last.get("labels", {}).get("dice", {})
    rows += [
        (f"Dice, {about_content(label, last)}", f"{dice[mode]:.3f}")
        for mode, label in _LABEL_ROWS.items()
        if mode in dice
    ]
    return rows if "hidden_error" in last else []


def _swap_text(last: Mapping[str, Any]) -> str:
    if not last:
        return "Patients of the training set: this run kept nobody for validation or test."
    text = (
        "Restyled: the scan's latents moved to another hospital's entry in the style bank, which is what a "
        "hospital trains on. Swap: the model decodes the scan's content in that hospital's style. None of "
        "these patients was trained on."
    )
    if "counterfactual_ratio" in last:
        text += (
            " Truth: the same simulated patient rendered by the other hospital's scanner. Squared error of a"
            f" swap against it, relative to doing nothing: {last['counterfactual_ratio']:.2f}."
        )
    return text


def erasure_text(erasure: Mapping[str, Any]) -> str:
    """What a run says of its site erasure; nothing where there was none."""
    if not erasure:
        return ""
    if why := erasure.get("skipped"):
        return f"The last row is the final model: {why}."
    if told_by := erasure.get("fitted_on"):
        return (
            f"The last row is the final model, after a site erasure that was fitted on {told_by} in "
            "the hospitals' styles: no patient is in it, and it takes out what such styles show, which was "
            "little where it was measured (docs/log.md)."
        )
    left = float(erasure["shift_left"])
    fewest = min(own["patients"] for own in erasure["sites"].values())
    text = (
        "The last row is the final model, after the site erasure: the hospital was taken out of content, "
        "linearly, as fitted from the hospitals' sums. Means of so few patients "
        f"({fewest} at the smallest hospital) are off: where hospitals differ much, codes of fresh people "
        f"stay {left:.1f} standard deviations apart, and a perfect linear probe would tell two hospitals in "
        f"{NormalDist().cdf(left / 2):.0%}."
    )
    if len(erasure["pooled"]) < 2:
        text += " Too few told their pooled content: tokens are erased only as far as the code shows."
    return text


def _federated(metrics: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any] | None:
    """Table of the federated probes over rounds, beside what the observer read at the end; None without."""
    readings = [
        (str(e["round"]), e["federated_probes"]) for e in metrics["rounds"] if "federated_probes" in e
    ]
    if "federated_probes" in metrics:
        readings.append((_END, metrics["federated_probes"]))
    if not readings:
        return None
    seen = [entry for entry in _FEDERATED if any(entry[0] in probes["readings"] for _, probes in readings)]

    def row(label: str, values: Mapping[str, float], names: list[str]) -> list[str]:
        return [label, *(f"{values[name]:.2f}" if name in values else "" for name in names)]

    refused = sorted({site for _, probes in readings for site in probes["refused"]})
    return {
        "names": ["round", *(about_content(label, last) for _, label, _ in seen)],
        "rows": [
            *(row(label, probes["readings"], [name for name, _, _ in seen]) for label, probes in readings),
            row("observer, held out", last, [name for _, _, name in seen]),
        ],
        "refused": f"Left out: {', '.join(refused)}." if refused else "",
    }


def _facts(plan: RunPlan, versions: Mapping[str, Any], last: Mapping[str, Any]) -> list[tuple[str, str]]:
    heads = []
    if "alignment" in last:
        verdict = (
            "passed" if last["alignment_passed"] else "failed: no style token may be used at another site"
        )
        heads = [("style heads agree", f"{last['alignment']:.2f} of 1 at the worst pair of sites; {verdict}")]
    return [
        *heads,
        ("command", versions["command"]),
        ("plan", plan.sha256),
        ("seed", str(plan.seed)),
        ("tokenizer", plan.tokenizer_sha256),
        ("final weights", versions.get("model_sha256", "")),
        ("code", versions["fedmeduet"]),
    ]
