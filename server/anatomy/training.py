"""Training a start from public anatomy, at the centre, before anybody is asked for anything.

The network sees random renderings of random pieces and predicts their answers (`pieces.py`); nothing here
sees a patient. The run is a function of its settings: each step's pieces are drawn from (seed, step), so one
that was stopped and resumed ends with the same weights as one that was not (on the same machine and PyTorch).
What is written is the moving average of the body's weights, rounded to half precision, with its provenance
and what it knows of pieces that no step drew; the heads that predict are left behind.

Axes: b = pieces, a = answers, k = features, d h w = cubes of two voxels per edge.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meduet_models.anatomy_start import AnatomyKind, load_start, save_start
from meduet_models.schedules import cosine, rise
from meduet_models.seeds import seed_of
from meduet_models.volume_unet import WIDTHS, VolumeUNet, start_weights
from server.anatomy.pieces import ANSWERS, UNIT_MM, Pieces, draw_pieces
from server.averaged_training import AveragedTraining, check_output

_HELD_OUT = 32  # pieces
_AT_ONCE = 8
_BORDER = ANSWERS.index("border")
_WEIGHTS = (1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0, 1.0)
"""Of the answers: about what makes each of them start near 1."""

Report = Callable[[int, float], None]
"""Called after each step with its number (from 1) and its loss."""


@dataclass(frozen=True, kw_only=True)
class AnatomyTraining:
    """Settings of a training run; with the code's version they determine the weights."""

    start: AnatomyKind = "canonical"
    """Pieces of the template and a few shapes, or shapes alone."""
    steps: int = 800
    """Optimiser steps, about .6 CPU-seconds each."""
    batch_size: int = 8
    """Pieces per step."""
    seed: int = 0
    """Of weights, pieces and renderings."""
    learning_rate: float = 2e-3
    """Peak; rises over `warmup`, then falls as a cosine to a hundredth."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    average_momentum: float = 0.99
    """Of the moving average of the weights."""

    def __post_init__(self) -> None:
        """Raise `ValueError` on settings that cannot train."""
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of at least 1; got {getattr(self, name)}.")


@dataclass(frozen=True)
class AnatomyQuality:
    """What a start knows of pieces that training never drew; NaN where there is no such answer."""

    place_mm: float
    """Mean distance between where a brain voxel lies in the template and where it is thought to."""
    blind_mm: float
    """The same for the mean place of these pieces, which looks at nothing."""
    maps_r2: float
    """Explained variance of T1 and tissue maps (of shapes: of their own intensities)."""
    border_r2: float
    """Explained variance of the share of border voxels."""
    pieces: int


class AnatomyNetwork(nn.Module):
    """The body that is kept, and the heads that predict the answers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.body = VolumeUNet(seed=seed_of("fedmeduet anatomy body", seed))
        with torch.device("meta"):
            self.heads = nn.Conv3d(WIDTHS[0], len(ANSWERS), 1)
        start_weights(self.heads, seed_of("fedmeduet anatomy heads", seed))

    def forward(self, volumes: Tensor) -> Tensor:
        """Answers of each cube, of the border its logit: [b a d h w]."""
        answers: Tensor = self.heads(self.body(volumes))
        return answers


def train_start(
    settings: AnatomyTraining,
    out: Path,
    report: Report,
    *,
    checkpoint_every: int = 50,
    stop_after: int | None = None,
) -> AnatomyQuality | None:
    """Train and write the start to `out` (.safetensors); returns what it knows.

    Every `checkpoint_every` steps the state goes to `out` with the suffix .checkpoint; a later call with the
    same settings goes on from there, one with others raises `ValueError`. The checkpoint is removed at the
    end. `stop_after`: so many steps in this call at most; None is returned when more are left.
    """
    check_output(out)
    run, checkpoint = _Run(settings), out.with_suffix(".checkpoint")
    if checkpoint.is_file():
        run.training.resume(checkpoint)
    until = settings.steps if stop_after is None else min(settings.steps, run.training.step + stop_after)
    run.training.go_on(until, run.train_step, report, checkpoint, checkpoint_every)
    if until < settings.steps:
        run.training.save(checkpoint)
        return None
    network = run.finished()
    quality = quality_of(network, settings.start, settings.seed)
    facts = {
        "command": "meduet-server pretrain-public",
        "settings": json.dumps(dataclasses.asdict(settings), sort_keys=True),
        "data": "random pieces of the ICBM 152 (2009) template inside nilearn; no scan of a patient",
        "quality": json.dumps(dataclasses.asdict(quality), sort_keys=True),
        "fedmeduet": version("fedmeduet"),
        "torch": torch.__version__,
        "nilearn": version("nilearn"),
    }
    save_start(out, settings.start, network.body.state_dict(), facts)
    load_start(out)  # what cannot be read back is no start
    checkpoint.unlink(missing_ok=True)
    return quality


@torch.inference_mode()
def quality_of(network: AnatomyNetwork, kind: AnatomyKind, seed: int) -> AnatomyQuality:
    """Measured on pieces from a stream that training never draws from."""
    network.eval()
    pieces = draw_pieces(kind, _HELD_OUT, seed, "held out")
    predicted = torch.cat([network(part) for part in torch.split(pieces.volumes, _AT_ONCE)])
    predicted[:, _BORDER] = predicted[:, _BORDER].sigmoid()
    nowhere = float("nan")
    place, of_mean = nowhere, nowhere
    inside = pieces.known[:, 0]
    if bool(inside.any()):
        truth, guess = (x[:, :3].movedim(1, -1)[inside] for x in (pieces.answers, predicted))
        place = float((guess - truth).norm(dim=1).mean()) * UNIT_MM
        of_mean = float((truth.mean(dim=0) - truth).norm(dim=1).mean()) * UNIT_MM
    maps = slice(3, 6) if kind == "canonical" else slice(6, 7)
    return AnatomyQuality(
        place_mm=place,
        blind_mm=of_mean,
        maps_r2=_explained(predicted[:, maps], pieces.answers[:, maps], pieces.known[:, maps]),
        border_r2=_explained(predicted[:, _BORDER], pieces.answers[:, _BORDER], pieces.known[:, _BORDER]),
        pieces=len(pieces.volumes),
    )


def _explained(predicted: Tensor, truth: Tensor, known: Tensor) -> float:
    predicted, truth = predicted[known], truth[known]
    return 1.0 - float((predicted - truth).square().mean() / truth.var(correction=0))


def answer_loss(predicted: Tensor, pieces: Pieces) -> Tensor:
    """Squared error of what is a number, cross-entropy of the border; the mean over answers that are
    known."""
    squared = (predicted - pieces.answers).square()
    entropy = F.binary_cross_entropy_with_logits(
        predicted[:, _BORDER], pieces.answers[:, _BORDER], reduction="none"
    )
    errors = torch.cat([squared[:, :_BORDER], entropy[:, None]], dim=1)
    known = pieces.known.float()
    each = (errors * known).sum(dim=(0, 2, 3, 4)) / known.sum(dim=(0, 2, 3, 4)).clamp_min(1.0)
    return (each * torch.tensor(_WEIGHTS)).sum()


class _Run:
    """A training run: its network, what a step draws, and what is kept in the end."""

    def __init__(self, settings: AnatomyTraining) -> None:
        self.settings, self.network = settings, AnatomyNetwork(settings.seed)
        self.training = AveragedTraining(
            self.network, settings, named="network", weight_decay=1e-2, momentum=settings.average_momentum
        )

    def train_step(self, step: int) -> float:
        """One optimiser step; returns its loss."""
        settings = self.settings
        pieces = draw_pieces(settings.start, settings.batch_size, settings.seed, "step", step)
        share = rise(step, round(settings.warmup * settings.steps)) * cosine(1.0, 0.01, step, settings.steps)
        loss = answer_loss(self.network(pieces.volumes), pieces)
        self.training.descend(loss, settings.learning_rate * share)
        return float(loss.detach())

    def finished(self) -> AnatomyNetwork:
        """The averaged weights, the body's rounded to half precision."""
        self.network.load_state_dict(self.training.average)
        body = self.network.body
        body.load_state_dict({name: t.half().float() for name, t in body.state_dict().items()})
        return self.network
