"""What a consortium is made of, in settings: phantoms, folders of real hospitals, or one folder divided.

Read from YAML by `hospitals_plan`; carried out by `hospitals.py`. Nothing here touches the disk.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from client.scans.layouts import Layout, LayoutRules
from forms.form import build
from simulations.phantoms.patients import Population

NAMES = ("north", "harbour", "valley", "island", "forest", "castle", "market", "lake")
TRUTH = "truth"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class PhantomHospitals:
    """Hospitals whose patients are phantoms: nothing is needed but the seed."""

    num_hospitals: int = 3
    """Hospitals in the consortium."""
    names: tuple[str, ...] = NAMES
    """Their names; hospitals beyond the list are numbered."""
    patients: int = 14
    """Patients of each hospital."""
    sizes: tuple[int, ...] = ()
    """Patients of the first hospitals, one number each, in place of `patients`."""
    skew: float = 0.5
    """How different the hospitals' populations are: 0 the same, 1 about 24 years and 60 points of disease
    share between the first and the last."""
    population: Population = field(default_factory=Population)
    """The population in the middle of the skew."""
    scanners: tuple[dict[str, object], ...] = ()
    """Settings of the first hospitals' scanners, in place of drawn ones; `{}` leaves a scanner as drawn."""
    resolution_mm: Literal[1, 2, 4] = 2
    """Voxel edge of the anatomy; scanners may be coarser."""
    paired: int = 0
    """Further patients seen by every scanner, for the truth about swaps; they belong to no hospital."""
    seed: int = 0
    """Fixes every draw."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.num_hospitals < 1 or self.patients < 1 or min(self.sizes, default=1) < 1 or self.paired < 0:
            raise ValueError("Expected at least one hospital, one patient in each, and paired >= 0.")
        for what, given in (("sizes", len(self.sizes)), ("scanners", len(self.scanners))):
            if given > self.num_hospitals:
                raise ValueError(f"Expected at most {self.num_hospitals} {what}; got {given}.")
        if not 0 <= self.skew <= 1:
            raise ValueError(f"Expected skew in [0, 1]; got {self.skew}.")


@dataclass(frozen=True, kw_only=True)
class FolderHospitals:
    """Real hospitals: one folder in `root` for each, or the sites of one BIDS data set."""

    root: str
    """Folder of folders, or a BIDS data set when `by` is set."""
    by: str = ""
    """Column of the data set's `participants.tsv` that names the site; empty: one folder per hospital."""
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Sites (as the column names them) that work as one hospital, by its name; empty: each site is one. A
    site of a single patient tells nothing of its style, so small ones join; used with `by`."""
    patient_pattern: str = ""
    """Finds the patient in a scan's path (first group), where sessions of one patient have folders of their
    own; used with `by`."""
    label_pattern: str = LayoutRules.label_pattern
    """Which labels are meant, where a scan has several; used with `by`."""

    def __post_init__(self) -> None:
        """Refuse groups of nothing, and a site in two of them."""
        members = [site for sites in self.groups.values() for site in sites]
        if self.groups and not self.by:
            raise ValueError(
                "hospitals.groups joins the sites that hospitals.by names; set hospitals.by too."
            )
        if len(set(members)) < len(members) or any(not sites for sites in self.groups.values()):
            raise ValueError(
                "Expected each group of hospitals.groups to have sites, and no site in two groups."
            )


@dataclass(frozen=True, kw_only=True)
class SplitHospitals:
    """One folder of real scans divided among simulated hospitals."""

    root: str
    """Folder of scans in any layout that a hospital's folder may have."""
    num_hospitals: int = 3
    """Hospitals in the consortium."""
    names: tuple[str, ...] = NAMES
    """Their names; hospitals beyond the list are numbered."""
    by: Literal["intensity", "appearance", "random"] = "intensity"
    """`intensity`: patients whose scans lie in the same range of stored units, darkest hospital first;
    `appearance`: patients whose scans look alike after windowing (brightness, contrast, sharpness), darkest
    first; `random`: patients dealt by the seed."""
    styles_on_top: bool = False
    """Whether each hospital's scans are restyled by a simulated scanner and written anew."""
    scanners: tuple[dict[str, object], ...] = ()
    """Settings of the first hospitals' scanners, in place of drawn ones; used with `styles_on_top`."""
    patient_pattern: str = ""
    """Finds the patient in a scan's path (first group)."""
    label_pattern: str = LayoutRules.label_pattern
    """Which labels are meant, where a scan has several."""
    seed: int = 0
    """Fixes every draw."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.num_hospitals < 1:
            raise ValueError(f"Expected at least one hospital; got {self.num_hospitals}.")
        if len(self.scanners) > self.num_hospitals:
            raise ValueError(f"Expected at most {self.num_hospitals} scanners; got {len(self.scanners)}.")


HospitalsPlan = PhantomHospitals | FolderHospitals | SplitHospitals
KINDS: dict[str, type[HospitalsPlan]] = {
    "phantoms": PhantomHospitals,
    "folders": FolderHospitals,
    "split": SplitHospitals,
}


@dataclass(frozen=True)
class Hospital:
    """Where a hospital's scans are, and what only the simulator knows about them."""

    name: str
    root: Path
    """The hospital's data root."""
    layout: Layout
    """How the root is laid out."""
    truth: Path | None = None
    """Folder with `scanner.json` and one JSON per patient or scan; none where nothing was simulated."""
    paired: Path | None = None
    """Data root of the paired patients as this hospital's scanner sees them; one patient, one file name."""


def hospitals_plan(settings: Mapping[str, Any]) -> HospitalsPlan:
    """The plan that `settings` describe: `kind` (phantoms, folders, split) and the fields of that kind.

    Raises `ValueError` naming the setting that is unknown, missing or ill-typed.
    """
    values = dict(settings)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"Expected hospitals.kind to be one of {', '.join(KINDS)}; got {kind!r}.")
    if kind != "phantoms" and not values.get("root"):
        raise ValueError(f"Expected root=FOLDER with hospitals={kind}: the folder of real scans.")
    plan: HospitalsPlan = build(KINDS[kind], values, "hospitals")
    return plan


def hospital_names(names: Sequence[str], count: int) -> list[str]:
    """The first `count` of `names`, then numbered ones; `ValueError` for names that cannot be folders."""
    chosen = [names[i] if i < len(names) else f"hospital{i + 1:02d}" for i in range(count)]
    for name in chosen:
        if not _NAME.fullmatch(name) or name == TRUTH or chosen.count(name) > 1:
            raise ValueError(
                "Expected different hospital names of a-z, 0-9, _, . and -, none of them "
                f"{TRUTH!r}; got {name!r}."
            )
    return chosen
