"""The diffusion transformer against MONAI's DiffusionModelUNet of equal parameters: steps, memory, sampling.

A training step is the velocity loss of one batch, backward and AdamW; both networks see the same noisy
latents, and the transformer is told content and style besides. The U-Net has three levels with attention in
the lowest, and widths such that the numbers of parameters differ by less than 5%. The two are timed in turn.

    python bench/diffusion_step.py                                  under a minute on a CPU thread
    python bench/diffusion_step.py --size base --grid 24 24 24 --batch 16 --device cuda --bf16

Seconds are those of the processor on a CPU (it may be shared), of the clock on CUDA. Memory is what autograd
keeps for the backward pass, on CUDA the allocator's peak. On CUDA the transformer's share of the card's
measured matrix rate is printed too: floating-point operations of a step (PyTorch's counter) per second, over
those of 8192-cubed products in the same type.

Not importable; not shipped.
"""

import argparse
import bisect
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from local_step import kept_bytes
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from meduet_models.diffusion.conditions import Conditions, ConditionSizes
from meduet_models.diffusion.path import Path as NoisePath
from meduet_models.diffusion.sampling import SamplingSettings, integrate, sample
from meduet_models.diffusion.settings import TransformerShape
from meduet_models.diffusion.transformer import DiffusionConfig, DiffusionTransformer

PRESETS = Path(__file__).parents[1] / "conf" / "diffusion" / "transformer"
CHANNELS, STYLE = 4, 104
Velocity = Callable[[Tensor, Tensor], Tensor]


def transformer_of(size: str, grid: tuple[int, int, int], width: int | None = None) -> DiffusionTransformer:
    """A preset on latents of this grid, told content and style."""
    shape = TransformerShape(**yaml.safe_load((PRESETS / f"{size}.yaml").read_text()))
    tokens = tuple(n // shape.patch_size for n in grid)
    sizes = ConditionSizes(content=width or shape.width, content_grid=tokens, style=STYLE)
    return DiffusionTransformer(
        DiffusionConfig(latent_channels=CHANNELS, latent_grid=grid, shape=shape, sizes=sizes, path="linear")
    )


def unet_of(parameters: int) -> DiffusionModelUNet:
    """MONAI's U-Net with as many parameters to 5%: the first widths a, 2a, c that fit, c from a to 8a."""

    def build(a: int, c: int) -> DiffusionModelUNet:
        return DiffusionModelUNet(
            spatial_dims=3, in_channels=CHANNELS, out_channels=CHANNELS, num_res_blocks=1,
            channels=(a, 2 * a, c), attention_levels=(False, False, True), norm_num_groups=8,
            num_head_channels=8, use_flash_attention=True,
        )  # fmt: skip

    def excess(a: int, c: int) -> float:
        with torch.device("meta"):
            return count(build(a, c)) / parameters - 1

    for a in range(8, 1024, 8):
        if excess(a, 8 * a) < 0:
            continue
        c = a + 8 * bisect.bisect_left(range(a, 8 * a, 8), 0.0, key=lambda c, a=a: excess(a, c))
        for width in (c, c - 8):
            if abs(excess(a, width)) < 0.05:
                return build(a, width)
    raise SystemExit(f"No U-Net within 5% of {parameters} parameters.")


def count(network: nn.Module) -> int:
    """Learned numbers."""
    return sum(p.numel() for p in network.parameters())


class Contender:
    """A network in training on one batch."""

    def __init__(self, name: str, network: nn.Module, velocity: Velocity, bf16: bool) -> None:
        self.name, self.network, self.velocity, self.bf16 = name, network, velocity, bf16
        self.optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        self.seconds: list[float] = []

    def loss(self, noisy: Tensor, time_: Tensor, target: Tensor) -> Tensor:
        """The velocity loss."""
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.bf16):
            predicted = self.velocity(noisy, time_)
        return F.mse_loss(predicted.float(), target)

    def step(self, noisy: Tensor, time_: Tensor, target: Tensor) -> None:
        """One optimiser step."""
        self.optimiser.zero_grad()
        self.loss(noisy, time_, target).backward()
        self.optimiser.step()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of this work."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def peak(contender: Contender, batch: tuple[Tensor, Tensor, Tensor]) -> int:
    """Bytes of a step: the allocator's peak on CUDA, what autograd keeps elsewhere."""
    device = batch[0].device
    if device.type != "cuda":
        return kept_bytes(lambda: contender.loss(*batch))
    torch.cuda.reset_peak_memory_stats(device)
    contender.step(*batch)
    return torch.cuda.max_memory_allocated(device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of large matrix products."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: [a @ b for _ in range(10)], device) for _ in range(5))
    return 10 * 2 * 8192**3 / best


def main() -> None:
    """Time both, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(p.stem for p in PRESETS.glob("*.yaml")), default="tiny")
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 12, 8), help="latent voxels, multiples of 4")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--volumes", type=int, default=1, help="sampled at once, 25 Heun steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    device, grid, size = torch.device(arguments.device), tuple(arguments.grid), arguments.batch
    if device.type == "cpu":
        torch.set_num_threads(1)

    transformer = transformer_of(arguments.size, grid).to(device)
    unet = unet_of(count(transformer)).to(device)
    generator = torch.Generator().manual_seed(0)
    rows = max(size, arguments.volumes)
    sizes = transformer.config.sizes
    tokens = sizes.content_grid[0] * sizes.content_grid[1] * sizes.content_grid[2]
    conditions = Conditions(
        content=torch.randn(rows, tokens, sizes.content, generator=generator).to(device),
        style=torch.randn(rows, STYLE, generator=generator).to(device),
    )
    data, noise = (torch.randn(size, CHANNELS, *grid, generator=generator).to(device) for _ in range(2))
    when, path = torch.rand(size, generator=generator).to(device), NoisePath("linear")
    batch = (path.noisy(data, noise, when), when, path.velocity(data, noise, when))

    def ours(x: Tensor, time_: Tensor) -> Tensor:
        return transformer(x, time_, conditions.each(lambda t: t[: len(x)]))

    def theirs(x: Tensor, time_: Tensor) -> Tensor:
        return unet(x, 1000.0 * time_)

    contenders = [
        Contender("transformer", transformer, ours, arguments.bf16),
        Contender("MONAI U-Net", unet, theirs, arguments.bf16),
    ]
    for repeat in range(arguments.repeats + 1):
        for contender in contenders:  # in turn, so that a busy machine is unfair to both
            took = timed(lambda c=contender: c.step(*batch), device)
            contender.seconds += [took] if repeat else []  # the first is warm-up
    medians = [sorted(c.seconds)[arguments.repeats // 2] for c in contenders]
    memory = [peak(contender, batch) for contender in contenders]

    settings, volumes = SamplingSettings(), arguments.volumes
    start = torch.randn(volumes, CHANNELS, *grid, generator=generator)
    times = torch.linspace(0, 1, settings.steps + 1, dtype=torch.float64)
    one = conditions.each(lambda t: t[:volumes])
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
        sampling = [
            timed(lambda: sample(transformer, one, volumes, settings, seed=0, noise=start), device) / volumes,
            timed(lambda: integrate(theirs, start.to(device), times, "heun"), device) / volumes,
        ]

    kind = "bf16" if arguments.bf16 else "float32"
    print(
        f"{arguments.size}, latents {CHANNELS} x {' x '.join(map(str, grid))}, batch {size}, {device}, {kind}"
    )
    print(f"{'':14}{'parameters':>12}{'steps/s':>10}{'MB':>10}{'s per volume, 25 Heun steps':>30}")
    for contender, median, kept, seconds in zip(contenders, medians, memory, sampling, strict=True):
        print(
            f"{contender.name:14}{count(contender.network):12,}{1 / median:10.2f}{kept / 1e6:10.1f}"
            f"{seconds:30.2f}"
        )
    print(
        f"{'times better':14}{'':12}{medians[1] / medians[0]:10.2f}{memory[1] / memory[0]:10.2f}"
        f"{sampling[1] / sampling[0]:30.2f}   (transformer over U-Net)"
    )
    if device.type == "cuda":
        with FlopCounterMode(display=False) as counter:
            contenders[0].step(*batch)
        rate = matrix_rate(device, torch.bfloat16 if arguments.bf16 else torch.float32)
        reached = counter.get_total_flops() / medians[0]
        print(
            f"transformer: {reached / 1e12:.0f} TFLOP/s, {reached / rate:.0%} of the measured matrix rate, "
            f"{rate / 1e12:.0f} TFLOP/s"
        )


if __name__ == "__main__":
    main()
