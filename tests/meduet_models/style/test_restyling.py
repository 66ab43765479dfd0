import pytest
import torch

from meduet_models.style.bank import StyleBank
from meduet_models.style.code import entry_of, entry_of_scans, style_length, vector_of
from meduet_models.style.moments import StyleEntry, StyleLayout
from meduet_models.style.restyling import own_entries, restyle_each
from tests.worlds import GRID, public_latents

PUBLIC = public_latents(12)
LAYOUTS = [StyleLayout(channels=2, latent_grid=GRID, map_grid=grid, bound=1.0) for grid in (None, (2, 3, 2))]


def bank(layout: StyleLayout) -> StyleBank:
    entries = {
        site: (10.0, entry_of_scans(public_latents(6, seed=seed) * seed + seed, layout))
        for seed, site in ((1, "oslo"), (2, "lyon"))
    }
    return StyleBank.of_entries(("oslo", "lyon", "turin"), entries, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["flat", "maps"])
def test_an_entry_comes_back_from_its_vector(layout: StyleLayout) -> None:
    entry = entry_of_scans(PUBLIC[:3], layout)
    vector = vector_of(entry)
    assert len(vector) == style_length(2, layout.map_grid)
    back = entry_of(vector, layout)
    for name in ("mean", "deviation", "map", "map_deviation"):
        one, other = getattr(entry, name), getattr(back, name)
        assert (one is None) == (other is None) and (one is None or torch.allclose(one, other, rtol=1e-5))
    with pytest.raises(ValueError, match="Expected a style of"):
        entry_of(vector[1:], layout)


def test_a_restyled_scan_has_the_style_of_the_site_and_nothing_of_its_own() -> None:
    flat, style_bank = LAYOUTS[0], bank(LAYOUTS[0])
    site = torch.tensor([0, 1] * 6)
    restyled = restyle_each(PUBLIC, own_entries(PUBLIC, flat), style_bank, site)
    after = own_entries(restyled, flat)
    target = style_bank.entry(site)
    assert torch.allclose(after.mean, target.mean, atol=1e-4)
    assert torch.allclose(after.deviation, target.deviation, rtol=1e-4)


def test_with_maps_little_is_left_of_how_scans_differed_in_style() -> None:
    maps, style_bank = LAYOUTS[1], bank(LAYOUTS[1])
    own = own_entries(PUBLIC, maps)
    after = own_entries(restyle_each(PUBLIC, own, style_bank, torch.zeros(12, dtype=torch.long)), maps)
    assert own.map is not None and after.map is not None
    assert float(after.map.std(0).mean()) < 0.5 * float(own.map.std(0).mean())


def test_the_bank_of_entries_is_centred_on_their_union_and_lists_who_told() -> None:
    style_bank = bank(LAYOUTS[1])
    assert style_bank.present == ("oslo", "lyon") and bool((style_bank.scale > 0).all())
    pooled = style_bank.pooled()
    assert torch.allclose(style_bank.centre.mean((1, 2, 3)), pooled.mean, atol=1e-4)
    with pytest.raises(ValueError, match="one of 'rome'"):
        StyleBank.of_entries(("oslo",), {"rome": (3.0, _some())}, LAYOUTS[0])


def _some() -> StyleEntry:
    return StyleEntry(mean=torch.zeros(2), deviation=torch.ones(2))
