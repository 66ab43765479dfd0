"""Hidden error: 1 is nothing learned; the neighbours' ridge knows what neighbours know."""

import torch

from meduet_models.meduet import FactorNetwork, NetworkConfig
from meduet_models.probes.hidden import hidden_errors, hidden_masks

CONFIG = NetworkConfig(
    latent_channels=2, latent_grid=(6, 6, 6), patch_size=2, width=16, depth=1, heads=2, decoder_width=12,
    decoder_depth=1, decoder_heads=2,
)  # fmt: skip


class TellsTheMean(FactorNetwork):
    """A network that has learned the mean map and nothing else."""

    def predict_tokens(self, factors: object, visible: object = None) -> torch.Tensor:
        return self.mean_tokens.expand(len(factors.content), -1, -1)  # type: ignore[attr-defined]


def smooth(count: int, seed: int) -> torch.Tensor:
    """Scans that are one number everywhere and a little noise: neighbours know nearly everything."""
    draws = torch.Generator().manual_seed(seed)
    level = torch.randn(count, 2, 1, 1, 1, generator=draws)
    return level + 0.1 * torch.randn(count, 2, 6, 6, 6, generator=draws)


def test_a_network_that_tells_the_mean_map_has_learned_nothing_and_the_ridge_what_neighbours_know() -> None:
    network = TellsTheMean(CONFIG)
    training = smooth(40, 0)
    network.mean_tokens = network.target_tokens(training).mean(0)
    errors = hidden_errors(network, training, [str(i) for i in range(40)], smooth(20, 1))
    assert abs(errors.network - 1) < 1e-4
    assert errors.all_neighbours < 0.05 < errors.neighbours < 0.3  # half of the neighbours are hidden, too


def test_independent_tokens_cannot_be_told_from_their_neighbours() -> None:
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 2, 6, 6, 6, generator=draws)
    errors = hidden_errors(FactorNetwork(CONFIG), noise[:40], [str(i) for i in range(40)], noise[40:])
    assert errors.neighbours > 0.9 and errors.all_neighbours > 0.9 and errors.network > 0.9


def test_masks_hide_half_of_every_scan_by_their_seed() -> None:
    one, same, other = (hidden_masks(5, 27, seed) for seed in (1, 1, 2))
    assert set(one.sum(1).tolist()) == {14}
    assert torch.equal(one, same) and not torch.equal(one, other)
