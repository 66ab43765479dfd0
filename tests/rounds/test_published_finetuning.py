"""A fine-tuning from its settings to its weights, as the centre's commands and application do it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from federation.plan.plan import RunPlan
from meduet_models.anatomy_start import save_start
from meduet_models.meduet import FactorNetwork
from meduet_models.volume_unet import VolumeUNet
from meduet_models.weights import save_weights
from server.consortium.plans import finetuning_to_run, make_finetuning, plan_to_run, publish
from server.deployment.status import read_status
from server.deployment.submission import Submission
from server.exchanges.finetuning import FINETUNED, MODEL
from server.run_folder import is_complete
from server.server_app import finetune_in_folder, run_in_folder
from tests.rounds.test_finetuning_rounds import grid_of

SETTINGS = (
    "local.task=classification", "local.classes=2", "local.steps=2", "target=disease",
    "target_values=[no, yes]", "rounds=2",
)  # fmt: skip
"""YAML takes no and yes for truth values; a covariate does not."""


@pytest.fixture
def plan(miniature: Any) -> RunPlan:
    return miniature.plan(deadline_s=60.0)


@pytest.fixture
def pretrained(plan: RunPlan, tmp_path: Path) -> Path:
    """The folder of a finished pretraining."""
    folder = tmp_path / "pretrained"
    folder.mkdir()
    provenance = {
        "network": json.dumps(dataclasses.asdict(plan.network)),
        "tokenizer_sha256": plan.tokenizer_sha256,
        "plan_sha256": plan.sha256,
    }
    save_weights(folder / MODEL, FactorNetwork(plan.network, seed=5).state_dict(), provenance)
    return folder


@pytest.fixture
def published(plan: RunPlan, pretrained: Path, tmp_path: Path) -> Path:
    made = make_finetuning(pretrained, SETTINGS)
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "finetuning.json").write_text(made.to_json())
    return publish(tmp_path / "plan.json", tmp_path / "published", tmp_path / "finetuning.json")[0]


def test_a_published_fine_tuning_is_recognised_run_and_complete(
    published: Path, pretrained: Path, tmp_path: Path
) -> None:
    plan, finetuning = plan_to_run(published), finetuning_to_run(published)
    assert finetuning is not None and finetuning.target_values == ("no", "yes")
    finetuning = dataclasses.replace(finetuning, target="sex", target_values=("F", "M"))
    folder = tmp_path / "fine"
    finetune_in_folder(grid_of(plan, tmp_path), plan, finetuning, pretrained, folder)
    assert is_complete(folder, finetuning.sha256)
    assert (folder / FINETUNED).is_file()
    status = read_status(folder) or {}
    assert (status["state"], status["plan"], status["rounds"]) == ("complete", finetuning.sha256, 2)
    assert all(site["bytes_up"] > 0 for site in status["sites"].values())
    with pytest.raises(ValueError, match=r"its finetuning\.json is another"):
        run_in_folder(grid_of(plan, tmp_path), plan, folder)


def test_the_weights_of_another_run_are_refused_for_good(
    published: Path, plan: RunPlan, tmp_path: Path
) -> None:
    finetuning = finetuning_to_run(published)
    assert finetuning is not None
    with pytest.raises(ValueError, match="there is none"):
        finetune_in_folder(grid_of(plan, tmp_path), plan, finetuning, tmp_path / "absent", tmp_path / "fine")
    assert (read_status(tmp_path / "fine") or {})["state"] == "refused"


def test_one_kind_of_plan_is_not_run_as_the_other(published: Path, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--pretrained"):
        Submission(None, published, tmp_path / "fine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no effect"):
        Submission(None, tmp_path / "plan.json", tmp_path / "fine", pretrained=pretrained)  # type: ignore[arg-type]


def start_of(path: Path, seed: int) -> Path:
    save_start(path, "canonical", VolumeUNet(seed=seed).state_dict(), {})
    return path


def test_a_start_from_public_anatomy_is_named_by_its_hash_and_no_other_is_trained(
    plan: RunPlan, pretrained: Path, tmp_path: Path
) -> None:
    own, other = start_of(tmp_path / "own.safetensors", 1), start_of(tmp_path / "other.safetensors", 2)
    settings = ["local.task=segmentation", "local.classes=2", "local.steps=1", "rounds=1"]
    settings += ["local.network=volume_unet", "anatomy_start=canonical"]
    finetuning = make_finetuning(pretrained, settings, own)
    assert make_finetuning(pretrained, settings, other).pretrained_sha256 != finetuning.pretrained_sha256
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "finetuning.json").write_text(finetuning.to_json())
    path = publish(tmp_path / "plan.json", tmp_path / "published", tmp_path / "finetuning.json")[0]
    with pytest.raises(ValueError, match="Expected the pretrained encoder"):
        finetune_in_folder(
            grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "no", anatomy=other
        )
    folder = tmp_path / "fine"
    finetune_in_folder(grid_of(plan, tmp_path), plan, finetuning, pretrained, folder, anatomy=own)
    assert is_complete(folder, finetuning.sha256)
    centre = SimpleNamespace(consortium=tmp_path)
    submission = Submission(centre, path, folder, pretrained=pretrained, anatomy=own)  # type: ignore[arg-type]
    assert submission._settings["anatomy"] == str(own)


def test_a_file_of_a_start_is_refused_where_nothing_starts_from_it(
    published: Path, pretrained: Path, tmp_path: Path
) -> None:
    own = start_of(tmp_path / "own.safetensors", 1)
    with pytest.raises(ValueError, match="--anatomy has no effect"):
        make_finetuning(pretrained, SETTINGS, own)
    with pytest.raises(ValueError, match="--anatomy has no effect"):
        Submission(None, published, tmp_path, pretrained=pretrained, anatomy=own)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "setting", ["rounds", "run_sha256=0", "nonsense=3", "network.width=3", "local.steps=0"]
)
def test_a_setting_that_a_fine_tuning_does_not_have_is_refused(pretrained: Path, setting: str) -> None:
    with pytest.raises(ValueError, match=r"Expected|no setting"):
        make_finetuning(pretrained, [*SETTINGS, setting])
