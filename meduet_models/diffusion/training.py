"""Training the diffusion transformer: flow matching, one step at a time, wherever the examples are.

A step reads a batch, puts it somewhere between noise and data, asks the transformer for the velocity there,
and moves weights and their moving average. The same class trains at the centre, on released latents, and at a
site, on its own. Every draw depends on seed and step alone, and `state` holds all that a step changes: a
trainee that was put away and loaded again goes on as if nothing had happened.

What a sample is told: each condition is dropped by itself; a share of the samples is told the style of its
site instead of its own, so that a site's style can be asked for later; and another share is told the content
of its scan restyled to another site's style, so that style cannot be read from content. With `alignment`,
tokens after the first half of the blocks are brought near the frozen encoder's content tokens through a small
network that is not part of the model (REPA); told content makes that task easier, not void, since it is asked
at all times.

What this file does not do: start the transformer (`initialisation.py`), or keep examples.

Axes: b = samples, c d h w = latents, n = tokens, k = width, s = numbers in a style code.
Source: SiT (arXiv:2401.08740), REPA (arXiv:2410.06940).
"""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meduet_models.adamw import AdamW, decay_groups
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.diffusion.conditions import Condition, Conditions, Examples, ExampleSource
from meduet_models.diffusion.draws import StepDraw, draw_step, generator_of
from meduet_models.diffusion.path import Path
from meduet_models.diffusion.settings import DiffusionTraining
from meduet_models.diffusion.site_styles import SiteStyles, restyled_examples
from meduet_models.diffusion.transformer import DiffusionTransformer, regrid
from meduet_models.objective.teacher import early_momentum
from meduet_models.schedules import rise
from meduet_models.style.bank import StyleBank

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class LossNotFinite(ValueError):
    """The loss or its gradient is NaN or infinite; the weights were not touched."""


class DiffusionTrainee:
    """A transformer in training, with its moving average and AdamW's moments."""

    ema: DiffusionTransformer
    """The moving average of the weights: what is sampled from."""
    mixes: ClassVar[bool] = False
    """A sample's loss does not depend on the other samples of its batch."""

    def __init__(
        self,
        transformer: DiffusionTransformer,
        conditioner: Conditioner,
        settings: DiffusionTraining,
        *,
        total_steps: int,
        seed: int,
        style_bank: StyleBank | None,
    ) -> None:
        """`style_bank`: the sites' styles, for `site_style`, `restyled_content` and `restyled_scans`.

        Raises `ValueError` when samples need sites' styles and too few sites have told one.
        """
        self.transformer, self.settings, self.seed, self.bank = transformer, settings, seed, style_bank
        self.names = transformer.config.sizes.names
        if (
            "style" in self.names
            and settings.site_style > 0
            and (style_bank is None or not style_bank.present)
        ):
            raise ValueError(
                "diffusion.training.site_style needs the styles of the sites, and none told one: "
                "set it to 0, or exchange styles."
            )
        restyling = {"restyled_content": "content" in self.names, "restyled_scans": True}
        for name, used in restyling.items():
            if used and getattr(settings, name) > 0 and (style_bank is None or len(style_bank.present) < 2):
                raise ValueError(
                    f"diffusion.training.{name} needs the styles of two sites or more, and fewer told one: "
                    "set it to 0, or exchange styles."
                )
        self._warmup = round(settings.warmup * total_steps)
        self._path = Path(transformer.config.path)
        transformer.checkpoint_blocks = settings.checkpoint_blocks
        self.ema = copy.deepcopy(transformer).eval().requires_grad_(False)
        self.projector = _projector(transformer, conditioner, seed) if settings.alignment else None
        parameters = dict(self._parameters())
        self._optimiser = AdamW(
            decay_groups(parameters.values(), settings.weight_decay),
            lr=settings.learning_rate,
            fused=True,
        )
        self.replace_conditioner(conditioner)

    def replace_conditioner(self, conditioner: Conditioner) -> None:
        """Go on with a newer encoder. The latent scale stays that of the start."""
        self.conditioner = conditioner
        self._styles = SiteStyles.of(conditioner, self.bank) if "style" in self.names else None

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, from 0: a straight rise, then constant."""
        return self.settings.learning_rate * rise(step, self._warmup)

    def step(self, source: ExampleSource, step: int) -> dict[str, float]:
        """Take step number `step` (from 0) on a batch from `source`; what happened, by name.

        Raises `LossNotFinite` before weights are touched, `ValueError` when the source is empty.
        """
        settings, transformer = self.settings, self.transformer
        device = transformer.latent_mean.device
        draw = draw_step(settings, self.names, len(source), self.seed, step)
        examples = source.read(draw.rows)
        if bool(draw.moved.any()) and self.bank is not None:
            examples = restyled_examples(self.bank, examples, draw.moved, draw.scan_target)
        conditions = self._told(examples, draw, device)
        data = transformer.standardise(examples.latents.to(device))
        noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(draw.noise_seed)).to(device)
        time = draw.time.to(device)

        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            predicted, hidden = transformer.velocity_and_hidden(
                self._path.noisy(data, noise, time), time, conditions
            )
            aligned = self._alignment(hidden, conditions, examples)
        velocity = F.mse_loss(predicted, self._path.velocity(data, noise, time))
        loss = velocity if aligned is None else velocity + settings.alignment * aligned
        _finite(loss, "loss", step)

        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in self._parameters()], settings.gradient_clip_norm)
        _finite(norm, "gradient", step)
        for group in self._optimiser.param_groups:
            group["lr"] = self.learning_rate_at(step)
        self._optimiser.step()
        self._follow(early_momentum(settings.ema, step))

        values = {"loss": loss, "velocity": velocity, "gradient_norm": norm}
        values |= {} if aligned is None else {"alignment": aligned}
        return {name: float(value.detach()) for name, value in values.items()} | {
            "learning_rate": self.learning_rate_at(step)
        }

    def state(self) -> dict[str, Tensor]:
        """All that a step changes, on the CPU: weights, moving average, AdamW's moments."""
        networks: dict[str, nn.Module] = {"transformer": self.transformer, "ema": self.ema}
        networks |= {} if self.projector is None else {"projector": self.projector}
        tensors = {
            f"{kind}/{n}": t for kind, network in networks.items() for n, t in network.state_dict().items()
        }
        for name, parameter in self._parameters():
            for moment in _MOMENTS if parameter in self._optimiser.state else ():
                tensors[f"{moment}/{name}"] = self._optimiser.state[parameter][moment]
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` was taken from.

        Raises `ValueError` naming the first tensor that is missing, unknown or of another shape; nothing has
        changed then.
        """
        parameters = dict(self._parameters())
        moments = {f"{moment}/{n}": p for n, p in parameters.items() for moment in _MOMENTS}
        stepped = any(name in moments for name in state)
        expected = {n: tuple(t.shape) for n, t in self.state().items() if n not in moments}
        if stepped:
            expected |= {n: () if n.startswith("step/") else tuple(p.shape) for n, p in moments.items()}
        came = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if wrong := sorted(n for n in {*expected, *came} if expected.get(n) != came.get(n)):
            raise ValueError(
                f"Expected the state of this diffusion model in training; {wrong[0]!r} is "
                f"{came.get(wrong[0], 'missing')} and should be {expected.get(wrong[0], 'absent')}."
            )

        def part(kind: str) -> dict[str, Tensor]:
            return {n.partition("/")[2]: t for n, t in state.items() if n.partition("/")[0] == kind}

        self.transformer.load_state_dict(part("transformer"))
        self.ema.load_state_dict(part("ema"))
        if self.projector is not None:
            self.projector.load_state_dict(part("projector"))
        self._optimiser.state.clear()
        for name, parameter in parameters.items() if stepped else ():
            self._optimiser.state[parameter] = {
                moment: state[f"{moment}/{name}"].to(parameter.device, copy=True) for moment in _MOMENTS
            }

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        named = [(f"transformer.{n}", p) for n, p in self.transformer.named_parameters()]
        if self.projector is not None:
            named += [(f"projector.{n}", p) for n, p in self.projector.named_parameters()]
        return named

    def _told(self, examples: Examples, draw: StepDraw, device: torch.device) -> Conditions:
        codes = None if self._styles is None else self._styles.codes(examples, draw.as_site)
        others = [name for name in self.names if name != "content"]
        conditions = self.conditioner.conditions(examples, others, codes)
        if "content" in self.names:
            seen = examples.latents
            if bool(draw.restyled.any()) and self.bank is not None:
                seen = restyled_examples(self.bank, examples, draw.restyled, draw.content_target).latents
            conditions = dataclasses.replace(conditions, content=self.conditioner.content(seen))
        conditions = conditions.each(lambda t: t.to(device))
        dropped = {name: mask.to(device) for name, mask in draw.dropped.items()}
        return Conditions(**{name: getattr(conditions, name) for name in self.names}, dropped=dropped)

    def _alignment(self, hidden: Tensor, conditions: Conditions, examples: Examples) -> Tensor | None:
        if self.projector is None:
            return None
        content = conditions.content
        if content is None:
            content = self.conditioner.content(examples.latents).to(hidden.device)
        grid = self.conditioner.encoder.config.token_grid
        target = regrid(content, grid, self.transformer.config.token_grid)
        return -F.cosine_similarity(self.projector(hidden).float(), target, dim=2).mean()

    @torch.no_grad()
    def _follow(self, momentum: float) -> None:
        ours: list[Tensor] = list(self.ema.parameters())
        theirs: list[Tensor] = list(self.transformer.parameters())
        torch._foreach_lerp_(ours, theirs, 1.0 - momentum)


@torch.no_grad()
def validation_loss(
    transformer: DiffusionTransformer,
    conditioner: Conditioner,
    examples: Examples,
    names: Sequence[Condition],
    *,
    style_bank: StyleBank | None = None,
    seed: int = 0,
    repeats: int = 4,
) -> Float[Tensor, " b"]:
    """Mean squared error of the velocity for each example, told the conditions in `names` alone.

    The draws are fixed by `seed`: noise and times are the same whatever is told, and each example's times are
    one in each of `repeats` equal shares of [0, 1]. With a `style_bank`, style is that of the site (the
    scan's own where the site has none).
    """
    device, path = transformer.latent_mean.device, Path(transformer.config.path)
    styles = SiteStyles.of(conditioner, style_bank) if "style" in names else None
    losses = []
    for rows in torch.split(torch.arange(len(examples)), 32):
        some = examples.rows(rows)
        everyone = torch.ones(len(some), dtype=torch.bool)
        codes = None if styles is None else styles.codes(some, everyone)
        conditions = conditioner.conditions(some, names, codes).each(lambda t: t.to(device))
        data, total = transformer.standardise(some.latents.to(device)), torch.zeros(len(some), device=device)
        for repeat in range(repeats):
            draws = [generator_of("validation", seed, repeat, int(row)) for row in rows]
            time = torch.cat([torch.rand(1, generator=g) for g in draws]).add(repeat).div(repeats).to(device)
            noise = torch.stack([torch.randn(data.shape[1:], generator=g) for g in draws]).to(device)
            predicted = transformer(path.noisy(data, noise, time), time, conditions)
            total += (predicted - path.velocity(data, noise, time)).square().mean((1, 2, 3, 4))
        losses.append(total / repeats)
    return torch.cat(losses)


def _projector(transformer: DiffusionTransformer, conditioner: Conditioner, seed: int) -> nn.Module:
    """Tokens of the transformer to content tokens of the encoder: an MLP, from its own seed."""
    width = transformer.config.shape.width
    layers: list[nn.Linear] = [
        nn.Linear(width, 2 * width), nn.Linear(2 * width, 2 * width),
        nn.Linear(2 * width, conditioner.encoder.config.width),
    ]  # fmt: skip
    generator = generator_of("projector", seed)
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    network = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
    return network.to(transformer.latent_mean.device)


def _finite(value: Tensor, what: str, step: int) -> None:
    if not math.isfinite(number := float(value.detach())):
        raise LossNotFinite(
            f"Expected a finite {what} at step {step} of the diffusion model; got {number}. The weights are "
            "untouched; lower diffusion.training.learning_rate, or look for latents out of range."
        )
