"""What a start from public anatomy is worth on real scans: the same U-Net on the volume from each start.

Every start gets the same patients, steps, augmentation and draws; its learning rate is chosen on validation
patients, and test patients are looked at once per network. Cells are written as they end, so the same command
goes on where it stopped. The report pairs starts by draw and patient; intervals resample patients (10,000).
Two sets: hippocampus (two classes, 1 mm), and deep brain structures of whole heads (six classes, 3 mm; model
output as truth). Also said: the mean training label map, which reads no scan.

    python bench/anatomy_start.py run DATA OUT.jsonl --set deep_brain --starts canonical.safetensors
    python bench/anatomy_start.py report OUT.jsonl
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_dice
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from client.latents.labelled import LabelledScans
from client.training.finetuning import finetune, predicted
from federation.exchanges.finetuning import LocalFinetuning
from meduet_models.anatomy_start import load_start
from meduet_models.downstream.volume_networks import VolumeSegmenter
from meduet_models.seeds import digest_of, seed_of
from meduet_models.volume_unet import VolumeUNet
from meduet_models.weights import load_weights, save_weights
from scans.volume_plan import VolumePlan
from scans.volumes import prepare, read_label, read_scan

MUSE = {47: 1, 48: 1, 51: 2, 52: 2, 36: 3, 37: 3, 57: 4, 58: 4, 59: 5, 60: 5, 35: 6}
"""Hippocampus, lateral ventricle, caudate, putamen, thalamus, brain stem."""


@dataclass(frozen=True)
class DataSet:
    """One set of labelled scans, and how its patients are divided."""

    name: str
    classes: int
    plan: VolumePlan
    crop: tuple[slice, slice, slice]
    values: dict[int, int]
    test: int
    validation: int


SETS = {
    "hippocampus": DataSet(
        "hippocampus", 3, VolumePlan(modality="t1", shape=(32, 48, 32)), (slice(None),) * 3, {}, 60, 20
    ),
    "deep_brain": DataSet(
        "deep_brain",
        7,
        VolumePlan(modality="t1", spacing_mm=(3.0, 3.0, 3.0), shape=(80, 80, 80)),
        (slice(24, 56), slice(10, 58), slice(14, 54)),
        MUSE,
        40,
        16,
    ),
}


def main() -> None:
    """Run cells, or report them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    actions = parser.add_subparsers(required=True)
    run = actions.add_parser("run")
    run.add_argument("data", type=Path)
    run.add_argument("out", type=Path)
    run.add_argument("--set", choices=SETS, required=True)
    run.add_argument("--starts", type=Path, nargs="*", default=[])
    run.add_argument("--labelled", type=int, nargs="+", default=[1, 2, 8, 0], help="patients; 0: all")
    run.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    run.add_argument("--steps", type=int, default=300)
    run.add_argument("--batch", type=int, default=4)
    run.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    run.add_argument("--cpu", type=float, default=400.0, help="seconds of processor time in this call")
    run.set_defaults(act=_run)
    report = actions.add_parser("report")
    report.add_argument("out", type=Path)
    report.set_defaults(act=_report)
    chosen = parser.parse_args()
    chosen.act(chosen)


def _run(chosen: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    data = SETS[chosen.set]
    scans = read_set(data, chosen.data, chosen.out.with_name(f"{data.name}.safetensors"))
    test, validation, pool = divided(scans, data)
    starts = {"scratch": None} | {load_start(path).kind: path for path in chosen.starts}
    done = {tuple(cell["key"]): cell for cell in cells_of(chosen.out)}
    began = time.process_time()

    def cell(labelled: int, draw: int, steps: int, start: str, rate: float, *, tested: bool) -> dict | None:
        key = (data.name, labelled, draw, steps, start, rate, tested)
        if key not in done:
            if time.process_time() - began > chosen.cpu:
                return None
            order = sorted(pool.patients, key=lambda name: digest_of("labels", draw, name))
            few = pool.rows([pool.patient.index(name) for name in order[: labelled or len(order)]])
            network = started(starts[start], data.classes, draw)
            local = LocalFinetuning(
                task="segmentation", classes=data.classes, network="volume_unet", steps=steps,
                batch_size=chosen.batch, learning_rate=rate, augmentation=1.0, average=0.98,
            )  # fmt: skip
            spent = time.process_time()
            finetune(network, few, local, seed=draw)
            network.eval()
            dice = dice_of(predicted(network, test if tested else validation), test if tested else validation)
            map_dice = dice_of(mean_map(few, test, data.classes), test) if tested else []
            done[key] = {"key": key, "dice": dice, "mean_map": map_dice, "cpu": time.process_time() - spent}
            with chosen.out.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
            print(*key, f"{np.mean(dice):.4f}", f"{done[key]['cpu']:.0f}s", flush=True)
        return done[key]

    best: dict[str, float] = {}
    for start in starts:  # rates: on validation patients, draws that are not reported
        tried = [
            (cell(2, 100 + draw, 100, start, rate, tested=False), rate)
            for draw, rate in product(range(2), chosen.rates)
        ]
        if any(found is None for found, _ in tried):
            return
        means = {
            rate: np.mean([np.mean(f["dice"]) for f, r in tried if f and r == rate]) for rate in chosen.rates
        }
        best[start] = max(means, key=lambda rate: means[rate])
    for draw, labelled, start in product(chosen.draws, chosen.labelled, starts):
        if cell(labelled, draw, chosen.steps, start, best[start], tested=True) is None:
            return
    print("complete")


def read_set(data: DataSet, root: Path, kept: Path) -> LabelledScans:
    """The set's scans, prepared as a site prepares them; kept beside the results."""
    pairs = list(_pairs(data, root))
    if not kept.is_file():
        volumes, labels = [], []
        for image, label in pairs:
            scan = read_scan(image)
            made = prepare(scan, data.plan, 0, read_label(label, scan))
            assert made.label is not None
            classes = made.label.long()
            if data.values:
                classes = torch.zeros_like(classes)
                for value, own in data.values.items():
                    classes[made.label == value] = own
            volumes.append(made.volume[(slice(None), *data.crop)].half())
            labels.append(classes[(slice(None), *data.crop)].to(torch.uint8))
        save_weights(kept, {"volumes": torch.stack(volumes), "labels": torch.stack(labels)}, {})
    stored, _ = load_weights(kept)
    count = len(stored["volumes"])
    names = tuple(image.name for image, _ in pairs)
    nothing = torch.zeros(count, 1, 1, 1, 1)  # no latents: these networks see volumes
    return LabelledScans(nothing, stored["labels"].long(), names, (0,) * count, stored["volumes"])


def _pairs(data: DataSet, root: Path) -> Iterator[tuple[Path, Path]]:
    if data.name == "hippocampus":
        folder = root / "msd_hippocampus"
        for label in sorted(folder.rglob("label*/*.nii*")):
            images = sorted(folder.rglob(f"image*/{label.name}"))
            if images and "281" not in label.name:
                yield images[0], label
        return
    folder = root / "ixi_hammersmith"
    for subject in sorted(folder.glob("sub-*")):
        yield (
            next(subject.glob("anat/*.nii.gz")),
            next((folder / "derivatives/muse" / subject.name / "anat").glob("*.nii.gz")),
        )


def divided(scans: LabelledScans, data: DataSet) -> tuple[LabelledScans, LabelledScans, LabelledScans]:
    """Test, validation, and those whose labels may be used: by a hash of the patient."""
    order = sorted(range(len(scans)), key=lambda row: digest_of("division", scans.patient[row]))
    cut, rest = data.test, data.test + data.validation
    return scans.rows(order[:cut]), scans.rows(order[cut:rest]), scans.rows(order[rest:])


def started(path: Path | None, classes: int, draw: int) -> VolumeSegmenter:
    """The segmenter from a start; the head, and a start from scratch, from the draw's seed."""
    body = VolumeUNet(seed=seed_of("scratch", draw)) if path is None else load_start(path).network
    return VolumeSegmenter(body, classes, seed=draw)


def dice_of(logits: Tensor, scans: LabelledScans) -> list[float]:
    """Mean Dice of the foreground classes, one per patient."""
    p = logits.argmax(dim=1, keepdim=True)
    dice = compute_dice(p, scans.answers, include_background=False, num_classes=logits.shape[1])
    return [float(value) for value in dice.nanmean(dim=1)]


def mean_map(few: LabelledScans, test: LabelledScans, classes: int) -> Tensor:
    """The mean label map of the labelled patients, the same for everybody: it reads no scan."""
    share = torch.nn.functional.one_hot(few.answers[:, 0], classes).float().mean(dim=0).movedim(-1, 0)
    return share[None].expand(len(test), *share.shape)


def cells_of(path: Path) -> list[dict]:
    """What was written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _report(chosen: argparse.Namespace) -> None:
    groups: dict[tuple, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for one in cells_of(chosen.out):
        name, labelled, draw, steps, start, rate, tested = one["key"]
        if tested:
            groups[name, steps, labelled][start][draw] = one | {"rate": rate}
    for (name, steps, labelled), starts in sorted(groups.items()):
        draws = sorted(set.intersection(*(set(own) for own in starts.values())))
        if not draws or "scratch" not in starts:
            continue
        scores = {start: np.array([own[draw]["dice"] for draw in draws]) for start, own in starts.items()}
        maps = np.mean([starts["scratch"][draw]["mean_map"] for draw in draws])
        line = [
            f"{name} {steps} steps, {labelled or 'all'} labelled, {len(draws)} draws; label map {maps:.3f}"
        ]
        for start, own in scores.items():
            line.append(f"{start} (rate {starts[start][draws[0]]['rate']:g}) {own.mean():.3f}")
        for first, second in (("canonical", "scratch"), ("shapes", "scratch"), ("canonical", "shapes")):
            if first in scores and second in scores:
                line.append(f"{first} - {second} {_paired(scores[first] - scores[second])}")
        print("; ".join(line))


def _paired(differences: np.ndarray) -> str:
    """The mean over draws and patients; interval over patients, and how many draws are above 0."""
    each = differences.mean(axis=0)
    rows = np.random.default_rng(0).integers(len(each), size=(10_000, len(each)))
    low, high = np.quantile(each[rows].mean(axis=1), (0.025, 0.975))
    above = int((differences.mean(axis=1) > 0).sum())
    return f"{each.mean():+.3f} [{low:+.3f}, {high:+.3f}], above 0 in {above} of {len(differences)} draws"


if __name__ == "__main__":
    main()
