"""`meduet-site`: exit statuses, what is said, and that an interruption loses nothing."""

import dataclasses
import errno
import io
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset
from rich.console import Console

import client.cli
import client.latents.cache_files
import client.latents.encoding
import client.scans.cohort_memo
import client.scans.judgement_memo
import scans.dicom
from client.cli import main
from client.consent.approvals import Approvals
from client.consent.exact_sums import EXACT_SUMS_CONSENT
from client.scans.cohort import split_of
from federation.bundle import running_bundle
from federation.plan.plan import RunPlan
from federation.published_plan import PublishedPlan
from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import pca_tokenizer, save_tokenizer
from scans.volume_plan import VolumePlan

NAMES = [f"Mustermann{number}" for number in range(20)]


class Hospital:
    """A folder with scans, site.yaml and plan.json."""

    def __init__(self, root: Path, toy_plan: Callable[..., RunPlan]) -> None:
        self.root, self.state = root, root / "state"
        tokenizer = pca_tokenizer(PatchMoments.of(torch.rand(4, 1, 16, 16, 16)), 2)
        save_tokenizer(root / "tokenizer.safetensors", tokenizer, {})
        volumes = VolumePlan(modality="mr", shape=(16, 24, 16), spacing_mm=(2.0, 2.0, 2.0))
        self.plan = toy_plan(volumes=volumes, tokenizer_sha256=tokenizer.sha256)
        self.settings(allow_non_private="true")
        self.write_plan(self.plan)
        for name in NAMES[:8]:
            self.scan(name)

    def settings(self, **changes: str) -> None:
        lines = {
            "name": "north",
            "data_root": "scans",
            "state_dir": "state",
            "device": "cpu",
            "minimum_cohort": "3",
            "plan_approval": "implied",
            "tokenizer": "{kind: file, path: tokenizer.safetensors, channels: 2}",
            **changes,
        }
        (self.root / "site.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))

    def write_plan(self, plan: RunPlan) -> None:
        (self.root / "plan.json").write_text(plan.to_json())

    def scan(self, name: str, voxels: int | None = None) -> Path:
        path = self.root / "scans" / name / "t1.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = (
            np.random.default_rng(voxels or zlib.crc32(name.encode())).random((14, 20, 15)).astype(np.float32)
        )
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), path)
        return path

    def run(self, command: str, *more: str, plan: bool = True) -> tuple[int, str]:
        """Exit status and what was printed."""
        screen = io.StringIO()
        arguments = [command, "--config", str(self.root / "site.yaml"), *more]
        arguments += ["--plan", str(self.root / "plan.json")] if plan else []
        return main(arguments, Console(file=screen, width=300, soft_wrap=True)), screen.getvalue()


@pytest.fixture
def hospital(tmp_path: Path, toy_plan: Callable[..., RunPlan]) -> Hospital:
    return Hospital(tmp_path, toy_plan)


def row(screen: str, name: str) -> int:
    """A number in the printed table."""
    found = re.search(rf"│ {name} +│ +(\d+)", screen)
    assert found, screen
    return int(found[1])


def verdict(screen: str, what: str) -> str:
    """Verdict and finding of a check."""
    found = re.search(rf"^ *(ok|look|failed)  {what}: (.*)$", screen, re.MULTILINE)
    assert found, screen
    return f"{found[1]}: {found[2]}"


def test_help_shows_a_newcomer_the_settings_examples_and_exit_statuses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    for word in (
        "data_root:",
        "state_dir:",
        "meduet-site prepare --config",
        "exit status",
        "130 interrupted",
    ):
        assert word in said


def test_prepare_encodes_says_what_takes_part_and_why_the_rest_does_not(hospital: Hospital) -> None:
    (hospital.root / "scans" / "notes.txt").write_text("for people")
    (hospital.root / "scans" / "empty.nii.gz").write_bytes(b"")
    status, screen = hospital.run("prepare")
    assert status == 0
    assert row(screen, "scans") == row(screen, "patients") == 8 and row(screen, "encoded before") == 0
    assert row(screen, "empty") == row(screen, "sidecar") == 1
    assert not any(name in screen for name in NAMES), "the screen names no patient"
    assert (hospital.state / "cohort.csv").read_text().count("Mustermann") >= 8
    assert "empty.nii.gz" in (hospital.state / "exclusions.csv").read_text()
    assert len(list(hospital.state.glob("cache/??/*.safetensors"))) == 8
    status, screen = hospital.run("prepare")
    assert status == 0 and row(screen, "encoded before") == 8


def test_an_interrupted_prepare_says_so_and_the_same_command_goes_on(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.latents.encoding, "SCANS_AT_ONCE", 1)
    saved, count = client.latents.cache_files.save_weights, 0

    def interrupted(path: Path, *rest: object) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        saved(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(client.latents.cache_files, "save_weights", interrupted)
    status, screen = hospital.run("prepare")
    assert status == 130 and "Interrupted. What was encoded is kept" in screen
    status, screen = hospital.run("prepare")
    assert status == 0 and row(screen, "encoded before") == 3 and row(screen, "scans") == 8


def test_prepare_with_two_workers_leaves_the_same_tables_memos_and_encodings(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.scans.cohort_memo, "SETTLED_S", -1.0)  # files just written count as settled
    monkeypatch.setattr(client.scans.judgement_memo, "SETTLED_S", -1.0)
    (hospital.root / "scans" / "p8.nii.gz").write_bytes(b"not a scan")
    left = []
    for number in ("1", "2"):
        hospital.settings(allow_non_private="true", state_dir=f"state{number}")
        status, screen = hospital.run("prepare", "--workers", number)
        assert status == 0 and row(screen, "encoded before") == 0 and row(screen, "scans") == 8
        state = hospital.root / f"state{number}"
        files = [path for path in state.rglob("*") if path.is_file() and "jsonl" not in path.name]
        left.append({path.relative_to(state).as_posix(): path.read_bytes() for path in files})
    names = sorted(name for name in left[0] if "/" not in name)
    assert left[0] == left[1] and {"cohort.csv", "exclusions.csv"} <= set(names)
    assert [Path(name).suffix for name in names if name.startswith("cohort-")] == [".json", ".judged"]
    assert sum(name.endswith("safetensors") for name in left[0]) == 8


@pytest.mark.parametrize("wrong", ["0", "-2", "1000000"])
def test_an_impossible_number_of_workers_is_one_line(hospital: Hospital, wrong: str) -> None:
    status, screen = hospital.run("prepare", "--workers", wrong)
    assert status == 1 and screen.startswith("Expected 1 to 256 workers") and screen.count("\n") == 1


def test_where_there_is_no_terminal_progress_is_a_line_with_the_time_left(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.cli, "LINE_EVERY_S", 0.0)
    _, screen = hospital.run("prepare")
    assert re.search(r"^reading: 3 of 8, about \d+ min left$", screen, re.MULTILINE)


def test_a_full_disk_is_said_in_words_and_exits_1(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(client.latents.cache_files, "save_weights", full)
    status, screen = hospital.run("prepare")
    assert status == 1 and "No space left on device" in screen and "run the same command again" in screen


def test_prune_removes_the_encodings_of_a_patient_who_withdrew(hospital: Hospital) -> None:
    hospital.run("prepare")
    withdrawn = hospital.root / "scans" / NAMES[0]
    (withdrawn / "t1.nii.gz").unlink()
    status, screen = hospital.run("check")
    assert status == 0 and "1 files that this plan does not use" in verdict(screen, "cache")
    status, screen = hospital.run("prepare", "--prune")
    assert status == 0 and "Removed 1 files" in screen
    assert len(list(hospital.state.glob("cache/??/*.safetensors"))) == 7
    assert NAMES[0] not in (hospital.state / "cohort.csv").read_text().split()


@pytest.mark.parametrize("command", ["prepare", "check"])
def test_settings_or_plans_that_are_wrong_exit_2_with_one_line(hospital: Hospital, command: str) -> None:
    hospital.settings(devise="cpu")
    status, screen = hospital.run(command)
    assert status == 2 and "site has no setting 'devise'" in screen and screen.count("\n") == 1
    hospital.settings()
    (hospital.root / "plan.json").write_text('{"name": "x"}')
    status, screen = hospital.run(command)
    assert status == 2 and "plan lacks" in screen and screen.count("\n") == 1
    (hospital.root / "plan.json").unlink()
    status, screen = hospital.run(command)
    assert status == 2 and "Ask the centre for plan.json" in screen


def test_a_plan_for_another_tokenizer_exits_2_and_reads_no_scan(hospital: Hospital) -> None:
    hospital.write_plan(dataclasses.replace(hospital.plan, tokenizer_sha256="f" * 64))
    status, screen = hospital.run("prepare")
    assert status == 2 and "Plan asks for tokenizer ffffffff…" in screen
    assert not (hospital.state / "cohort.csv").exists()


def test_a_ready_site_passes_every_check(hospital: Hospital) -> None:
    for name in NAMES[8:]:  # each split gets patients, and training enough
        hospital.scan(name)
    hospital.settings(allow_non_private="true", allow_exact_sums=EXACT_SUMS_CONSENT)
    hospital.run("prepare")
    hospital.run("check", "--confirm-patients")
    status, screen = hospital.run("check")
    assert status == 0
    assert re.search(r"^\d+ ok, 0 to look at, 0 failed\.$", screen, re.MULTILINE)
    assert not re.search(r"^ *(failed|look) ", screen, re.MULTILINE)
    assert verdict(screen, "scans").startswith("ok: 20 scans (0 labelled) of 20 patients")
    assert verdict(screen, "cache") == "ok: 20 scans encoded, 0 to do"
    assert not any(name in screen for name in NAMES)


def test_check_without_a_plan_reads_no_scan_and_says_so(hospital: Hospital) -> None:
    status, screen = hospital.run("check", plan=False)
    assert status == 0 and "Scans were not read" in screen
    assert verdict(screen, "data folder") == "ok: 8 files or series that may be scans"
    assert not (hospital.state / "cohort.csv").exists()


def test_check_without_a_plan_lists_the_plans_that_were_approved_with_this_code(hospital: Hospital) -> None:
    hospital.settings(allow_non_private="true", plan_approval="required")
    status, screen = hospital.run("check", plan=False)
    assert status == 0 and verdict(screen, "certificate").startswith("look: site.yaml names no keys_dir")
    assert verdict(screen, "approved plans") == "look: 0 with this machine's code"
    book, mine = Approvals(hospital.state), hospital.plan.sha256[:12]
    for bundle, said in (
        ("0" * 64, f"look: 0 with this machine's code; 1 with other code, {mine}…"),
        (running_bundle(), f"ok: 1 with this machine's code, {mine}…"),
    ):
        published = PublishedPlan(plan=hospital.plan, bundle_sha256=bundle)
        book.keep(published)
        book.approve(published)
        _, screen = hospital.run("check", plan=False)
        assert verdict(screen, "approved plans") == said


def test_check_says_in_its_help_what_its_exit_statuses_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "exit status: 0 every check is ok or look; 1 a check failed; 2 wrong usage" in said


def test_wrong_usage_exits_2() -> None:
    with pytest.raises(SystemExit) as done:
        main(["check"])
    assert done.value.code == 2


def test_check_says_when_a_plan_is_not_approved_yet(hospital: Hospital) -> None:
    hospital.settings(allow_non_private="true", plan_approval="required")
    status, screen = hospital.run("check")
    assert status == 0 and verdict(screen, "approval").startswith("look: Expected a plan that this hospital")
    Approvals(hospital.state).approve(PublishedPlan(plan=hospital.plan, bundle_sha256=running_bundle()))
    status, screen = hospital.run("check")
    assert status == 0 and verdict(screen, "approval") == "ok: approved, with this code"


FAULTS: dict[str, tuple[Callable[[Hospital], object], str, str]] = {
    "no consent": (lambda h: h.settings(), "consent", "set allow_non_private: true"),
    "no data": (lambda h: h.settings(data_root="nowhere"), "data folder", "Correct data_root"),
    "no scans": (
        lambda h: [path.unlink() for path in (h.root / "scans").rglob("*.gz")],
        "data folder",
        "is the folder mounted?",
    ),
    "too few patients": (
        lambda h: h.settings(minimum_cohort="30", allow_non_private="true"),
        "scans",
        "fewer than 30 training patients",
    ),
    "no tokenizer": (lambda h: (h.root / "tokenizer.safetensors").unlink(), "tokenizer", "Correct tokenizer"),
    "not in the plan": (
        lambda h: h.settings(name="elsewhere", allow_non_private="true"), "plan", "Ask the centre"
    ),
    "a ledger that was changed": (
        lambda h: (h.state.mkdir(), (h.state / "ledger.jsonl").write_text("{}\n")),
        "ledger and journal",
        "ask who changed it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_its_check_says_what_to_do_and_exits_1(hospital: Hospital, fault: str) -> None:
    cause, what, advice = FAULTS[fault]
    cause(hospital)
    status, screen = hospital.run("check")
    assert status == 1
    assert verdict(screen, what).startswith("failed") and advice in screen


def test_a_disk_that_is_too_small_fails_the_check(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    status, screen = hospital.run("check")
    assert status == 1 and verdict(screen, "disk space").startswith("failed: 0.0 GB free")


def test_copies_under_two_names_are_shown(hospital: Hospital) -> None:
    for name in (NAMES[10], NAMES[11]):
        hospital.scan(name, voxels=5)
    _, screen = hospital.run("check")
    assert verdict(screen, "duplicates") == "look: 1 scans are copies of others, and excluded"


def test_slices_that_were_sent_again_are_no_copies_of_scans_and_each_header_is_read_once(
    hospital: Hospital, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital.settings(
        allow_non_private="true", data_root=str(data_root / "odd_cases" / "dicom" / "resent_slices")
    )
    header, surveyed = scans.dicom._header, Counter[str]()

    def counted(path: Path, tags: Sequence[str] | None = None) -> Dataset:
        surveyed[path.name] += tags is not None
        return header(path, tags)

    monkeypatch.setattr(scans.dicom, "_header", counted)
    _, screen = hospital.run("check", "--confirm-patients")
    assert verdict(screen, "duplicates") == "ok: none" and "duplicate 2" in verdict(screen, "exclusions")
    assert "2 left out (duplicate 2)" in screen and "Confirmed: 1 patient" in screen
    assert len(surveyed) == 10 and set(surveyed.values()) == {1}


def test_names_that_look_like_one_patient_in_two_splits_are_shown_by_row(hospital: Hospital) -> None:
    fractions = (0.8, 0.1, 0.1)
    spellings = [("sub-{}", "SUB_0{}"), ("pat-{}a", "PAT{}A")]
    for first, second in spellings:
        number = next(
            n
            for n in range(100, 999)
            if len({split_of(spelling.format(n), fractions, "1") for spelling in (first, second)}) == 2
        )
        for spelling in (first, second):
            hospital.scan(spelling.format(number))
    hospital.settings(layout="plain", allow_non_private="true")
    _, screen = hospital.run("check")
    found = verdict(screen, "patients in one split")
    assert found.startswith("look: 2 groups of names look like one patient")
    rows = [int(number) for number in re.findall(r"\d+", found.partition("rows")[2])]
    lines = (hospital.state / "cohort.csv").read_text().splitlines()
    shown = [lines[number - 1].split(",")[1] for number in rows]
    assert len(shown) == 4 and all(name.lower().startswith(("sub", "pat")) for name in shown)
