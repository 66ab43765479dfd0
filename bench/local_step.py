"""Our training step against a plain one: equal losses, and the ratio of seconds and of memory.

The plain step computes the published objective as its description reads: one network pass per quantity,
each volume by its place in a grid. Ours shares passes and orders by owner. Same weights, inputs and draws, so
the losses and gradients must agree to float tolerance before any time is printed. The published faults that
docs/architecture.md lists are left out of both.

    python bench/local_step.py                                              a minute on a CPU
    python bench/local_step.py --size paper --batch 2 --repeats 1 --brief   minutes
    python bench/local_step.py --size paper --batch 64 --device cuda --bf16

Seconds are those of the processor on a CPU (it may be shared), of the clock on CUDA. Memory is what autograd
keeps for the backward pass (distinct storages), on CUDA the allocator's peak.

Source: MeDUET (arXiv:2602.17901), written from its description. Not importable; not shipped.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from meduet_models.factors import Factors
from meduet_models.meduet import FactorNetwork, MeDUET, NetworkConfig
from meduet_models.objective.objective import MeduetObjective, StepBatch, StepDraws, draw_step
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.objective.teacher import Teacher

PUBLISHED = LossWeights(visible_reconstruction=0.0, invariance=0.0, restyled_reconstruction=0.0)
SIZES = {
    "small": dict(
        latent_channels=4, latent_grid=(8, 12, 8), patch_size=2, width=96, depth=3, heads=4,
        decoder_width=60, decoder_depth=2, decoder_heads=4,
    ),
    "demo": dict(
        latent_channels=4, latent_grid=(10, 12, 10), patch_size=2, width=96, depth=3, heads=4,
        decoder_width=60, decoder_depth=2, decoder_heads=4,
    ),
    "paper": dict(
        latent_channels=4, latent_grid=(24, 24, 24), patch_size=4, width=768, depth=12, heads=12,
        decoder_width=384, decoder_depth=8, decoder_heads=12,
    ),
}  # fmt: skip


def plain_losses(
    student: MeDUET, teacher: FactorNetwork, batch: StepBatch, draws: StepDraws, config: ObjectiveConfig
) -> dict[str, Tensor]:
    """The published terms, one pass per quantity. Volume 1 of grid i is scan i, volume 2 its partner."""
    x1, x2, taken = batch.latents, batch.latents[draws.partner], draws.exchanged  # b n: token of volume 2

    grid = encode_grid(student, x1, x2, taken)
    rec1, rec2 = decode_both(student, grid, taken)
    target1, target2 = student.target_tokens(x1), student.target_tokens(x2)
    error = torch.where(taken, (rec1 - target1).square().mean(-1), (rec2 - target2).square().mean(-1))
    losses = {"reconstruction": error.mean()}

    site1, site2 = batch.site, batch.site[draws.partner]
    content = [mean_of(grid.content, ~taken), mean_of(grid.content, taken)]
    style = [mean_of(grid.style, ~taken), mean_of(grid.style, taken)]
    losses["site_adversary"] = sum(
        F.cross_entropy(student.site_from_content(c), s) / 2
        for c, s in zip(content, (site1, site2), strict=True)
    )
    losses["site_from_style"] = sum(
        F.cross_entropy(student.site_from_style(c), s) / 2 for c, s in zip(style, (site1, site2), strict=True)
    )

    again1, again2 = decode_both(student, grid, taken)  # the published code decodes a second time
    factors1 = student.encode(student.tokens_to_latents(again1))
    factors2 = student.encode(student.tokens_to_latents(again2))
    with torch.no_grad():
        clean1, clean2 = teacher.encode(x1), teacher.encode(x2)  # and encodes the reversed batch again
    c1, c2 = token_error(factors1.content, clean1.content), token_error(factors2.content, clean2.content)
    s1, s2 = token_error(factors1.style, clean1.style), token_error(factors2.style, clean2.style)
    losses["mftd"] = 0.5 * (c1[taken].mean() + c2[~taken].mean()) + s1[taken].mean() + s2[~taken].mean()

    queries = quadruplets(student, grid, taken, draws.partner)
    with torch.no_grad():
        other = encode_grid(teacher, x1, x2, ~taken)
        keys = quadruplets(teacher, other, ~taken, draws.partner)
    i = torch.arange(len(x1), device=x1.device)
    j = draws.partner
    losses["siqc"] = contrast(
        queries[0], keys[0], torch.cat([i, j, i, j]), config.temperature_content
    ) + contrast(queries[1], keys[1], torch.cat([site1, site2, site2, site1]), config.temperature_style)
    return losses


def encode_grid(network: FactorNetwork, x1: Tensor, x2: Tensor, taken: Tensor) -> Factors:
    """Factors of a mixed grid; `split` styles are taken from each source by the mask."""
    tokens = torch.where(taken.unsqueeze(-1), network.embed_latents(x2), network.embed_latents(x1))
    features = network.encoder(tokens)
    first, second = network.factors(x1, features), network.factors(x2, features)
    return Factors(first.content, torch.where(taken.unsqueeze(-1), second.style, first.style))


def decode_both(network: FactorNetwork, grid: Factors, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Both volumes of a mixture, each from its own tokens."""
    return network.predict_tokens(grid, ~taken), network.predict_tokens(grid, taken)


def quadruplets(
    network: FactorNetwork, grid: Factors, taken: Tensor, partner: Tensor
) -> tuple[Tensor, Tensor]:
    """Pooled content and style of volume 1, volume 2 and both swaps. The partner's grid holds, at each
    position, the other volume's token: its styles are the swap, at the same position."""
    swapped = Factors(grid.content, grid.style[partner])
    decoded = decode_both(network, swapped, taken)
    again = [network.encode(network.tokens_to_latents(tokens)) for tokens in decoded]
    content = [normed_mean(grid.content, ~taken), normed_mean(grid.content, taken)]
    style = [normed_mean(grid.style, ~taken), normed_mean(grid.style, taken)]
    whole = torch.ones_like(taken)
    content += [normed_mean(f.content, whole) for f in again]
    style += [normed_mean(f.style, whole) for f in again]
    return torch.cat(content), torch.cat(style)


def contrast(queries: Tensor, keys: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Supervised contrast, query by query; a query's own key is left out."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    losses = []
    for row in range(len(queries)):
        others = torch.arange(len(keys), device=keys.device) != row
        log_probability = similarity[row][others].log_softmax(0)
        losses.append(-log_probability[label[others] == label[row]].mean())
    return torch.stack(losses).mean()


def mean_of(tokens: Tensor, visible: Tensor) -> Tensor:
    """Mean over the visible tokens."""
    return torch.stack([row[shown].mean(0) for row, shown in zip(tokens, visible, strict=True)])


def normed_mean(tokens: Tensor, visible: Tensor) -> Tensor:
    """Layer norm, then mean over the visible tokens."""
    return mean_of(F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6), visible)


def token_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each token."""
    return (a - b).square().mean(-1)


@dataclass
class Step:
    """One way to compute the loss of a step."""

    name: str
    loss: Callable[[], Tensor]


def compare(student: MeDUET, teacher: Teacher, batch: StepBatch, draws: StepDraws) -> tuple[float, float]:
    """Largest difference of a term, relative to it, and of a gradient, relative to the largest gradient."""
    config = ObjectiveConfig(weights=PUBLISHED)
    ours = MeduetObjective(config)(student, teacher, batch, draws, 1.0)
    ours.total.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    plain = plain_losses(student, teacher.network, batch, draws, config)
    terms = max(
        float((plain[n] - ours.terms[n]).detach().abs() / plain[n].detach().abs().clamp(min=1.0))
        for n in plain
    )
    weighted(student, plain, PUBLISHED).backward()
    largest = max(float(g.abs().max()) for g in gradients.values())
    gap = max(
        float((p.grad - gradients[n]).abs().max()) for n, p in student.named_parameters() if n in gradients
    )
    student.zero_grad()
    assert set(plain) == set(ours.terms)
    return terms, gap / largest


def weighted(student: MeDUET, losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Sum of the weighted terms, the gradient of the adversary turned for what is below its classifier."""
    adversary = weights.site_adversary * losses["site_adversary"]
    below = [p for n, p in student.named_parameters() if not n.startswith("site_from")]
    for parameter, gradient in zip(
        below, torch.autograd.grad(adversary, below, retain_graph=True, allow_unused=True), strict=True
    ):
        if gradient is not None:  # twice: the backward pass that follows adds it once with the other sign
            parameter.grad = -2 * gradient
    return sum(getattr(weights, name) * term for name, term in losses.items())


def kept_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = loss()
    del total
    return sum(kept.values())


def seconds(loss: Callable[[], Tensor], student: MeDUET, device: torch.device) -> float:
    """One forward and backward pass."""
    student.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    loss().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def main() -> None:
    """Check that the losses agree, then print seconds and memory of each way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--paths", choices=("split", "joint"), default="split")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--brief", action="store_true", help="only the two whose losses are equal")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    config = NetworkConfig(**SIZES[arguments.size], factor_paths=arguments.paths)
    student = MeDUET(config, 4).to(device)
    teacher = Teacher(MeDUET(config, 4, seed=1).to(device))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(arguments.batch, config.latent_channels, *config.latent_grid, generator=generator)
    draws = draw_step(generator, arguments.batch, config.num_tokens, ObjectiveConfig(), (0, 1, 2, 3)).to(
        device
    )
    assert draws.target_site is not None
    batch = StepBatch(latents.to(device), draws.target_site)
    restyled = dataclasses.replace(batch, restyled=1.2 * batch.latents + 0.3)

    terms, gradient = compare(student, teacher, batch, draws)
    print(
        f"{arguments.size}, {arguments.paths}, batch {arguments.batch}, {config.num_tokens} tokens, {device}"
    )
    print(f"largest relative difference: loss terms {terms:.1e}, gradients {gradient:.1e}")
    if terms > 1e-4 or gradient > 1e-3:
        raise SystemExit("The two steps disagree: times would mean nothing.")

    def ours(
        given: StepBatch, weights: LossWeights, estimator: str = "full", turn: str = "mftd"
    ) -> Callable[[], Tensor]:
        objective = MeduetObjective(ObjectiveConfig(weights=weights, estimator=estimator))
        in_turn = dataclasses.replace(draws, turn=turn)
        return lambda: objective(student, teacher, given, in_turn, 1.0).total

    def plain() -> Tensor:
        losses = plain_losses(student, teacher.network, batch, draws, ObjectiveConfig())
        return sum(getattr(PUBLISHED, name) * term for name, term in losses.items())

    steps = [
        Step("published, plain", plain),
        Step("published, ours", ours(batch, PUBLISHED)),
        Step("published, one_stream", ours(batch, PUBLISHED, "one_stream")),
        Step("published, MFTD's turn", ours(batch, PUBLISHED, "alternate", "mftd")),
        Step("published, SiQC's turn", ours(batch, PUBLISHED, "alternate", "siqc")),
        Step("restyled, ours", ours(restyled, LossWeights())),
        Step("restyled, one_stream", ours(restyled, LossWeights(), "one_stream")),
        Step("restyled, MFTD's turn", ours(restyled, LossWeights(), "alternate", "mftd")),
        Step("restyled, SiQC's turn", ours(restyled, LossWeights(), "alternate", "siqc")),
    ]
    steps = steps[:2] if arguments.brief else steps
    times: dict[str, list[float]] = {step.name: [] for step in steps}
    with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
        for repeat in range(arguments.repeats + 1):
            for step in steps:  # interleaved, so that a busy machine is unfair to all of them
                took = seconds(step.loss, student, device)
                times[step.name] += [took] if repeat else []  # the first is warm-up
        memory = {step.name: peak(step.loss, student, device) for step in steps}
    base_s, base_bytes = sorted(times["published, plain"])[arguments.repeats // 2], memory["published, plain"]
    print(f"{'step':24}{'median s':>10}{'times faster':>14}{'MB kept':>10}{'ratio':>8}")
    for step in steps:
        median = sorted(times[step.name])[arguments.repeats // 2]
        print(
            f"{step.name:24}{median:10.4f}{base_s / median:14.2f}"
            f"{memory[step.name] / 1e6:10.1f}{memory[step.name] / base_bytes:8.2f}"
        )


def peak(loss: Callable[[], Tensor], student: MeDUET, device: torch.device) -> int:
    """Memory of a step: the allocator's peak on CUDA, what autograd keeps elsewhere."""
    if device.type != "cuda":
        return kept_bytes(loss)
    torch.cuda.reset_peak_memory_stats(device)
    seconds(loss, student, device)
    return torch.cuda.max_memory_allocated(device)


if __name__ == "__main__":
    main()
