"""`meduet-simulate privacy=sums`, whole: hospitals, gate, centre, page."""

import json
from pathlib import Path

import pytest

from server.config import compose_config
from simulations.run import run
from tests.small_simulation import small_simulation


def test_a_simulation_with_privacy_ends_with_a_page_that_says_epsilon_as_an_interval(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [
        "privacy=sums",
        "privacy.epsilon=8.0",
        "privacy.style_dimensions=3",
        "privacy.public_scans=72",
    ]
    page = run(compose_config([*small_simulation(patients=24), *settings, f"folder={folder}"]))
    text = page.read_text(encoding="utf-8")
    assert "epsilon 7.998 to 7.999 at delta 1e-05 for the whole run" in text
    assert "a style code (one noised sum over patients)" in text and "Gaussian, deviation" in text
    for site in json.loads((folder / "plan.json").read_text(encoding="utf-8"))["sites"]:
        state = folder / "sites" / site
        lines = (state / "journal.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["record"]["kind"] for line in lines] == ["style_code"]
        assert list(state.rglob("*.secret")) == [] and not (state / "state").exists()
    assert {"reconstruction_error", "style_gap_closed"} <= set(
        json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["final"]
    )


@pytest.mark.parametrize("level", ["adapters", "full"])
def test_a_simulation_with_noisy_steps_says_what_they_were_worth(tmp_path: Path, level: str) -> None:
    folder = tmp_path / "run"
    settings = [f"privacy={level}", "privacy.style_dimensions=3", "privacy.public_scans=72"]
    settings += [
        "privacy.noisy.steps=2",
        "privacy.noisy.steps_per_round=1",
        "privacy.noisy.sampling_rate=0.5",
    ]
    drowned = [*small_simulation(patients=24), *settings, f"folder={folder}"]
    page = run(compose_config([*drowned, "privacy.noisy.although_noise_wins=true"]))
    text = page.read_text(encoding="utf-8")
    assert "then in 2 steps at each hospital on its patients, with noise in each" in text
    assert ("of the output layer alone" in text) == (level == "adapters")
    assert "update of the weights that noisy steps train (weighted sum)" in text
    for site in json.loads((folder / "plan.json").read_text(encoding="utf-8"))["sites"]:
        state = folder / "sites" / site
        records = [json.loads(line)["record"] for line in (state / "journal.jsonl").read_text().splitlines()]
        assert [record["kind"] for record in records] == ["style_code", "private_round", "private_round"]
        assert all(not any("loss" in name for name in record["metrics"]) for record in records)
        assert list(state.rglob("*.secret")) == []


@pytest.mark.parametrize("private", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_simulation_of_secure_sums_ends_with_a_page_that_lists_their_stages(
    tmp_path: Path, private: bool
) -> None:
    settings = ["aggregation.secure_sum=true", "aggregation.norm_tolerance=0", "training.rounds=1"]
    if private:
        settings += ["privacy=full", "privacy.style_dimensions=3", "privacy.public_scans=72"]
        settings += ["privacy.noisy.steps=1", "privacy.noisy.steps_per_round=1"]
        settings += ["privacy.noisy.although_noise_wins=true"]
    small = small_simulation(hospitals=3, patients=24 if private else 8)
    page = run(compose_config([*small, *settings, f"folder={tmp_path / 'run'}"]))
    text = page.read_text(encoding="utf-8")
    assert all(one in text for one in ("fresh keys for a secure sum", "shares that open the sum", ", masked"))
    assert ("Steps left as secure sums: against the centre" in text) == private
