"""A scan named on a command line: a file, or an item of the bank; one line for anything else."""

import dataclasses
from pathlib import Path

import pytest
import torch

from meduet_models.encoded_scan import save_encoded_scan
from server.latent_bank.bank import LatentBank
from server.synthesis.banked_scan import named_scan
from tests.server.latent_bank.small_bank import a_plan, name, reply, some


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plan = a_plan()
    bank = LatentBank(tmp_path / "bank")
    bank.add(reply(plan, [3, 4]), plan)
    bank.add(reply(plan, [3], "south"), plan)  # the same latents: kept once
    bank.close()
    return tmp_path / "bank"


def test_an_item_of_the_bank_is_its_scan_and_fits_the_plans_model(folder: Path, tmp_path: Path) -> None:
    plan = a_plan()
    scan = named_scan(f"bank:{name(4)}", folder, None)
    assert torch.equal(scan.latents, some([4]).latents[0])
    scan.check(plan.tokenizer_sha256, dataclasses.asdict(plan.volumes))
    save_encoded_scan(tmp_path / "scan.safetensors", scan)
    assert named_scan(str(tmp_path / "scan.safetensors"), None, None).sha256 == scan.sha256


def test_what_is_not_there_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    cases = [
        (f"bank:{name(9)}", folder, "it has no"),
        ("bank:'; drop", folder, "it has no"),
        (f"bank:{name(3, 'south')}", folder, "duplicate"),
        (f"bank:{name(3)}", None, "--bank"),
        (f"bank:{name(3)}", tmp_path / "none", "there is none"),
        (str(tmp_path / "none.safetensors"), None, "there is none"),
    ]
    for given, where, words in cases:
        with pytest.raises(ValueError, match=words) as raised:
            named_scan(given, where, None)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "none").exists()
