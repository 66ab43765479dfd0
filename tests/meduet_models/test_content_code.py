import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meduet_models.content_code import (
    CodeSums,
    ContentCode,
    code_bound,
    erase_own_site,
    public_code,
    shift_left,
    token_erasure,
    without_sites,
)
from meduet_models.meduet import MeDUET, NetworkConfig, layer_normed
from meduet_models.probes.quick import site_probe
from meduet_models.probes.recognition import retrieval_across_sites

TOKENS, WIDTH, SIZE, SITES, PATIENTS = 12, 10, 16, 3, 60
BOUND = code_bound(SIZE)
G = torch.Generator().manual_seed(5)
ANATOMY = torch.randn(10, TOKENS, WIDTH, generator=G)
ANATOMY = ANATOMY - ANATOMY.mean(
    1, keepdim=True
)  # where things are: nothing of it is in the mean over tokens
LOOKS = 0.8 * torch.randn(SITES, TOKENS, WIDTH, generator=G)


def tokens(seed: int, site: int | None = None, patients: int = PATIENTS) -> Tensor:
    """Content tokens of patients: anatomy, what a site adds to it, and noise."""
    draws = torch.Generator().manual_seed(seed)
    anatomy = torch.einsum("bq,qnk->bnk", torch.randn(patients, 10, generator=draws), ANATOMY)
    noise = 0.3 * torch.randn(patients, TOKENS, WIDTH, generator=draws)
    return anatomy + noise + (0 if site is None else LOOKS[site])


def names(count: int) -> list[str]:
    return [str(i) for i in range(count)]


@pytest.fixture(scope="module")
def public() -> ContentCode:
    public = torch.cat([tokens(100 + s, s, 40) for s in range(SITES)])
    return public_code(public, TOKENS, WIDTH, SIZE)


@pytest.fixture(scope="module")
def sums(public: ContentCode) -> dict[str, CodeSums]:
    sums_by_site = {}
    for site in range(SITES):
        sums_by_site[str(site)] = CodeSums.of(public.read(tokens(site, site)), names(PATIENTS), BOUND)
    return sums_by_site


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), a=st.integers(1, 6), b=st.integers(1, 6))
def test_sums_of_two_sites_are_the_sums_of_their_union(seed: int, a: int, b: int) -> None:
    x = torch.randn(a + b, 5, generator=torch.Generator().manual_seed(seed))
    both, people = CodeSums.of(x, names(a + b), 1.5), names(a + b)
    one, other = CodeSums.of(x[:a], people[:a], 1.5), CodeSums.of(x[a:], people[a:], 1.5)
    torch.testing.assert_close((one + other).to_vector(), both.to_vector())
    torch.testing.assert_close(one.to_vector() + other.to_vector(), both.to_vector())
    assert torch.equal(CodeSums.from_vector(one.to_vector(), 5, 1.5).to_vector(), one.to_vector())
    both.check(a + b)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), bound=st.floats(0.1, 10.0), scale=st.floats(0.1, 100.0))
def test_one_patient_moves_the_vector_by_at_most_her_bound_and_her_count(
    seed: int, bound: float, scale: float
) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)) * scale
    moved = CodeSums.of(x, names(4), bound).to_vector() - CodeSums.of(x[:3], names(3), bound).to_vector()
    assert float(moved.norm()) <= math.hypot(bound, 1.0) * (1 + 1e-6)


def test_a_patient_with_many_scans_counts_once() -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    many = CodeSums.of(x[[0, 1, 1, 1, 2]], ["a", "b", "b", "b", "c"], 10.0)
    torch.testing.assert_close(many.to_vector(), CodeSums.of(x, names(3), 10.0).to_vector())


def test_the_code_keeps_what_the_mean_over_tokens_throws_away(public: ContentCode) -> None:
    where = torch.randn(200, 10, generator=torch.Generator().manual_seed(8))
    noise = 0.3 * torch.randn(200, TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))
    seen = torch.einsum("bq,qnk->bnk", where, ANATOMY) + noise

    def explained(features: Tensor) -> float:
        solution = torch.linalg.lstsq(features.double(), where.double()).solution
        left = where.double() - features.double() @ solution
        return float(1 - left.square().sum() / where.square().sum())

    assert explained(public.read(seen)) > 0.9
    assert explained(seen.mean(1)) < 0.1


def test_after_the_erasure_the_sites_means_coincide_and_fresh_patients_of_a_site_look_like_the_others(
    public: ContentCode, sums: dict[str, CodeSums]
) -> None:
    code = without_sites(public, sums)
    means = torch.stack([code.read(tokens(site, site).double()).mean(0) for site in range(SITES)])
    torch.testing.assert_close(means, torch.zeros_like(means), atol=1e-6, rtol=0)
    fresh = torch.cat([tokens(50, site, 80) for site in range(SITES)])  # new patients, on every scanner
    sites = [site for site in range(SITES) for _ in range(80)]
    before, after = public.read(fresh), code.read(fresh)
    assert site_probe(before, sites, names(80) * SITES, 0).score > 0.95
    assert site_probe(after, sites, names(80) * SITES, 0).score < 1 / SITES + 0.15
    assert retrieval_across_sites(after, sites, names(80) * SITES).score > 0.9


def test_the_erasure_costs_at_most_one_direction_per_further_site(
    public: ContentCode, sums: dict[str, CodeSums]
) -> None:
    code = without_sites(public, sums)
    assert int(torch.linalg.matrix_rank(public.matrix)) == SIZE
    assert int(torch.linalg.matrix_rank(code.matrix, tol=1e-9)) == SIZE - SITES + 1
    same = {"0": sums["0"], "1": sums["0"]}
    torch.testing.assert_close(without_sites(public, same).matrix, public.matrix)


def test_the_erasure_of_means_is_that_of_the_patients_side_by_side(
    public: ContentCode, sums: dict[str, CodeSums]
) -> None:
    x = [public.read(tokens(site, site)).double() for site in range(SITES)]
    centre = torch.stack([own.mean(0) for own in x]).mean(0)
    apart = torch.stack([own.mean(0) - centre for own in x])
    projector = torch.eye(SIZE).double() - torch.linalg.pinv(apart) @ apart
    expected = (x[0] - centre) @ projector
    torch.testing.assert_close(
        without_sites(public, sums).read(tokens(0, 0)).double(), expected, atol=1e-4, rtol=0
    )


def test_a_change_of_tokens_laid_back_from_the_code_is_read_as_that_change(public: ContentCode) -> None:
    change = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(2))
    moved = public.tokens_of(change)
    assert moved.shape == (4, TOKENS, WIDTH)
    start = tokens(3, None, 4).double()
    torch.testing.assert_close(public.read(start + moved) - public.read(start), change.double())


@pytest.mark.parametrize(("told", "left"), [(True, 1e-9), (False, 0.1)])
def test_of_tokens_the_erasure_takes_the_channels_that_sites_differ_in_on_average(
    public: ContentCode, sums: dict[str, CodeSums], told: bool, left: float
) -> None:
    means = [tokens(site, site).mean(1) for site in range(SITES)]
    beside = {str(site): CodeSums.of(own, names(PATIENTS), BOUND) for site, own in enumerate(means)}
    mean, matrix = token_erasure(public, sums, beside if told else {})
    torch.testing.assert_close(matrix @ matrix, matrix, rtol=0, atol=1e-9)
    pooled = torch.stack([own.mean(0) for own in means]).double()
    erased = mean + (pooled - mean) @ matrix.T
    assert float(erased.var(0).sum()) < left * float(pooled.var(0).sum())


def test_what_is_left_to_fresh_people_is_the_error_of_means_that_was_foretold() -> None:
    """Sites far apart; patients of unit variance. 200 draws: standard error of the mean square about 2%."""
    size, patients, squares = 16, 30, []
    true = torch.zeros(size, dtype=torch.float64)
    true[3] = 20.0
    for draw in range(200):
        draws = torch.Generator().manual_seed(draw)
        people = torch.randn(2, patients, size, generator=draws, dtype=torch.float64)
        apart = people[1].mean(0) + true - people[0].mean(0)
        squares.append((true - (true @ apart) / (apart @ apart) * apart).square().sum())
    expected = shift_left(size, patients) ** 2
    assert float(torch.stack(squares).mean()) == pytest.approx(expected, rel=0.1)


def test_a_public_code_has_as_much_variance_as_numbers() -> None:
    seen = torch.cat([tokens(100 + s, s, 40) for s in range(SITES)])
    code = public_code(seen, 5, 4, 12)
    assert code.places.shape == (5, TOKENS) and code.channels.shape == (4, WIDTH)
    codes = code.read(seen.double())
    torch.testing.assert_close(codes.mean(0), torch.zeros(12).double(), atol=1e-9, rtol=0)
    assert float(codes.square().sum(1).mean()) == pytest.approx(12)
    again = public_code(seen, 5, 4, 12)
    assert torch.equal(again.matrix, code.matrix)


def test_a_late_site_is_erased_by_its_own_patients() -> None:
    codes = torch.randn(40, SIZE, generator=torch.Generator().manual_seed(3)) + 3 * torch.eye(SIZE)[2]
    projected = codes @ erase_own_site(codes, names(40)).T
    assert float(codes.mean(0).norm()) > 2.5
    assert float(projected.mean(0).norm()) < 1e-5
    with pytest.raises(ValueError, match="at least one scan"):
        erase_own_site(codes[:0], [])


def test_bad_sums_and_public_scans_are_refused(public: ContentCode, sums: dict[str, CodeSums]) -> None:
    with pytest.raises(ValueError, match="two sites to erase between; got 1"):
        without_sites(public, {"0": sums["0"]})
    nobody = CodeSums.from_vector(torch.zeros(SIZE + 1), SIZE, BOUND)
    with pytest.raises(ValueError, match="at least one patient from '1'"):
        without_sites(public, {"0": sums["0"], "1": nobody})
    with pytest.raises(ValueError, match="of 16 numbers and bound"):
        sums["0"] + CodeSums.from_vector(torch.zeros(3), 2, BOUND)
    with pytest.raises(ValueError, match="17 code sums; got 4"):
        CodeSums.from_vector(torch.zeros(4), SIZE, BOUND)
    with pytest.raises(ValueError, match="NaN"):
        CodeSums.of(torch.full((2, 4), torch.nan), ["a", "b"], BOUND)
    for vector, reason in (([2.5, 0.0], "whole"), ([9.0, 0.0], "0 to 5"), ([1.0, 3.0], "longer")):
        with pytest.raises(ValueError, match=reason):
            CodeSums.from_vector(torch.tensor(vector), 1, 2.0).check(5)
    with pytest.raises(ValueError, match="more than 16 public scans"):
        public_code(tokens(0)[:16], TOKENS, WIDTH, SIZE)
    with pytest.raises(ValueError, match="varies in 16 ways"):
        public_code(tokens(0)[:1].expand(30, -1, -1), TOKENS, WIDTH, SIZE)


def test_a_network_without_a_fitted_code_says_so() -> None:
    config = NetworkConfig(
        latent_channels=2, latent_grid=(4, 4, 4), patch_size=2, width=12, depth=1, heads=2, decoder_width=12,
        decoder_depth=1, decoder_heads=2, style_map_grid=(1, 2, 1), code_size=20,
    )  # fmt: skip
    network, latents = MeDUET(config, 3).eval(), torch.randn(5, 2, 4, 4, 4)
    with pytest.raises(ValueError, match="none was fitted"):
        network.content_code(latents)
    seen = layer_normed(network.encode(torch.randn(40, 2, 4, 4, 4)).content.detach())
    code = public_code(seen, config.code_places, config.code_channels, 20)
    network.set_content_code(code)
    expected = code.read(layer_normed(network.encode(latents).content))
    torch.testing.assert_close(network.content_code(latents), expected)
    network.set_erasure(torch.zeros(12), torch.zeros(12, 12))
    torch.testing.assert_close(network.content_code(latents), expected)  # the code has its own erasure
    network.set_content_code(None)
    assert not network.has_content_code
    with pytest.raises(ValueError, match="code_size of at most 96 numbers"):
        NetworkConfig(**{**vars(config), "code_size": 97})
