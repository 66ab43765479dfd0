import time

import pytest
import torch
from torch import Tensor

from meduet_models.probes.quick import site_probe

PATIENTS = [f"p{i}" for i in range(40)] * 3
SITES = [s for s in range(3) for _ in range(40)]


def anatomy(seed: int = 0, width: int = 16) -> Tensor:
    """The same forty patients at three sites: anatomy and nothing else."""
    return torch.randn(40, width, generator=torch.Generator().manual_seed(seed)).repeat(3, 1)


def shift(strength: float, width: int = 16) -> Tensor:
    return strength * torch.randn(3, width, generator=torch.Generator().manual_seed(5))[torch.tensor(SITES)]


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_a_probe_reads_a_site_that_is_there_and_guesses_where_it_is_not(probe: str) -> None:
    noise = 0.3 * torch.randn(120, 16, generator=torch.Generator().manual_seed(6))
    there = site_probe(anatomy() + shift(2.0) + noise, SITES, PATIENTS, 0, probe)  # type: ignore[arg-type]
    absent = site_probe(anatomy() + noise, SITES, PATIENTS, 0, probe)  # type: ignore[arg-type]
    assert there.score > 0.9 and there.chance == pytest.approx(1 / 3)
    assert (
        absent.score < 1 / 3 + 0.16
    )  # three and a half standard errors of 120 guesses: 1 false alarm in 4,000


def test_only_the_mlp_reads_a_site_that_changes_no_mean() -> None:
    generator = torch.Generator().manual_seed(7)
    spread = torch.tensor([0.2, 1.0, 4.0]).repeat_interleave(80)[:, None]
    x = spread * torch.randn(240, 6, generator=generator)
    sites, patients = [s for s in range(3) for _ in range(80)], [str(i) for i in range(240)]
    linear, mlp = (site_probe(x, sites, patients, 0, kind) for kind in ("linear", "mlp"))  # type: ignore[arg-type]
    assert mlp.score > linear.score + 0.2


def test_a_probe_cannot_recognise_a_patient_from_the_other_views_it_was_trained_on() -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(30, 64, generator=generator).repeat_interleave(4, 0)
    patients = [str(i) for i in range(30) for _ in range(4)]
    arbitrary = [int(s) for s in torch.randint(3, (30,), generator=generator) for _ in range(4)]
    leaky = site_probe(x, arbitrary, [str(i) for i in range(120)], 0)
    fair = site_probe(x, arbitrary, patients, 0)
    assert leaky.score > 0.9 and fair.score < 0.66


def test_a_reading_is_a_function_of_its_seed_and_leaves_the_global_draw_alone() -> None:
    x = anatomy(1) + shift(0.3)
    before = torch.get_rng_state()
    first, same = (site_probe(x, SITES, PATIENTS, 3, "mlp") for _ in range(2))
    assert first == same
    assert torch.equal(before, torch.get_rng_state())


def test_a_linear_probe_of_hundreds_of_scans_takes_less_than_two_seconds() -> None:
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(9))
    x[:, 0] = 3.0  # a feature that never varies
    start = time.process_time()
    site_probe(x, [i % 4 for i in range(400)], [str(i // 4) for i in range(400)], 0)
    assert time.process_time() - start < 2


def test_scans_of_one_site_cannot_be_probed() -> None:
    with pytest.raises(ValueError, match="Expected two sites"):
        site_probe(torch.eye(3), [1, 1, 1], ["a", "b", "c"], 0)
