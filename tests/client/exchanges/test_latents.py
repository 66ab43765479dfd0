"""Latents that leave a site: consent before anything is read, and a real site's own answer."""

import csv
import io
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console

import client.site_scans
from client.books.answers import KeptAnswers
from client.cli import main
from client.declared import GateRefusal
from client.exchanges.exchange import AskRefused
from client.exchanges.latents import ANSWER, KEY_NAME, TABLE_NAME
from client.latents.examples import examples_of
from client.release import Gate
from client.settings import load_site_config
from client.site import Site, open_site
from client.site_scans import confirm_patients
from federation.exchanges.latents import LatentsAsk, from_tensors
from federation.journal import Journal
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import RunPlan
from federation.plan.release_policy import RAW
from federation.wire.wire import RefusalKind
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import Tokenizer, pca_tokenizer, save_tokenizer
from privacy.ledger import Ledger, LedgerRefusal, Place
from privacy.promise import Promise
from scans.volume_plan import VolumePlan
from server.config import compose_config, plain
from simulations.consortium import site_configs
from simulations.hospitals.plans import Hospital
from simulations.settings import settings_from
from tests.worlds import RECIPIENT

DIFFUSION = DiffusionPlan(
    policy="raw",
    recipient=RECIPIENT,
    transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
    training=DiffusionTraining(),
    conditions=("content", "spacing"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(10):
        path = tmp_path / "scans" / f"Mustermann{number}" / "t1.nii.gz"
        path.parent.mkdir(parents=True)
        array = np.random.default_rng(number).random((14, 20, 15)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.5, 3.0, 1.0])), path)
    save_tokenizer(tmp_path / "tokenizer.safetensors", _tokenizer(), {})
    return tmp_path


def _tokenizer() -> Tokenizer:
    volumes = torch.rand(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    return pca_tokenizer(PatchMoments.of(volumes), 2)


@pytest.fixture
def plan(folder: Path, toy_plan: Callable[..., RunPlan]) -> RunPlan:
    volumes = VolumePlan(modality="mr", shape=(16, 24, 16), spacing_mm=(2.0, 2.0, 2.0))
    plan = toy_plan(volumes=volumes, tokenizer_sha256=_tokenizer().sha256, diffusion=DIFFUSION)
    (folder / "plan.json").write_text(plan.to_json())
    return plan


def site_yaml(folder: Path, sentence: str = "") -> Path:
    path = folder / "site.yaml"
    lines = [
        "name: north", "data_root: scans", "state_dir: state", "device: cpu", "minimum_cohort: 3",
        "allow_non_private: true", "plan_approval: implied",
        "tokenizer: {kind: file, path: tokenizer.safetensors, channels: 2}",
    ]  # fmt: skip
    if sentence:
        lines.append(f"latent_release: {json.dumps(sentence)}")
    path.write_text("\n".join(lines))
    return path


def a_site(folder: Path) -> Site:
    """The site that agreed to the release, and confirmed who its patients are."""
    path = site_yaml(folder, RAW.consent)
    confirm_patients(load_site_config(path))
    return open_site(path)


def ask(plan: RunPlan, first: int = 0, count: int = 5) -> LatentsAsk:
    return LatentsAsk(plan_json=plan.to_json(), round=1, first=first, count=count)


def checked(folder: Path) -> tuple[int, str]:
    screen = io.StringIO()
    arguments = ["check", "--config", str(folder / "site.yaml"), "--plan", str(folder / "plan.json")]
    return main(arguments, Console(file=screen, width=400, soft_wrap=True)), screen.getvalue()


def test_without_the_sentence_no_part_of_a_raw_plan_is_answered_and_no_scan_is_read(
    folder: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*given: object, **named: object) -> None:
        raise AssertionError("a scan was read")

    monkeypatch.setattr(client.site_scans, "remembered", read)
    site = open_site(site_yaml(folder))
    for answer in (lambda: site.accept(plan), lambda: ANSWER.once(site, ask(plan), plan)):
        with pytest.raises(AskRefused, match=r"latent_release.*Nothing was read") as refusal:
            answer()
        assert refusal.value.kind is RefusalKind.PLAN_NOT_ACCEPTED
    assert site.ledger.verify() == site.journal.verify() == 0
    federated = DiffusionPlan(
        policy="federated", transformer=DIFFUSION.transformer, training=DIFFUSION.training, rounds=2
    )
    site.accept(_with(plan, federated))


def _with(plan: RunPlan, diffusion: DiffusionPlan) -> RunPlan:
    return replace(plan, diffusion=diffusion)


@pytest.mark.parametrize("sentence", ["yes", RAW.consent.rstrip("."), RAW.consent.lower(), " " + RAW.consent])
def test_another_sentence_is_an_error_of_the_settings(folder: Path, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"site\.yaml: Expected latent_release .* word for word") as error:
        open_site(site_yaml(folder, sentence))
    assert "\n" not in str(error.value)


def test_a_real_site_releases_its_training_scans_as_they_are_encoded(folder: Path, plan: RunPlan) -> None:
    site = a_site(folder)
    released = [ANSWER.once(site, ask(plan, first), plan) for first in (0, 5, 10)]
    names = [name for one in released for name in one.record["items"]]
    table = list(csv.DictReader((folder / "state" / TABLE_NAME).read_text().splitlines()))
    assert [line["item"] for line in table] == names
    scans = site.scans(plan)
    rows = [scans.patients.index(line["patient"]) for line in table]
    assert sorted(rows) == scans.indices("train") and len(rows) < scans.num_scans
    assert all(str(scans.entries[row].path) == line["scan"] for row, line in zip(rows, table, strict=True))
    left = from_tensors(dict(released[0].tensors))
    truth = examples_of(scans, rows[:5], plan)
    assert torch.equal(left.latents, truth.latents)
    assert left.spacing.tolist() == [[2.0, 2.5, 3.0]] * 5
    assert {one.counts["num_items"] for one in released} == {len(rows)}
    for name in (TABLE_NAME, KEY_NAME):
        assert stat.S_IMODE((folder / "state" / name).stat().st_mode) == 0o600
    journal = (folder / "state" / "journal.jsonl").read_text()
    assert "Mustermann" not in journal and names[0] in journal


def test_the_same_question_has_the_same_answer_after_a_restart(folder: Path, plan: RunPlan) -> None:
    first = ANSWER.once(a_site(folder), ask(plan), plan)
    again = ANSWER.once(a_site(folder), ask(plan), plan)
    assert first.record["sha256"] == again.record["sha256"]
    assert first.record["items"] == again.record["items"]
    assert first.record["ledger"] == again.record["ledger"]  # charged once
    lines = (folder / "state" / TABLE_NAME).read_text().splitlines()
    assert len(lines) == len(set(lines)) == 6


def test_the_key_of_the_names_is_not_replaced_when_it_is_damaged(folder: Path, plan: RunPlan) -> None:
    site = a_site(folder)
    ANSWER.once(site, ask(plan), plan)
    (folder / "state" / KEY_NAME).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"32 bytes .* got 5"):
        ANSWER.once(site, ask(plan), plan)


def test_a_site_that_agrees_to_nothing_without_privacy_releases_no_latents(
    folder: Path, plan: RunPlan
) -> None:
    path = site_yaml(folder, RAW.consent)
    path.write_text(path.read_text().replace("allow_non_private: true", "allow_non_private: false"))
    with pytest.raises(LedgerRefusal, match="Nothing was read"):
        ANSWER.once(open_site(path), ask(plan), plan)


def test_check_says_whether_the_plans_policy_is_agreed_to(folder: Path, plan: RunPlan) -> None:
    site_yaml(folder)
    status, screen = checked(folder)
    assert status == 1 and "makes sites release raw latents" in screen
    assert RAW.consent in " ".join(screen.split())  # what to write, if one agrees
    site_yaml(folder, RAW.consent)
    assert "raw latents leave: patient data" in checked(folder)[1]
    (folder / "plan.json").write_text(_with_none(plan).to_json())
    assert "no latents leave" in checked(folder)[1]


def _with_none(plan: RunPlan) -> RunPlan:
    return replace(plan, diffusion=None)


def test_simulated_hospitals_agree_to_what_the_plan_asks(plan: RunPlan, tmp_path: Path) -> None:
    hospital = Hospital(name="north", root=tmp_path / "scans", layout="plain")
    settings, _ = settings_from(plain(compose_config([])))
    (config,) = site_configs([hospital], plan, settings, tmp_path / "state")
    Site(config, _tokenizer()).accept(plan)
    (silent,) = site_configs([hospital], _with_none(plan), settings, tmp_path / "state")
    with pytest.raises(AskRefused):
        Site(silent, _tokenizer()).accept(plan)


class Door:
    def __init__(self, folder: Path) -> None:
        self.ledger, self.journal = Ledger(folder / "l.jsonl"), Journal(folder / "j.jsonl")
        self.answers = KeptAnswers(folder / "answers")
        self.gate = self.opened(Promise(kind="latents", bound=2.0, unit="scan", enforcement="each"))

    def opened(self, promise: Promise) -> Gate:
        place = Place(plan_sha256="9f3c" * 16, kind=promise.kind, round=1)
        reservation = self.ledger.reserve(place, "a5" * 32, promise)
        return Gate(reservation, self.ledger, self.journal, self.answers)


NAMES = [f"{n:032x}" for n in range(3)]


def test_the_gate_bounds_each_scan_by_itself(tmp_path: Path) -> None:
    door = Door(tmp_path)
    rows = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]])
    leaving = {"latents": rows, "site": torch.tensor([900.0, 1.0, 2.0], dtype=torch.float64)}
    shapes = {"latents": (3, 2), "site": (3,)}
    released = door.gate.release(leaving, shapes, weight=3.0, not_covered=frozenset({"site"}), items=NAMES)
    lengths = released.tensors["latents"].norm(dim=1)
    assert lengths[0] <= 2.0 and lengths[0] == pytest.approx(2.0, rel=1e-5)
    assert torch.equal(released.tensors["latents"][1:], rows[1:])
    assert torch.equal(released.tensors["site"], leaving["site"])
    record = released.record
    assert (record["clipped"], record["bound"], record["norm_before"]) == (True, 2.0, 5.0)
    assert record["norm_after"] <= 2.0 and record["items"] == NAMES


@pytest.mark.parametrize("items", [[], NAMES[:2], [NAMES[0], NAMES[0], NAMES[1]], ["Jane Doe", *NAMES[:2]]])
def test_a_scan_without_an_opaque_name_of_its_own_stays_inside(tmp_path: Path, items: list[str]) -> None:
    door = Door(tmp_path)
    with pytest.raises(GateRefusal, match="opaque names"):
        door.gate.release({"latents": torch.ones(3, 2)}, {"latents": (3, 2)}, weight=3.0, items=items)
    assert door.journal.verify() == 0


def test_a_row_more_than_there_are_names_and_names_beside_a_sum_stay_inside(tmp_path: Path) -> None:
    door = Door(tmp_path)
    with pytest.raises(GateRefusal, match="row of every tensor"):
        door.gate.release({"latents": torch.ones(4, 2)}, {"latents": (4, 2)}, weight=3.0, items=NAMES)
    total = door.opened(Promise(kind="round", bound=2.0, unit="site update", enforcement="clip"))
    with pytest.raises(GateRefusal, match="opaque names"):
        total.release({"w": torch.ones(3)}, {"w": (3,)}, weight=3.0, items=NAMES)
    assert door.journal.verify() == 0


def test_an_empty_answer_passes_and_is_in_the_journal(tmp_path: Path) -> None:
    door = Door(tmp_path)
    released = door.gate.release({"latents": torch.ones(0, 2)}, {"latents": (0, 2)}, weight=0.0)
    assert released.record["items"] == [] and door.journal.verify() == 1
