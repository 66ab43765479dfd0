import dataclasses

import pytest
import torch
from torch import Tensor

from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import CohortTooSmall, StyleLayout, StyleMoments, restyle

GRID = (4, 6, 4)
LAYOUT = StyleLayout(channels=2, latent_grid=GRID, map_grid=(2, 3, 2), bound=1e6)
SITES = ("oslo", "lyon", "turin", "ghent")


def scans(site: int, count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(site)
    return torch.randn(count, 2, *GRID, generator=generator) * (site + 1) + torch.randn(
        2, *GRID, generator=generator
    )


def moments(site: int, layout: StyleLayout = LAYOUT, count: int = 5) -> StyleMoments:
    return StyleMoments.of(scans(site, count), [f"{site}-{i}" for i in range(count)], layout)


def bank(*present: int, layout: StyleLayout = LAYOUT) -> StyleBank:
    return StyleBank.of(SITES, {SITES[s]: moments(s, layout) for s in present})


def test_the_pooled_entry_is_the_style_of_the_union_of_all_scans() -> None:
    for layout in (LAYOUT, dataclasses.replace(LAYOUT, map_grid=None, amplitude=True)):
        moments_of = {SITES[s]: moments(s, layout, count=3 + s) for s in (0, 1, 3)}
        pooled = StyleBank.of(SITES, moments_of).pooled()
        union = (moments_of["oslo"] + moments_of["lyon"] + moments_of["ghent"]).entry()
        torch.testing.assert_close(pooled.to_vector(), union.to_vector(), rtol=1e-4, atol=1e-4)
        assert (pooled.amplitude is None) == (union.amplitude is None)


def test_a_bank_that_travelled_restyles_as_before() -> None:
    sent = bank(0, 1, 2, 3)
    received = StyleBank.from_tensors(sent.to_tensors(), SITES)
    own, target = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 1, 0, 2, 1])
    x = scans(0)
    assert torch.equal(sent.restyle(x, own, target), received.restyle(x, own, target))
    assert all(t.dtype == torch.float32 for t in sent.to_tensors().values())


def test_each_scan_takes_the_style_of_its_own_target() -> None:
    whole, x = bank(0, 1, 2), scans(0, 3)
    restyled = whole.restyle(x, torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    assert torch.equal(restyled[0], x[0])
    for row in (1, 2):
        own, target = moments(0).entry(), moments(row).entry()
        torch.testing.assert_close(restyled[row : row + 1], restyle(x[row : row + 1], own, target))


def test_a_site_that_told_nothing_can_restyle_once_it_knows_its_own_style() -> None:
    partial, x = bank(0, 1), scans(2)
    here = torch.full((5,), 2)
    assert torch.equal(partial.restyle(x, here, here), x)
    with pytest.raises(ValueError, match="turin"):
        partial.restyle(x, here, torch.zeros(5, dtype=torch.long))
    late = partial.joined_by("turin", moments(2))
    torch.testing.assert_close(
        late.restyle(x, here, torch.zeros(5, dtype=torch.long)),
        restyle(x, moments(2).entry(), moments(0).entry()),
    )
    assert torch.equal(late.centre, partial.centre) and partial.present == ("oslo", "lyon")


def test_a_site_that_joins_late_comes_after_all_others_and_changes_none() -> None:
    whole, x = bank(0, 1), scans(5)
    late = whole.joined_by("delft", moments(5))
    assert late.sites == (*SITES, "delft") and late.present == ("oslo", "lyon", "delft")
    here, there = torch.full((5,), 4), torch.zeros(5, dtype=torch.long)
    torch.testing.assert_close(
        late.restyle(x, here, there), restyle(x, moments(5).entry(), moments(0).entry())
    )
    assert torch.equal(late.restyle(scans(1), there + 1, there), whole.restyle(scans(1), there + 1, there))
    assert torch.equal(late.centre, whole.centre) and torch.equal(late.scale, whole.scale)
    assert whole.sites == SITES and whole.count.shape == (4, 1)


def test_body_parts_have_styles_of_their_own_and_must_be_said() -> None:
    layout = dataclasses.replace(LAYOUT, parts=2)
    moments_of = {}
    for s in (0, 1):
        head, chest = scans(s), scans(s + 2)
        moments_of[SITES[s]] = StyleMoments.of(
            torch.cat([head, chest]), [str(i) for i in range(10)], layout, [0] * 5 + [1] * 5
        )
    whole = StyleBank.of(SITES, moments_of)
    own, target = torch.tensor([0, 0]), torch.tensor([1, 1])
    x = scans(0, 1).expand(2, -1, -1, -1, -1)
    restyled = whole.restyle(x, own, target, torch.tensor([0, 1]))
    for part in (0, 1):
        expected = restyle(x[:1], moments_of["oslo"].entry(part), moments_of["lyon"].entry(part))
        torch.testing.assert_close(restyled[part : part + 1], expected)
    with pytest.raises(ValueError, match="body part"):
        whole.restyle(x, own, target)


def test_a_bank_without_exchange_holds_the_pooled_scale_and_no_style() -> None:
    moments_of = {SITES[s]: moments(s) for s in (0, 1)}
    silent = StyleBank.of(SITES, moments_of, with_entries=False)
    assert silent.present == () and not bool(silent.entries.mean.any())
    torch.testing.assert_close(silent.centre, (moments_of["oslo"] + moments_of["lyon"]).latent_scale()[0])
    with pytest.raises(CohortTooSmall):
        silent.pooled()


def test_a_bank_of_other_axes_or_sites_is_refused() -> None:
    tensors = bank(0, 1).to_tensors()
    with pytest.raises(ValueError, match="of 2 sites"):
        StyleBank.from_tensors(tensors, ("oslo", "lyon"))
    with pytest.raises(ValueError, match="'scale'"):
        StyleBank.from_tensors({k: v for k, v in tensors.items() if k != "scale"}, SITES)
    with pytest.raises(ValueError, match="'volume'"):
        StyleBank.from_tensors(tensors | {"volume": torch.zeros(1)}, SITES)
    with pytest.raises(ValueError, match="'mean'"):
        StyleBank.from_tensors(tensors | {"mean": torch.zeros(4, 1, 3)}, SITES)
    with pytest.raises(ValueError, match="finite"):
        StyleBank.from_tensors(tensors | {"mean": tensors["mean"] * torch.nan}, SITES)
    with pytest.raises(ValueError, match="positive"):
        StyleBank.from_tensors(tensors | {"deviation": 0 * tensors["deviation"]}, SITES)
    with pytest.raises(ValueError, match="paris"):
        StyleBank.of(SITES, {"paris": moments(0)})
    with pytest.raises(CohortTooSmall):
        StyleBank.of(SITES, {})
