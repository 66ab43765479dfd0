"""Nothing leaves before a person at the site has said that its patients are told apart rightly."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console

import client.settings
from client.cli import main
from client.consent.confirmation import FILE, confirm, unconfirmed
from client.exchanges.exchange import AskRefused
from client.scans.patients import PatientMap
from client.settings import SiteConfig
from client.site import Site
from client.site_scans import confirm_patients
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import pca_tokenizer, save_tokenizer
from scans.volume_plan import VolumePlan

FOUND = PatientMap("a rule", {"P1/a.nii": "P1", "P2/a.nii": "P2"}, ("a doubt",))


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).random((14, 20, 15)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), path)


def test_what_was_confirmed_stays_confirmed_and_is_kept_for_the_owner_only(tmp_path: Path) -> None:
    assert "nobody here has confirmed" in unconfirmed(tmp_path, tmp_path, FOUND)
    confirm(tmp_path, tmp_path, FOUND)
    assert unconfirmed(tmp_path, tmp_path, FOUND) == ""
    assert json.loads((tmp_path / FILE).read_text())["patients_confirmed"] == FOUND.sha256
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0


CHANGES = {
    "another patient of a known scan": (
        {"P1/a.nii": "P2", "P2/a.nii": "P2"},
        {},
        "1 scans have another patient",
    ),
    "another rule": (dict(FOUND.patients), {"rule": "another"}, "the rule that tells"),
    "a new doubt": (
        {**FOUND.patients, "P3/a.nii": "P3"},
        {"doubts": ("a doubt", "another")},
        "a doubt about who",
    ),
    "all other scans": ({"P8/a.nii": "P8"}, {}, "none of the scans"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_map_must_be_confirmed_again(tmp_path: Path, change: str) -> None:
    confirm(tmp_path, tmp_path, FOUND)
    patients, more, reason = CHANGES[change]
    changed = dataclasses.replace(FOUND, patients=patients, **more)  # type: ignore[arg-type]
    assert reason in unconfirmed(tmp_path, tmp_path, changed)


def test_scans_that_the_same_rule_gives_a_patient_and_scans_that_went_need_no_new_word(
    tmp_path: Path,
) -> None:
    confirm(tmp_path, tmp_path, FOUND)
    grown = dataclasses.replace(FOUND, patients={"P1/a.nii": "P1", "P1/b.nii": "P1", "P3/a.nii": "P3"})
    assert unconfirmed(tmp_path, tmp_path, grown) == ""
    assert "another data folder" in unconfirmed(tmp_path, tmp_path / "elsewhere", grown)


@pytest.mark.parametrize("content", ["", "{}", '{"patients_confirmed": 7}', "[]"])
def test_a_damaged_confirmation_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert "nobody here has confirmed" in unconfirmed(tmp_path, tmp_path, FOUND)


@pytest.fixture
def site(tmp_path: Path, toy_plan: Callable[..., RunPlan]) -> tuple[Site, RunPlan]:
    for number in range(4):
        write(tmp_path / "scans" / f"P{number}" / "t1.nii.gz", number)
    config = SiteConfig(
        name="south", data_root=tmp_path / "scans", state_dir=tmp_path / "state", device="cpu",
        allow_non_private=True, plan_approval="implied",
    )  # fmt: skip
    tokenizer = pca_tokenizer(PatchMoments.of(torch.rand(4, 1, 16, 16, 16)), 2)
    volumes = VolumePlan(modality="mr", shape=(16, 24, 16), spacing_mm=(2.0, 2.0, 2.0))
    return Site(config, tokenizer), toy_plan(volumes=volumes, tokenizer_sha256=tokenizer.sha256)


def test_no_answer_is_given_before_the_patients_are_confirmed(site: tuple[Site, RunPlan]) -> None:
    opened, plan = site
    with pytest.raises(AskRefused, match="confirm-patients") as refused:
        opened.scans(plan)
    assert refused.value.kind is RefusalKind.PATIENTS_NOT_CONFIRMED
    assert "P1" not in str(refused.value), "what is refused names nobody"
    confirm_patients(opened.config)
    assert opened.scans(plan).num_scans == 4


def test_a_running_site_whose_patients_change_stops_answering(
    site: tuple[Site, RunPlan], tmp_path: Path
) -> None:
    opened, plan = site
    confirm_patients(opened.config)
    (tmp_path / "scans" / "P1").rename(tmp_path / "scans" / "P0_followup")  # now a second scan of P0
    write(tmp_path / "scans" / "P1" / "t1.nii.gz", 9)
    changed = Site(dataclasses.replace(opened.config, patient_pattern=r"(P)\d"), opened.tokenizer)
    with pytest.raises(AskRefused, match="The rule that tells patients apart is another"):
        changed.scans(plan)


def run(config: Path, *arguments: str) -> tuple[int, str]:
    screen = io.StringIO()
    status = main([*arguments, "--config", str(config)], Console(file=screen, width=300, soft_wrap=True))
    return status, screen.getvalue()


def test_check_shows_the_guess_and_confirms_it_when_told(tmp_path: Path) -> None:
    for number in range(3):
        for visit in ("2019-03-01", "2020-04-02"):
            write(
                tmp_path / "scans" / f"P{number}" / visit / "t1.nii.gz",
                10 * number + len(visit) + int(visit[3]),
            )
    tokenizer = pca_tokenizer(PatchMoments.of(torch.rand(4, 1, 16, 16, 16)), 2)
    save_tokenizer(tmp_path / "tokenizer.safetensors", tokenizer, {})
    settings = tmp_path / "site.yaml"
    settings.write_text(
        "name: north\ndata_root: scans\nstate_dir: state\nallow_non_private: true\nplan_approval: implied\n"
        "tokenizer: {kind: file, path: tokenizer.safetensors, channels: 2}\n"
    )
    status, screen = run(settings, "check")
    assert status == 0 and "3 patients, e.g. P0/2019-03-01/t1.nii.gz is patient P0. Rule: " in screen
    assert "start refuses until then" in screen and not (tmp_path / "state" / FILE).exists()
    status, screen = run(settings, "check", "--confirm-patients")
    kept = json.loads((tmp_path / "state" / FILE).read_text())
    assert status == 0 and f"patients_confirmed: {kept['patients_confirmed']}" in screen
    status, screen = run(settings, "check")
    assert "3 patients, as confirmed" in screen and "P0" not in screen


def test_nothing_is_confirmed_where_no_scan_has_a_patient(tmp_path: Path) -> None:
    for visit in ("baseline", "followup"):
        write(tmp_path / "scans" / visit / "t1.nii.gz", len(visit))
    config = SiteConfig(name="south", data_root=tmp_path / "scans", state_dir=tmp_path / "state")
    with pytest.raises(ValueError, match="Set patient_pattern"):
        confirm_patients(config)


def test_start_refuses_until_the_patients_are_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "scans" / "P1" / "t1.nii.gz", 1)
    (tmp_path / "site.yaml").write_text("name: north\ndata_root: scans\nstate_dir: state\n")
    monkeypatch.setattr("client.connection.supernode.supernode_processes", lambda *given: ())

    def begin(*given: object) -> None:
        raise SystemExit(0)  # as the supervisor ends: it never returns

    monkeypatch.setattr("federation.programs.processes.become_supervisor", begin)
    status, screen = run(tmp_path / "site.yaml", "start")
    assert status == 2 and "Not started: nobody here has confirmed" in screen
    confirm_patients(client.settings.load_site_config(tmp_path / "site.yaml"))
    with pytest.raises(SystemExit):
        run(tmp_path / "site.yaml", "start")
