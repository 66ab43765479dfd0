"""Hospitals: from three kinds of plan to one folder of ordinary scans per hospital.

`phantoms` makes patients and scans them (`phantom_hospitals.py`). `folders` takes real hospitals as they lie
on disk, or the sites that a BIDS `participants.tsv` names. `split` divides one folder (`split_hospitals.py`).
Original scans are never copied or changed: where hospitals share a folder, each gets a manifest that points
into it. What the simulator knows and a hospital would not (the truth) lies outside the hospitals' folders.
"""

import re
from pathlib import Path

from client.scans.layouts import Candidate, LayoutRules, survey
from simulations.hospitals.manifests import write_left_out, write_manifest
from simulations.hospitals.phantom import Progress, make_phantoms
from simulations.hospitals.plans import (
    FolderHospitals,
    Hospital,
    HospitalsPlan,
    PhantomHospitals,
    SplitHospitals,
    hospital_names,
    hospitals_plan,
)
from simulations.hospitals.split import make_split

__all__ = [
    "FolderHospitals",
    "Hospital",
    "HospitalsPlan",
    "PhantomHospitals",
    "SplitHospitals",
    "hospitals_plan",
    "make_hospitals",
]


def make_hospitals(plan: HospitalsPlan, folder: Path, progress: Progress | None = None) -> list[Hospital]:
    """Make the consortium below `folder`; what is there and matches the plan is kept, the rest made anew.

    Raises `ValueError` when the plan cannot be carried out on what is on disk.
    """
    match plan:
        case PhantomHospitals():
            return make_phantoms(plan, folder, progress)
        case FolderHospitals():
            return _sites(plan, folder) if plan.by else _folders(plan)
        case SplitHospitals():
            return make_split(plan, folder, progress)


def _folders(plan: FolderHospitals) -> list[Hospital]:
    root = Path(plan.root)
    if not root.is_dir():
        raise ValueError(f"Expected a folder with one folder per hospital; {root} is not a folder.")
    if (root / "participants.tsv").is_file() or (root / "dataset_description.json").is_file():
        raise ValueError(
            f"Expected one folder per hospital in {root}; it is one BIDS data set. Set hospitals.by to the "
            "column of participants.tsv that names the site."
        )
    found = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise ValueError(f"Expected one folder per hospital in {root}; it has no folders.")
    names = hospital_names([_slug(p.name) for p in found], len(found))
    return [Hospital(name, p, "auto") for name, p in zip(names, found, strict=True)]


def _sites(plan: FolderHospitals, folder: Path) -> list[Hospital]:
    root = Path(plan.root)
    rules = LayoutRules(patient_pattern=plan.patient_pattern, label_pattern=plan.label_pattern)
    found = survey(root, "bids", rules)
    candidates, exclusions = found.candidates, found.exclusions
    by_site: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        site = candidate.covariates.get(plan.by)
        if site is None or site == "":
            columns = sorted({name for c in candidates for name in c.covariates})
            raise ValueError(
                f"Expected participants.tsv to name the site of every scan in column {plan.by!r}; patient "
                f"{candidate.patient!r} has none. Columns: {', '.join(columns)}."
            )
        by_site.setdefault(_hospital_of(str(site), plan), []).append(candidate)
    if not by_site:
        raise ValueError(f"Expected scans in {root}; found none.")
    sites = sorted(by_site)
    hospitals = []
    for name, site in zip(hospital_names([_slug(s) for s in sites], len(sites)), sites, strict=True):
        write_manifest(folder / name / "manifest.csv", by_site[site])
        hospitals.append(Hospital(name, folder / name, "manifest"))
    write_left_out(folder, root, exclusions)
    return hospitals


def _hospital_of(site: str, plan: FolderHospitals) -> str:
    if not plan.groups:
        return site
    for hospital, members in plan.groups.items():
        if site in members:
            return hospital
    raise ValueError(f"Expected every site in one of hospitals.groups; {site!r} is in none.")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-.")
