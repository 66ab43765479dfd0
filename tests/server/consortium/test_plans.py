"""Making the plan of a consortium, from settings to the file that sites approve."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from client.commands.plan_words import plan_words
from federation.plan.plan import RunPlan
from federation.published_plan import PublishedPlan, plan_of
from meduet_models.anatomy_start import save_start
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from meduet_models.volume_unet import VolumeUNet
from server.cli import main
from server.consortium.plans import make_plan
from server.consortium.provisioning import ConsortiumSettings, SiteEntry
from server.deployment.submission import Submission

SITES = ConsortiumSettings(
    name="spine", server="localhost:9443", sites=(SiteEntry(name="north"), SiteEntry(name="south"))
)
YAML = "name: spine\nserver: localhost:9443\nsites: [{name: north}, {name: south}]\n"


def test_it_is_of_the_sites_of_the_consortium_on_the_grid_of_real_scans() -> None:
    plan = make_plan(SITES, ["training.rounds=7", "release.wire_dtype=mxint8"])
    assert (plan.name, plan.sites) == ("spine", ("north", "south"))
    assert (plan.training.rounds, plan.release.wire_dtype) == (7, "mxint8")
    assert plan.volumes.shape == (64, 80, 64) and not plan.volumes.registered
    assert plan.network.latent_grid == (16, 20, 16)
    assert plan.tokenizer_sha256 == load_tokenizer(TokenizerSpec()).sha256


def test_an_experiment_or_a_group_says_another_grid_and_a_name_another_name() -> None:
    assert make_plan(SITES, ["experiment=hippocampus"]).volumes.shape == (32, 48, 32)
    plan = make_plan(SITES, ["hospitals=split", "volumes.shape=[32,32,32]", "name=other"])
    assert (plan.name, plan.volumes.shape) == ("other", (32, 32, 32))


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("engine=ray", "engine=ray has no effect on a plan"),
        ("hospitals.patients=3", "hospitals.patients=3 has no effect"),
        ("+folder=runs/x", "has no effect"),
        ("training.roundz=3", "Could not override 'training.roundz'"),
        ("network=enormous", "Could not find 'network/enormous'"),
        ("training.rounds=many", "training.rounds to be int"),
        ("release.wire_dtype=int3", "float32, bfloat16, mxint8"),
        ("volumes.shape=[33,32,32]", "multiples of the tokenizer's stride"),
        ("training.batch_size=3", "batch_size from 4"),
        ("tokenizer.kind=maisi", "path of a weights file"),
    ],
)
def test_a_setting_that_is_wrong_or_has_no_effect_is_refused(setting: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        make_plan(SITES, [setting])
    assert "\n" not in str(error.value)


def test_from_the_command_line_to_what_sites_approve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consortium, out = tmp_path / "consortium.yaml", tmp_path / "plan.json"
    consortium.write_text(YAML)
    command = ["plan", "training.rounds=7", "--consortium", str(consortium), "--out", str(out)]
    assert main(command) == 0 and main(command) == 0  # the same again
    plan = RunPlan.from_json(out.read_text())
    assert plan.sha256 in capsys.readouterr().out
    assert main(["publish", str(out), "--out", str(tmp_path / "plans")]) == 0
    (published,) = (tmp_path / "plans").iterdir()
    assert plan_of(published.read_text()) == plan
    capsys.readouterr()
    assert main(["plan", "training.rounds=8", *command[2:]]) == 2
    assert "Expected no other plan" in capsys.readouterr().err
    assert RunPlan.from_json(out.read_text()) == plan


def test_a_start_from_public_anatomy_is_in_the_plan_by_its_hash_and_said_to_sites(tmp_path: Path) -> None:
    starts = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(starts):
        save_start(path, "shapes", VolumeUNet(seed=seed).state_dict(), {})
    asked = ["network.encoder=volume_unet", "anatomy_start=shapes"]
    first, other = (make_plan(SITES, asked, anatomy=path) for path in starts)
    assert first.anatomy_sha256 not in (None, "0" * 64, other.anatomy_sha256)
    words = " ".join(text for _, text in plan_words(PublishedPlan(plan=first, bundle_sha256="0" * 64), 5))
    assert "by a U-Net (no other voxels); it starts from random shapes, in which no patient is." in words
    (tmp_path / "plan.json").write_text(first.to_json())
    centre = SimpleNamespace(consortium=tmp_path)
    submission = Submission(centre, tmp_path / "plan.json", tmp_path / "run", anatomy=starts[0])  # type: ignore[arg-type]
    assert submission._settings["anatomy"] == str(starts[0])
    for settings, why in (
        (["network.encoder=volume_unet"], "anatomy has no effect"),
        (["anatomy_start=shapes"], r"no effect with network\.encoder=vit"),
        ([asked[0], "anatomy_start=canonical"], "Expected anatomy_start=canonical; the file is of shapes"),
    ):
        with pytest.raises(ValueError, match=why):
            make_plan(SITES, settings, anatomy=starts[0])
