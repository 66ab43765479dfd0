"""`meduet-site prepare` of whole scans, killed for good in the middle: what is done is not done again, and
what comes of it is what an undisturbed run makes, to the byte."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console

import client.scans.judgement
from client.cli import main
from client.scans.fingerprints import SETTLED_S
from federation.plan.plan import RunPlan
from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import pca_tokenizer, save_tokenizer
from scans.volume_plan import VolumePlan

SCANS = 8
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hospital(tmp_path: Path, toy_plan: Callable[..., RunPlan]) -> Path:
    """A folder with whole scans of different sizes, some with labels, and what a site needs."""
    tokenizer = pca_tokenizer(PatchMoments.of(torch.rand(4, 1, 16, 16, 16)), 2)
    save_tokenizer(tmp_path / "tokenizer.safetensors", tokenizer, {})
    volumes = VolumePlan(
        modality="mr",
        shape=(16, 24, 16),
        spacing_mm=(1.5, 1.5, 1.5),
        extent="scan",
        registered=False,
        views=2,
    )
    plan = toy_plan(volumes=volumes, tokenizer_sha256=tokenizer.sha256)
    (tmp_path / "plan.json").write_text(plan.to_json())
    for number in range(SCANS):
        folder = tmp_path / "scans" / f"p{number:02d}"
        folder.mkdir(parents=True)
        values = np.zeros((64 + number, 60, 56), np.float32)
        values[6:-6, 5:-5, 4:-4] = np.random.default_rng(number).random(values[6:-6, 5:-5, 4:-4].shape) + 0.5
        place = np.diag([2.0, 2.0, 2.0, 1.0])
        nib.save(nib.Nifti1Image(values, place), folder / "t1.nii.gz")
        if number % 3 == 0:
            nib.save(nib.Nifti1Image((values > 1.2).astype(np.uint8), place), folder / "t1_seg.nii.gz")
    time.sleep(SETTLED_S + 0.1)  # younger files are not remembered
    return tmp_path


def prepare(hospital: Path, state: str, *more: str) -> list[str]:
    """The arguments, for a state folder of this name."""
    (hospital / f"{state}.yaml").write_text(
        f"name: north\ndata_root: scans\nstate_dir: {state}\ndevice: cpu\nminimum_cohort: 3\n"
        "allow_non_private: true\ntokenizer: {kind: file, path: tokenizer.safetensors, channels: 2}\n"
    )
    return ["prepare", "--config", f"{hospital / state}.yaml", "--plan", f"{hospital / 'plan.json'}", *more]


def run(arguments: list[str]) -> None:
    screen = io.StringIO()
    assert main(arguments, Console(file=screen, width=200)) == 0, screen.getvalue()


def encodings(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (state / "cache").glob("??/*.safetensors")}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_in_the_middle_it_goes_on_scan_by_scan_and_ends_as_if_undisturbed(
    hospital: Path, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = prepare(hospital, "killed", "--workers", workers)
    program = f"from client.cli import main; main({arguments!r})"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as started:

        def judged_so_far() -> str:
            return "".join(memo.read_text() for memo in (hospital / "killed").glob("cohort-*.judged"))

        while started.poll() is None and judged_so_far().count("{") < 2:
            time.sleep(0.005)
        os.kill(started.pid, signal.SIGKILL)  # no chance to say goodbye
    judged = sum(line.endswith("}") for line in judged_so_far().splitlines())
    done = encodings(hospital / "killed")
    assert 2 <= judged < SCANS and len(done) >= 2 * judged, "views are on the disk before a judgement is"
    read: list[str] = []
    read_files = client.scans.judgement.read_files
    monkeypatch.setattr(
        client.scans.judgement,
        "read_files",
        lambda files, *rest: read.append(files[0].parent.name) or read_files(files, *rest),
    )
    run(prepare(hospital, "killed", "--prune"))
    assert len(read) == len(set(read)) == SCANS - judged, "each scan that was not done, and no other, once"
    undisturbed = hospital / "undisturbed"
    run(prepare(hospital, "undisturbed"))
    assert encodings(hospital / "killed") == encodings(undisturbed)
    assert len(encodings(undisturbed)) == 2 * SCANS
    assert done.items() <= encodings(undisturbed).items(), "no file was half"
    left = {path.name for path in (hospital / "killed" / "cache").glob("??/*")}
    assert left == set(encodings(undisturbed)), "what the killed write left is removed by --prune"
    for table in ("cohort.csv", "exclusions.csv"):
        assert (hospital / "killed" / table).read_bytes() == (undisturbed / table).read_bytes()
    memos = [memo for state in ("killed", "undisturbed") for memo in (hospital / state).glob("cohort-*.json")]
    assert len(memos) == 2
    assert len({json.dumps(json.loads(memo.read_text())["cohort"]) for memo in memos}) == 1
