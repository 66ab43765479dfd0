"""Hospitals full of phantoms: who their patients are, which scanner sees them, which files result.

Every patient, scanner and acquisition has a stream of random numbers of its own, named by the seed and its
place; so adding a hospital or a patient changes nobody else. A scan is made anew only when its draw, or the
bytes on disk, differ from what its truth file says.

    <hospital>/images/P10001.nii.gz  labels/P10001.nii.gz  covariates.csv     what the hospital has
    truth/<hospital>/scanner.json  P10001.json  P10001.npz                    what the simulator knows
    truth/paired/<hospital>/images/P00001.nii.gz ...                          patients seen by every scanner
"""

import dataclasses
import io
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forms.json_text import fingerprint_of
from meduet_models.weights import sha256_of_file
from simulations.hospitals.manifests import read_record, write_record, write_table
from simulations.hospitals.plans import TRUTH, Hospital, PhantomHospitals, hospital_names
from simulations.phantoms.atlas import load_atlas
from simulations.phantoms.patients import (
    Patient,
    Population,
    apply_patient,
    draw_patient,
    label_volume,
    volumes_ml,
)
from simulations.phantoms.scanners import Acquisition, Scanner, draw_acquisition, draw_scanner, with_settings
from simulations.phantoms.scans import field_of_view, render, slice_anatomy, write_labels, write_scan
from storage.files import write_whole

Progress = Callable[[int, int], None]
"""Called with scans done and scans in all."""
GENERATION = 1
"""Counts changes of the phantoms' mathematics; files of another generation are made anew."""
PAIRED = "paired"
_PATIENT, _SCANNER, _ACQUISITION = range(3)
_AT_ONCE = 4  # scans, at most: each takes a hundred megabytes while it is made
_OURS = re.compile(r"(\.P\d+\..*|P\d+\.(nii\.gz|json|npz))")  # the first: begun, and cut short


@dataclass(frozen=True)
class Appointment:
    """One patient to be scanned on one scanner, and where the files go."""

    patient_id: str
    patient: Patient
    scanner: Scanner
    acquisition: Acquisition
    data: Path
    truth: Path
    resolution_mm: int

    @property
    def sha256(self) -> str:
        """Hash of everything that the files follow from."""
        drawn = {
            "generation": GENERATION,
            "resolution_mm": self.resolution_mm,
            "patient": self.patient.sha256,
            "scanner": dataclasses.asdict(self.scanner),
            "acquisition": dataclasses.asdict(self.acquisition),
        }
        return fingerprint_of(drawn)

    @property
    def image(self) -> Path:
        """The scan."""
        return self.data / "images" / f"{self.patient_id}.nii.gz"

    @property
    def labels(self) -> Path:
        """The label volume on the scan's grid."""
        return self.data / "labels" / f"{self.patient_id}.nii.gz"


def make_phantoms(plan: PhantomHospitals, folder: Path, progress: Progress | None = None) -> list[Hospital]:
    """Make the phantom consortium of `plan` below `folder`; keeps scans that match."""
    names = hospital_names(plan.names, plan.num_hospitals)
    scanners = [phantom_scanner(plan, i, name) for i, name in enumerate(names)]
    appointments = list(_appointments(plan, folder, scanners))
    records = []
    for done, pair in enumerate(_records(appointments), start=1):
        records.append(pair)
        if progress is not None:
            progress(done, len(appointments))
    hospitals = []
    for name, scanner in zip(names, scanners, strict=True):
        truth, paired = folder / TRUTH / name, folder / TRUTH / PAIRED / name
        paired_truth = folder / TRUTH / PAIRED / TRUTH / name
        write_record(truth / "scanner.json", dataclasses.asdict(scanner) | {"signals": scanner.signals})
        for data, beside in ((folder / name, truth), (paired, paired_truth)):
            mine = [(a, record) for a, record in records if a.data == data]
            _tidy(data, beside, {a.patient_id for a, _ in mine})
            if mine:
                _write_covariates(data / "covariates.csv", [(a.patient_id, r) for a, r in mine])
        hospitals.append(Hospital(name, folder / name, "plain", truth, paired if plan.paired else None))
    return hospitals


def _records(appointments: list[Appointment]) -> Iterator[tuple[Appointment, dict[str, Any]]]:
    """Each scan with its truth record, in order, some made at once: what takes time leaves Python alone."""
    for first in appointments[:1]:  # by itself: it reads the template for all
        yield first, _keep_or_make(first)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _AT_ONCE), thread_name_prefix="phantom") as threads:
        try:
            yield from zip(appointments[1:], threads.map(_keep_or_make, appointments[1:]), strict=True)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def phantom_scanner(plan: PhantomHospitals, index: int, name: str) -> Scanner:
    """The scanner of hospital number `index`: drawn, then changed as the plan says."""
    drawn = draw_scanner(_stream(plan.seed, _SCANNER, index), index, name)
    return with_settings(drawn, plan.scanners[index]) if index < len(plan.scanners) else drawn


def phantom_population(plan: PhantomHospitals, index: int) -> Population:
    """Who comes to hospital number `index`: the plan's population, moved along its skew."""
    place = 2 * index / (plan.num_hospitals - 1) - 1 if plan.num_hospitals > 1 else 0.0
    middle = plan.population
    return dataclasses.replace(
        middle,
        age_mean=middle.age_mean + 12 * plan.skew * place,
        disease_share=float(np.clip(middle.disease_share + 0.3 * plan.skew * place, 0, 1)),
    )


def phantom_patient(plan: PhantomHospitals, index: int, number: int) -> Patient:
    """Patient `number` of hospital `index`; `index` -1: of the paired patients."""
    population = phantom_population(plan, index) if index >= 0 else plan.population
    return draw_patient(_stream(plan.seed, _PATIENT, index + 1, number), population)


def _stream(seed: int, *place: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))


def _appointments(plan: PhantomHospitals, folder: Path, scanners: list[Scanner]) -> Iterator[Appointment]:
    for index, scanner in enumerate(scanners):
        count = plan.sizes[index] if index < len(plan.sizes) else plan.patients
        for number in range(count):
            patient_id = f"P{index + 1}{number + 1:04d}"
            acquisition = draw_acquisition(_stream(plan.seed, _ACQUISITION, index + 1, number), scanner)
            patient = phantom_patient(plan, index, number)
            data, truth = folder / scanner.name, folder / TRUTH / scanner.name
            yield Appointment(patient_id, patient, scanner, acquisition, data, truth, plan.resolution_mm)
    for number in range(plan.paired):
        patient = phantom_patient(plan, -1, number)
        for index, scanner in enumerate(scanners):
            acquisition = draw_acquisition(_stream(plan.seed, _ACQUISITION, 0, number, index), scanner)
            patient_id, paired = f"P0{number + 1:04d}", folder / TRUTH / PAIRED
            data, truth = paired / scanner.name, paired / TRUTH / scanner.name
            yield Appointment(patient_id, patient, scanner, acquisition, data, truth, plan.resolution_mm)


def _keep_or_make(appointment: Appointment) -> dict[str, Any]:
    """The truth record of the scan, which is made unless record and files on disk agree with the draw."""
    path = appointment.truth / f"{appointment.patient_id}.json"
    record = read_record(path)
    if record.get("draw_sha256") == appointment.sha256 and record.get("files") == _hashes(appointment):
        return record
    return _make(appointment, path)


def _make(appointment: Appointment, path: Path) -> dict[str, Any]:
    for file in (appointment.image, appointment.labels):
        file.parent.mkdir(parents=True, exist_ok=True)
    patient, scanner = appointment.patient, appointment.scanner
    affine, shape = field_of_view(scanner, appointment.acquisition, appointment.resolution_mm)
    anatomy = apply_patient(patient, load_atlas(appointment.resolution_mm), affine, shape)
    values, scan_affine = render(anatomy, scanner, appointment.acquisition)
    write_scan(appointment.image, values, scan_affine, scanner)
    write_labels(appointment.labels, label_volume(slice_anatomy(anatomy, scanner)), scan_affine, scanner)
    velocity = io.BytesIO()
    np.savez(velocity, velocity=patient.velocity)
    write_whole(path.with_suffix(".npz"), velocity.getvalue())
    record = {
        "draw_sha256": appointment.sha256,
        "files": _hashes(appointment),
        "patient": patient.to_dict(),
        "acquisition": dataclasses.asdict(appointment.acquisition),
        "resolution_mm": appointment.resolution_mm,
        "volumes_ml": {name: round(volume, 3) for name, volume in volumes_ml(anatomy).items()},
    }
    write_record(path, record)
    return read_record(path)


def _hashes(appointment: Appointment) -> dict[str, str]:
    """Hashes of the files of a scan that are there."""
    files = {
        "image": appointment.image,
        "labels": appointment.labels,
        "velocity": appointment.truth / f"{appointment.patient_id}.npz",
    }
    return {name: sha256_of_file(path) for name, path in files.items() if path.is_file()}


def _write_covariates(path: Path, records: list[tuple[str, dict[str, Any]]]) -> None:
    rows = [
        (
            patient_id,
            record["patient"]["age"],
            record["patient"]["sex"],
            "yes" if record["patient"]["lesions"] else "no",
            record["volumes_ml"]["lesion"],
        )
        for patient_id, record in records
    ]
    write_table(path, ["patient", "age", "sex", "disease", "lesion_volume_ml"], rows)


def _tidy(data: Path, truth: Path, wanted: set[str]) -> None:
    """Remove scans of an earlier plan, and unfinished files; nothing that we did not name."""
    for folder in (data / "images", data / "labels", truth):
        if folder.is_dir():
            for path in folder.iterdir():
                if _OURS.fullmatch(path.name) and path.name.split(".")[0] not in wanted:
                    path.unlink()
