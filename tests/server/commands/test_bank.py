"""`meduet-server bank`, as it is typed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from federation.exchanges.latents import ToldLatents
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import StylePlan, TrainingPlan
from federation.terminal import NOT_POSSIBLE
from meduet_models.diffusion.conditions import Examples
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from scans.volume_plan import VolumePlan
from server.cli import main
from server.latent_bank.bank import LatentBank
from tests.worlds import small_network, small_plan

ITEM = "0" * 31


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plan = small_plan(
        name="toy",
        seed=7,
        sites=("north", "south"),
        volumes=VolumePlan(modality="mr", shape=(16, 24, 16)),
        network=small_network(width=16),
        training=TrainingPlan(rounds=2, steps_per_round=2, batch_size=4),
        style=StylePlan(minimum_cohort=3),
        diffusion=DiffusionPlan(
            policy="raw",
            transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
            training=DiffusionTraining(),
        ),
    )
    unknown = torch.full((3,), -1)
    examples = Examples(
        latents=torch.randn(3, 2, 4, 6, 4), site=torch.zeros(3, dtype=torch.long), body_part=unknown,
        spacing=torch.ones(3, 3), category=unknown,
    )  # fmt: skip
    bank = LatentBank(tmp_path / "bank")
    names = tuple(f"{ITEM}{n}" for n in range(3))
    bank.add(
        ToldLatents(
            plan_sha256=plan.sha256, site="north", round=1, first=0, total=3, items=names, examples=examples
        ),
        plan,
    )
    bank.learned(tmp_path / "model.safetensors", "a" * 64, 1)
    bank.close()
    return tmp_path / "bank"


def typed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    assert main(["bank", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_bank_is_listed_verified_and_an_item_taken_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = typed(capsys, "list", folder, "--items")
    assert listed["patient_data"] is True and listed["sites"]["north"]["kept"] == 3
    assert [item["item"][-1] for item in listed["listed"]] == ["0", "1", "2"]
    assert typed(capsys, "verify", folder) == {"sound": 3, "quarantined_now": 0}
    gone = typed(capsys, "forget", folder, "--item", f"{ITEM}1")
    assert gone["items"] == 1 and Path(gone["models"][0]).name == "model.safetensors"
    assert typed(capsys, "verify", folder)["sound"] == 2
    assert typed(capsys, "forget", folder, "--site", "north")["items"] == 2
    listed = typed(capsys, "list", folder)
    assert listed["items"] == 0 and listed["models"][0]["withdrawn"] == 3


def test_people_read_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bank", "list", str(folder), "--items"]) == 0
    assert main(["bank", "verify", str(folder)]) == 0
    assert main(["bank", "forget", str(folder), "--site", "north"]) == 0
    assert main(["bank", "list", str(folder)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "PATIENT DATA" in text and "3 records open; 0 do not" in text
    assert "3 items were overwritten" in text and "train it again without" in text
    assert "(withdrew)" in text


def test_what_cannot_be_done_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = folder.with_name("nowhere")
    for arguments, why in (
        (["list", str(nowhere)], "there is none"),
        (["forget", str(folder), "--item", "abc"], "it has no 'abc'"),
        (["forget", str(folder), "--site", "west"], "nothing of 'west'"),
        (["verify", str(folder), "--key", str(folder.with_name("other.key"))], "there is none"),
    ):
        assert main(["bank", *arguments]) == NOT_POSSIBLE
        error = capsys.readouterr().err.strip()
        assert why in error and "\n" not in error
    assert not nowhere.exists() and not nowhere.with_name("nowhere.key").exists()
