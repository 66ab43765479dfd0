import pytest
import torch
from torch import Tensor

from meduet_models.content_code import (
    RenderingMoments,
    erase_own_site,
    fit_content_code,
)
from meduet_models.erasure import ErasureMoments, erase, fit_erasure, triangle_length
from meduet_models.meduet import MeDUET, NetworkConfig
from meduet_models.probes.quick import site_probe
from meduet_models.probes.recognition import retrieval_across_sites
from tests.worlds import small_network

WIDTH, SIZE, SITES, PATIENTS = 48, 8, 3, 30
BOUND = 1e3
G = torch.Generator().manual_seed(5)
ANATOMY, STYLE = torch.randn(10, WIDTH, generator=G), torch.randn(6, WIDTH, generator=G)
LOOKS = 0.8 * torch.randn(SITES, 6, generator=G)


def content(site: int, seed: int, patients: int = PATIENTS) -> Tensor:
    """Content [r n k] of a site's patients in every site's style: anatomy, an imperfectly removed style,
    and noise of the rendering."""
    generator = torch.Generator().manual_seed(1000 * seed + site)
    anatomy = torch.randn(patients, 10, generator=generator) @ ANATOMY
    noise = 0.3 * torch.randn(SITES, patients, WIDTH, generator=generator)
    return anatomy + (LOOKS @ STYLE)[:, None] + noise


def names(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def sums_of(seed: int) -> tuple[dict[str, ErasureMoments], dict[str, RenderingMoments]]:
    own, renderings = {}, {}
    for site in range(SITES):
        x = content(site, seed)
        own[str(site)] = ErasureMoments.of(x[site], names(PATIENTS), BOUND)
        renderings[str(site)] = RenderingMoments.of(x, names(PATIENTS), BOUND)
    return own, renderings


def test_sums_of_two_sites_are_the_sums_of_their_union() -> None:
    x = content(0, 1)
    both = RenderingMoments.of(x, names(PATIENTS), BOUND)
    parts = [
        RenderingMoments.of(x[:, rows], names(PATIENTS)[rows], BOUND) for rows in (slice(0, 9), slice(9, 30))
    ]
    torch.testing.assert_close((parts[0] + parts[1]).to_vector(), both.to_vector())
    back = RenderingMoments.from_vector(both.to_vector(), WIDTH, BOUND)
    torch.testing.assert_close(back.scatter, both.scatter)
    assert len(both.to_vector()) == triangle_length(WIDTH)
    assert float(both.to_vector().norm()) == pytest.approx(float(both.scatter.norm()))


def test_one_patient_moves_the_vector_by_at_most_the_bound_squared() -> None:
    x = 100 * torch.stack([torch.ones(1, WIDTH), -torch.ones(1, WIDTH)])  # as far apart as can be
    vector = RenderingMoments.of(x, ["a"], 2.0).to_vector()
    assert float(vector.norm()) == pytest.approx(4.0)


def test_renderings_that_do_not_differ_scatter_nothing() -> None:
    assert float(RenderingMoments.of(content(0, 1)[:1], names(PATIENTS), BOUND).scatter.abs().max()) == 0


def test_the_code_forgets_the_site_that_a_wide_erasure_still_shows_and_keeps_the_patient() -> None:
    own, renderings = sums_of(1)
    mean, matrix = fit_content_code(own, renderings, SIZE)
    unseen = content(7, 2, 80)  # new patients on every scanner
    sites = [s for s in range(SITES) for _ in range(80)]
    patients = names(80) * SITES
    flat = unseen.flatten(0, 1)
    code = ((flat - mean.float()) @ matrix.T.float()).float()
    wide = erase(flat, *fit_erasure(own))
    chance = 1 / SITES
    assert site_probe(flat, sites, patients, 0).score > 0.95
    assert site_probe(wide, sites, patients, 0).score > chance + 0.1  # what dimension and noise leave
    assert site_probe(code, sites, patients, 0).score < chance + 0.05
    assert retrieval_across_sites(code, sites, patients).score > 0.95


def test_the_code_of_the_sites_patients_is_centred_by_site_and_whitened() -> None:
    own, renderings = sums_of(1)
    mean, matrix = fit_content_code(own, renderings, SIZE)
    codes = [(content(s, 1)[s].double() - mean) @ matrix.T for s in range(SITES)]
    torch.testing.assert_close(torch.stack([c.mean(0) for c in codes]), torch.zeros(SITES, SIZE).double())
    variances = torch.linalg.eigvalsh(torch.cat(codes).T @ torch.cat(codes) / (SITES * PATIENTS))
    torch.testing.assert_close(variances[SITES - 1 :], torch.ones(SIZE - SITES + 1).double())
    assert float(variances[: SITES - 1].abs().max()) < 1e-9  # one direction less per site but one


def test_a_late_site_is_erased_by_its_own_patients() -> None:
    codes = torch.randn(40, SIZE, generator=torch.Generator().manual_seed(3)) + 3 * torch.eye(SIZE)[2]
    projected = codes @ erase_own_site(codes, names(40)).T
    assert float(codes.mean(0).norm()) > 2.5
    assert float(projected.mean(0).norm()) < 1e-5
    with pytest.raises(ValueError, match="at least one scan"):
        erase_own_site(codes[:0], [])


def test_bad_sums_are_refused() -> None:
    own, renderings = sums_of(1)
    with pytest.raises(ValueError, match="two or more sites; got 1 and 1"):
        fit_content_code({"0": own["0"]}, {"0": renderings["0"]}, SIZE)
    with pytest.raises(ValueError, match="got 3 and 2"):
        fit_content_code(own, {k: renderings[k] for k in "01"}, SIZE)
    with pytest.raises(ValueError, match="at least 3 numbers, one per site; got 2"):
        fit_content_code(own, renderings, 2)
    with pytest.raises(ValueError, match="of width 48"):
        renderings["0"] + RenderingMoments.from_vector(torch.zeros(3), 2, BOUND)
    with pytest.raises(ValueError, match="3 rendering sums; got 4"):
        RenderingMoments.from_vector(torch.zeros(4), 2, BOUND)
    with pytest.raises(ValueError, match="at least one rendering"):
        RenderingMoments.of(torch.zeros(0, 2, 4), ["a", "b"], BOUND)
    with pytest.raises(ValueError, match="NaN"):
        RenderingMoments.of(torch.full((2, 1, 4), torch.nan), ["a"], BOUND)


def test_a_network_without_a_fitted_code_says_so() -> None:
    config = small_network(latent_grid=(4, 4, 4), style_map_grid=(1, 2, 1))
    network, latents = MeDUET(config, 3).eval(), torch.randn(5, 2, 4, 4, 4)
    with pytest.raises(ValueError, match="none was fitted"):
        network.content_code(latents)
    network.set_content_code(torch.ones(12), torch.eye(12)[: config.code_size])
    expected = (network.pooled_content(latents) - 1)[:, : config.code_size]
    torch.testing.assert_close(network.content_code(latents), expected)
    with pytest.raises(ValueError, match="code_ratio above 0 and at most 1"):
        NetworkConfig(**{**vars(config), "code_ratio": 2.0})
