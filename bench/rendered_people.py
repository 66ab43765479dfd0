"""People rendered by simulated scanners, and the public template imaged in random ways, for benches of style.

Real heads (`ixi_hammersmith`, 110 people, 4 mm) and 60 phantoms, everybody on six scanners, as latents of the
shipped tokenizer of 4 channels; made once, 5 CPU minutes. Not importable; not shipped.
"""

import csv
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from masked_first import VOLUMES, encoded
from torch import Tensor

from forms.json_text import read_json
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from scans.volumes import prepare, read_files, read_label
from server.tokenizer import random_phantoms
from simulations.hospitals.phantom import make_phantoms
from simulations.hospitals.plans import PhantomHospitals
from simulations.phantoms.scanners import draw_acquisition, draw_scanner
from simulations.phantoms.scans import scan_image

SCANNERS = 6
IMAGINGS, ANATOMIES = 32, 10
STRUCTURES = {"hippocampus": (47, 48), "ventricles": (51, 52), "caudate": (36, 37), "putamen": (57, 58)}


def cached(name: str, cache: Path) -> Path:
    """The file of `ixi`, `phantoms` or `public`, made where it is missing."""
    file = cache / f"{name}.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        data = os.environ.get("FEDMEDUET_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
        makers: dict[str, Callable[[], object]] = {
            "public": read_public,
            "ixi": lambda: read_ixi(Path(data) / "ixi_hammersmith"),
            "phantoms": lambda: read_phantoms(cache / "phantoms"),
        }
        torch.save(makers[name](), file)
    return file


def show(what: str, done: int, total: int, began: float) -> None:
    """Progress, once in a while."""
    if done % 10 == 0 or done == total:
        print(f"  {what} {done} of {total}, {time.process_time() - began:.0f} CPU s", flush=True)


def read_ixi(root: Path) -> dict[str, Tensor]:
    """Latents on every scanner [sites people c d h w]; age, sex and volumes [people t]."""
    rows = list(csv.DictReader((root / "participants.tsv").open(), delimiter="\t"))
    scanners = [
        draw_scanner(np.random.default_rng(np.random.SeedSequence(0, spawn_key=(1, i))), i, f"s{i}")
        for i in range(SCANNERS)
    ]
    views: list[list[Tensor]] = [[] for _ in scanners]
    anatomy, began = [], time.process_time()
    for number, row in enumerate(rows):
        scan = read_files([next((root / row["participant_id"] / "anat").glob("*T1w.nii.gz"))])
        for site, scanner in enumerate(scanners):
            acquisition = draw_acquisition(np.random.default_rng([7, number, site + 1]), scanner)
            seen = scan_image(scan.array, scanner, acquisition).astype(np.float32)
            volume = prepare(dataclasses.replace(scan, array=seen), VOLUMES).volume
            views[site].append(volume)
        label = next((root / "derivatives/muse" / row["participant_id"] / "anat").glob("*dseg.nii.gz"), None)
        volumes = [np.nan] * (len(STRUCTURES) + 1)
        if label is not None:
            read = read_label(label, scan).array
            volumes = [float(np.isin(read, values).sum()) for values in STRUCTURES.values()]
            volumes.append(float((read > 0).sum()))
        anatomy.append([float(row["age"]), float(row["sex"] == "M"), *volumes])
        show("heads", number + 1, len(rows), began)
    return {
        "latents": torch.stack([encoded(view) for view in views]),
        "anatomy": torch.tensor(anatomy),
    }


def read_phantoms(folder: Path) -> dict[str, Tensor]:
    """As `read_ixi`, of 60 phantoms that every scanner sees."""
    plan = PhantomHospitals(num_hospitals=SCANNERS, patients=1, paired=60, seed=1, skew=0.0)
    began = time.process_time()
    hospitals = make_phantoms(plan, folder, lambda done, total: show("phantoms", done, total, began))
    views, anatomy = [], []
    for hospital in hospitals:
        assert hospital.paired is not None
        files = sorted((hospital.paired / "images").glob("*.nii.gz"))
        views.append(encoded([prepare(read_files([f]), VOLUMES).volume for f in files]))
    for file in sorted((folder / "truth/paired/truth" / hospitals[0].name).glob("P*.json")):
        record = read_json(file.read_text(), "a record")
        anatomy.append([record["patient"]["age"], 0.0, *(v for _, v in sorted(record["volumes_ml"].items()))])
    return {"latents": torch.stack(views), "anatomy": torch.tensor(anatomy)}


def read_public() -> Tensor:
    """Latents of the public template imaged in random ways, each way on several anatomies [imagings anatomies
    c d h w]: bias and texture belong to the way, place, size and deformation to the anatomy."""
    draws, rows = torch.Generator().manual_seed(11), []
    tokenizer = load_tokenizer(TokenizerSpec())
    for _ in range(IMAGINGS):
        imaging, volumes = random_phantoms.draw_recipe(draws), []
        for _ in range(ANATOMIES):
            turn = 0.1 * torch.randn(3, 3, generator=draws)
            zoom = float(torch.exp(0.07 * torch.randn((), generator=draws)))
            recipe = dataclasses.replace(
                imaging,
                anatomy=True,
                centre=tuple((0.08 * torch.randn(3, generator=draws)).tolist()),
                rotation=tuple(tuple(row) for row in torch.matrix_exp(turn - turn.T).tolist()),
                spacing_mm=tuple(zoom * mm for mm in VOLUMES.spacing_mm),
                warp_mm=6.0,
                slice_factor=(1, 1, 1),
            )
            anatomy = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=draws)))
            shapes = random_phantoms.draw_shapes(recipe, VOLUMES.shape, anatomy)
            points = random_phantoms.template_points(recipe, VOLUMES.shape, anatomy)
            volume = random_phantoms.with_brain(
                recipe,
                random_phantoms.intensities_of(recipe, shapes),
                random_phantoms.sample_template(points),
            )
            scanner = torch.Generator().manual_seed(imaging.seed)
            volumes.append(random_phantoms.imaged(recipe, volume, scanner))
        rows.append(tokenizer.encode(torch.stack(volumes)))
    return torch.stack(rows)
