import time

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from meduet_models.erasure import ErasureMoments
from meduet_models.probes import (
    counterfactual_ratio,
    linear_probe_from_sums,
    patient_retrieval,
    read_site,
    retrieval_across_sites,
    site_probe,
    style_gap_closed,
)

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


def test_the_probe_from_sums_equals_the_probe_of_pooled_features() -> None:
    x = (anatomy(2, 8) + shift(0.7, 8)).double()
    moments = {str(s): ErasureMoments.of(x[s * 40 : s * 40 + 40], PATIENTS[:40], bound=1e6) for s in range(3)}
    weight, bias = linear_probe_from_sums(moments, shrinkage=0.1)
    pooled = LinearDiscriminantAnalysis(solver="eigen", priors=[1 / 3] * 3).fit(x, SITES)
    unshrunk, offset = linear_probe_from_sums(moments, shrinkage=0.0)
    scores = x @ unshrunk + offset
    expected = torch.from_numpy(pooled.decision_function(x.numpy()))
    torch.testing.assert_close(scores - scores[:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-4)
    hits = (read_site(x, weight, bias) == torch.tensor(SITES)).double()
    assert hits.mean() > 0.7


def test_retrieval_finds_patients_across_scanners_and_centring_hides_a_shift() -> None:
    content = anatomy(3, 24) + shift(6.0, 24)
    plain = retrieval_across_sites(content, SITES, PATIENTS)
    centred = retrieval_across_sites(content, SITES, PATIENTS, centred=True)
    assert centred.score == 1.0 and plain.score < 0.9
    assert plain.chance == pytest.approx(1 / 40)


def test_content_that_forgot_the_patient_is_retrieved_at_chance() -> None:
    generator = torch.Generator().manual_seed(10)
    names = [str(i) for i in range(200)]
    queries, gallery = torch.randn(2, 200, 8, generator=generator)
    reading = patient_retrieval(queries, gallery, names, names)
    assert reading.score < 0.03  # 6 hits or more of 200 at a chance of 1/200: 1 false alarm in 1,600
    assert reading.chance == pytest.approx(0.005)


def test_a_query_without_a_partner_is_not_asked() -> None:
    x = torch.eye(3)
    assert patient_retrieval(x, x[:2], ["a", "b", "c"], ["a", "b"]).score == 1.0
    with pytest.raises(ValueError, match="got none"):
        patient_retrieval(x, x, ["a", "b", "c"], ["d", "e", "f"])
    with pytest.raises(ValueError, match="two sites"):
        retrieval_across_sites(x, [0, 1, 2], ["a", "b", "c"])
    with pytest.raises(ValueError, match="Expected two sites"):
        site_probe(x, [1, 1, 1], ["a", "b", "c"], 0)


def test_the_gap_closed_is_one_at_the_target_nothing_at_the_source_and_less_beyond() -> None:
    source, target = torch.zeros(5), torch.ones(5)
    readings = [style_gap_closed(x, source, target) for x in (target, source, 0.7 * target, -target)]
    np.testing.assert_allclose(readings, [1.0, 0.0, 0.7, -1.0], atol=1e-6)
    truth, scans = torch.ones(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2)
    ratios = [counterfactual_ratio(x, scans, truth) for x in (truth, scans, truth / 2)]
    np.testing.assert_allclose(ratios, [0.0, 1.0, 0.25])
