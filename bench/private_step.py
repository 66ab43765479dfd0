"""What gradients per group cost: hooks, a loop over groups and vmap, against a plain step of the same batch.

    OMP_NUM_THREADS=1 python bench/private_step.py                              a minute on a CPU
    OMP_NUM_THREADS=1 python bench/private_step.py --groups 12 --size 2 --progress 0

A step is forward, backward and, where groups have gradients of their own, their clipped sum; no optimiser, no
noise. The three ways must give the same sum before any time is printed. Seconds are the processor's, taken in
turns; what counts is their ratio to the plain step. The network is `conf/network/small.yaml` in size.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from meduet_models.meduet import MeDUET, NetworkConfig
from meduet_models.objective.objective import MeduetObjective, StepBatch, StepDraws, draw_step
from meduet_models.objective.settings import ObjectiveConfig
from meduet_models.objective.teacher import Teacher
from privacy.clipping import joint_norm
from privacy.group_gradients import GroupGradients, clipped_sum, parameters_of_layers

CLIP_NORM = 0.1
SMALL = NetworkConfig(
    latent_channels=4, latent_grid=(8, 12, 8), patch_size=2, width=96, depth=3, heads=6,
    decoder_width=60, decoder_depth=2, decoder_heads=6,
    attention="neighbours", positions="grid",
)  # fmt: skip


class Loss(nn.Module):
    """The loss of a batch, as a module whose parameters are the student's."""

    def __init__(self, progress: float) -> None:
        super().__init__()
        self.student, self.teacher = MeDUET(SMALL, 3), Teacher(MeDUET(SMALL, 3, seed=1))
        self.objective = MeduetObjective(ObjectiveConfig(estimator="one_stream", masked_share=0.5))
        self.progress = progress
        for name in set(dict(self.student.named_parameters())) - set(parameters_of_layers(self.student)):
            self.student.get_parameter(name).requires_grad_(False)
        if progress < 0.5:  # masked steps ask no site
            self.student.site_from_content.requires_grad_(False)
            self.student.site_from_style.requires_grad_(False)

    def forward(self, parts: tuple[Tensor, ...], group_size: int | None = None) -> Tensor:
        """Of latents, restyled latents, site, partner, exchanged and show_lent."""
        latents, restyled, site, partner, exchanged, show_lent = parts
        batch, draws = StepBatch(latents, site, restyled), StepDraws(partner, exchanged, show_lent, "mftd")
        return self.objective(self.student, self.teacher, batch, draws, self.progress, group_size).total


class Steps:
    """One batch, and the ways to take its step."""

    def __init__(self, groups: int, size: int, progress: float) -> None:
        self.groups, self.size, self.loss = groups, size, Loss(progress)
        self.trained = {n: p for n, p in self.loss.named_parameters() if p.requires_grad}
        random, scans = torch.Generator().manual_seed(0), groups * size
        latents = torch.randn(scans, SMALL.latent_channels, *SMALL.latent_grid, generator=random)
        draws = draw_step(random, scans, SMALL.num_tokens, ObjectiveConfig(), (0, 1, 2), size)
        restyled = 1.2 * latents + 0.3
        self.parts = (latents, restyled, draws.target_site, draws.partner, draws.exchanged, draws.show_lent)

    def plain(self) -> dict[str, Tensor]:
        """Every scan with every other, one gradient: training without privacy."""
        gradients = torch.autograd.grad(self.loss(self.parts), list(self.trained.values()))
        return dict(zip(self.trained, gradients, strict=True))

    def hooks(self) -> dict[str, Tensor]:
        """All groups in one pass."""
        with GroupGradients(self.loss, list(self.trained), self.groups, self.size) as watched:
            self.loss(self.parts, self.size).backward()
        return clipped_sum(watched.gradients(), CLIP_NORM).total

    def loop(self) -> dict[str, Tensor]:
        """Group after group."""
        sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in self.trained.items()}
        for first in range(0, self.groups * self.size, self.size):
            latents, restyled, site, partner, *masks = (t[first : first + self.size] for t in self.parts)
            loss = self.loss((latents, restyled, site, partner - first, *masks))
            gradients = torch.autograd.grad(loss, list(self.trained.values()))
            one = {name: g[None] for name, g in zip(self.trained, gradients, strict=True)}
            for name, tensor in clipped_sum(one, CLIP_NORM).total.items():
                sums[name] += tensor
        return sums

    def vmap(self) -> dict[str, Tensor]:
        """All groups under `torch.func.vmap`."""
        latents, restyled, site, partner, *masks = (
            t.unflatten(0, (self.groups, self.size)) for t in self.parts
        )
        partner = partner - self.size * torch.arange(self.groups).unsqueeze(1)

        def loss(trained: dict[str, Tensor], *parts: Tensor) -> Tensor:
            total: Tensor = torch.func.functional_call(self.loss, trained, (parts,))
            return total

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(self.parts)))
        trained = {name: parameter.detach() for name, parameter in self.trained.items()}
        return clipped_sum(each(trained, latents, restyled, site, partner, *masks), CLIP_NORM).total


def main() -> None:
    """Check that the sums agree, then print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", type=int, default=6)
    parser.add_argument("--size", type=int, default=4, help="scans of a group")
    parser.add_argument("--progress", type=float, default=1.0, help="0: a masked step; 1: every term")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    steps = Steps(arguments.groups, arguments.size, arguments.progress)
    ways = {"plain": steps.plain, "hooks": steps.hooks, "loop": steps.loop, "vmap": steps.vmap}
    exact = steps.loop()
    for name in ("hooks", "vmap"):
        try:
            sums = ways[name]()
        except RuntimeError as error:  # masked steps: their tokens are counted, which vmap cannot
            print(f"{name} does not work: {str(error).splitlines()[0][:100]}")
            del ways[name]
            continue
        off = joint_norm({n: sums[n] - t for n, t in exact.items()}) / joint_norm(exact)
        print(f"{name} and loop differ by {off:.1e} of the sum")
        if off > 1e-5:
            raise SystemExit("The ways disagree: times would mean nothing.")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, step in ways.items():
            began = time.process_time()
            step()
            times[name].append(time.process_time() - began)
    plain = sorted(times["plain"])[arguments.repeats // 2]
    print(f"{arguments.groups} groups of {arguments.size}, progress {arguments.progress:g}")
    for name, taken in times.items():
        median = sorted(taken)[arguments.repeats // 2]
        print(f"{name:6} {median:8.3f} CPU s {median / plain:6.2f} of plain")


if __name__ == "__main__":
    main()
