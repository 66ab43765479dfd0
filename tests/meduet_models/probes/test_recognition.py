import pytest
import torch
from torch import Tensor

from meduet_models.probes.recognition import (
    patient_retrieval,
    recognised,
    recognition_among_all,
    retrieval_across_sites,
)

PATIENTS = [f"p{i}" for i in range(40)] * 3
SITES = [s for s in range(3) for _ in range(40)]


def anatomy(seed: int = 0, width: int = 16) -> Tensor:
    """The same forty patients at three sites: anatomy and nothing else."""
    return torch.randn(40, width, generator=torch.Generator().manual_seed(seed)).repeat(3, 1)


def shift(strength: float, width: int = 16) -> Tensor:
    return strength * torch.randn(3, width, generator=torch.Generator().manual_seed(5))[torch.tensor(SITES)]


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


def test_among_all_a_vector_that_knows_the_style_finds_others_in_it_first() -> None:
    clean = recognition_among_all(anatomy(3, 24), SITES, PATIENTS)
    shifted = recognition_among_all(anatomy(3, 24) + shift(6.0, 24), SITES, PATIENTS)
    assert clean.score == 1.0
    assert shifted.score < 0.2
    assert clean.chance == pytest.approx(2 / 119)
    with pytest.raises(ValueError, match="two sites"):
        recognition_among_all(torch.eye(3), [0, 1, 2], ["a", "b", "c"])


def test_who_is_recognised_is_said_query_by_query() -> None:
    hits = recognised(torch.eye(3)[[0, 2]], torch.eye(3), ["a", "b"], ["a", "b", "c"])
    assert hits.tolist() == [True, False]
