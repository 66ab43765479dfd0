"""Synthesis: volumes drawn from a generative model, as NIfTI files in a folder.

A request says how many, and what is told: a site's style, a scan's content, both (the same patient as scanned
elsewhere), neither; the way between two scans; content moved along the direction of a covariate. Noise number
i depends on the seed and i alone, and batches are always cut in the same places: an interrupted request goes
on and ends in the same files, byte for byte. A folder of another request is refused.

What this file does not do: open scans (content comes encoded), write files (`synthesis_folder.py`), or judge
samples.

Axes: p = points along a way, n = content tokens, k = content channels, c d h w = latents.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from forms.form import build
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.conditions import UNKNOWN, Condition, Conditions
from meduet_models.diffusion.draws import generator_of
from meduet_models.diffusion.harmonisation import body_part_index, site_style
from meduet_models.diffusion.sampling import SamplingSettings, sample
from meduet_models.encoded_scan import EncodedScan
from meduet_models.tokenizer.tokenizer import Tokenizer
from scans.volume_plan import VolumePlan
from server.synthesis.folder import SynthesisFolder

Interpolation = Literal["linear", "spherical"]
Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class SynthesisRequest:
    """What is asked for."""

    count: int = 8
    """Noises drawn; with a way, each is seen at every point of it."""
    style: str = ""
    """Site of the target style; empty: style is not told."""
    content: EncodedScan | None = None
    """Scan whose content is told."""
    between: tuple[EncodedScan, EncodedScan] | None = None
    """Scans whose contents are the ends of a way."""
    interpolation: Interpolation = "spherical"
    """How content goes from one to the other, token by token."""
    along: str = ""
    """Covariate along whose direction `content` is moved."""
    amounts: tuple[float, float] = (0.0, 0.0)
    """From and to: by how much the covariate changes, in its own unit."""
    points: int = 1
    """Points of a way, both ends among them."""
    body_part: str = ""
    """Told body part."""
    category: str = ""
    """Told class."""
    spacing_mm: tuple[float, float, float] | None = None
    """Told spacing of the scan before resampling, right, anterior, superior."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """Steps, solver, guidance."""
    seed: int = 0
    """Of the noise."""
    batch_size: int = 8
    """Volumes sampled together."""

    @property
    def told(self) -> tuple[Condition, ...]:
        """Conditions that the request tells."""
        given = {
            "content": self.content is not None or self.between is not None,
            "style": bool(self.style),
            "body_part": bool(self.body_part),
            "spacing": self.spacing_mm is not None,
            "category": bool(self.category),
        }
        return tuple(name for name, there in given.items() if there)  # type: ignore[misc]

    @property
    def num_volumes(self) -> int:
        """Volumes that result."""
        return self.count * self.points


def check(model: GenerativeModel, tokenizer: Tokenizer, request: SynthesisRequest) -> None:
    """Raise `ValueError`, in one line, when the model cannot do what is asked, or a setting has no effect."""
    if model.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(
            f"Expected the model's tokenizer {model.tokenizer_sha256[:8]}…; got {tokenizer.sha256[:8]}… "
            f"({tokenizer.name}). Give --tokenizer or --maisi."
        )
    can = model.transformer.config.sizes.names
    if cannot := [name for name in request.told if name not in can]:
        raise ValueError(
            f"Expected conditions that the model knows ({', '.join(can) or 'none'}); got {cannot[0]}."
        )
    if idle := sorted(set(request.sampling.guidance) - set(request.told)):
        raise ValueError(f"--guidance {idle[0]} has no effect: {idle[0]} is not told.")
    if request.count < 1 or request.batch_size < 1:
        raise ValueError(f"Expected at least one volume and a batch of at least 1; got {request.count}.")
    if request.content is not None and request.between is not None:
        raise ValueError("Expected --content or --between; got both.")
    if request.along and request.content is None:
        raise ValueError("--along moves the content of a scan: give --content.")
    if request.along and request.along not in model.directions:
        known = ", ".join(sorted(model.directions)) or "none"
        raise ValueError(
            f"Expected a covariate whose direction the model holds ({known}); got {request.along!r}."
        )
    if (request.points > 1) != bool(request.along or request.between):
        raise ValueError("Expected --points of at least 2 with --between or --along, and only with them.")
    for scan, name in _scans(request):
        scan.check(model.tokenizer_sha256, model.volumes, name)
    if request.style:
        site_style(model, request.style, request.body_part)
    body_part_index(model, request.body_part)
    if request.category and request.category not in model.categories:
        raise ValueError(f"Expected a class among {', '.join(model.categories)}; got {request.category!r}.")
    if request.spacing_mm is not None and not all(0 < edge < math.inf for edge in request.spacing_mm):
        raise ValueError(f"Expected --spacing of positive millimetres; got {request.spacing_mm}.")


def synthesise(
    model: GenerativeModel,
    tokenizer: Tokenizer,
    request: SynthesisRequest,
    folder: Path,
    *,
    model_sha256: str = "",
    device: torch.device | str = "cpu",
    report: Report = lambda done, total: None,
) -> list[Path]:
    """Draw what is asked for into `folder`, or go on with it; returns the files in order.

    `report(done, total)` counts volumes. Raises `ValueError` as `check` does, and when the folder holds
    another request or other files.
    """
    check(model, tokenizer, request)
    device = torch.device(device)
    for network in (model.transformer, model.encoder, tokenizer):
        network.to(device)
    files = SynthesisFolder(
        folder,
        _described(model, request, model_sha256),
        build(VolumePlan, model.volumes, "volumes of the model"),
    )
    paths = [files.path(number) for number in range(1, request.num_volumes + 1)]
    contents = _contents(model, request)
    done = 0
    for first in range(0, len(paths), request.batch_size):
        rows = range(first, min(first + request.batch_size, len(paths)))
        if not all(paths[row].is_file() for row in rows):
            latents = _draw(model, request, contents, rows)
            decoded = tokenizer.decode(latents.to(device)).cpu().clamp(0.0, 1.0)
            if not bool(torch.isfinite(decoded).all()):
                raise ValueError("Expected finite intensities; the model made others. Check its file.")
            for row, volume in zip(rows, decoded, strict=True):
                if not paths[row].is_file():
                    files.write(row + 1, volume)
        done += len(rows)
        report(done, len(paths))
    files.write_tables([_row(request, row) for row in range(len(paths))])
    return paths


def interpolate(
    start: Float[Tensor, "n k"], end: Float[Tensor, "n k"], share: float, how: Interpolation
) -> Float[Tensor, "n k"]:
    """Content between two scans, token by token; `share` 0 is `start`, 1 is `end`.

    `spherical` turns each token's direction evenly and changes its length evenly, so that tokens half-way are
    as long as those at the ends; tokens that point the same way, or opposite ways, go straight.
    """
    straight = (1 - share) * start + share * end
    if how == "linear" or share in (0.0, 1.0):
        return straight
    lengths = [x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (start, end)]
    a, b = start / lengths[0], end / lengths[1]
    angle = (a * b).sum(1, keepdim=True).clamp(-1, 1).arccos()
    sine = angle.sin()
    turned = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / sine.clamp(min=1e-6)
    length = (1 - share) * lengths[0] + share * lengths[1]
    return torch.where(sine > 1e-3, turned * length, straight)


def shares(points: int) -> list[float]:
    """Places along a way, both ends among them."""
    return [point / (points - 1) for point in range(points)] if points > 1 else [0.0]


def _scans(request: SynthesisRequest) -> list[tuple[EncodedScan, str]]:
    if request.between is not None:
        return [(request.between[0], "the first scan"), (request.between[1], "the second scan")]
    return [] if request.content is None else [(request.content, "the scan")]


def _contents(model: GenerativeModel, request: SynthesisRequest) -> Float[Tensor, "p n k"] | None:
    """What content is told at each point; None where none is."""
    grid = model.transformer.config.latent_grid
    tokens = [model.conditioner.content(scan.central(grid)[None])[0] for scan, _ in _scans(request)]
    if request.between is not None:
        way = [
            interpolate(tokens[0], tokens[1], share, request.interpolation)
            for share in shares(request.points)
        ]
        return torch.stack(way)
    if request.along:
        low, high = request.amounts
        direction = model.directions[request.along].to(tokens[0])
        return torch.stack([tokens[0] + (low + s * (high - low)) * direction for s in shares(request.points)])
    return tokens[0][None] if tokens else None


def _draw(
    model: GenerativeModel, request: SynthesisRequest, contents: Tensor | None, rows: Sequence[int]
) -> Float[Tensor, "b c d h w"]:
    """Latents of these rows; row = noise number x points + point."""
    config, count = model.transformer.config, len(rows)
    shape = (config.latent_channels, *config.latent_grid)
    draws = [generator_of("synthesis", request.seed, row // request.points) for row in rows]
    noise = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
    style = None
    if request.style:
        style = model.conditioner.style_of(site_style(model, request.style, request.body_part)).expand(
            count, -1
        )
    place = body_part_index(model, request.body_part)
    kind = model.categories.index(request.category) if request.category else UNKNOWN
    conditions = Conditions(
        content=None if contents is None else contents[[row % request.points for row in rows]],
        style=style,
        body_part=torch.full((count,), place) if "body_part" in request.told else None,
        category=torch.full((count,), kind) if "category" in request.told else None,
        spacing=None if request.spacing_mm is None else torch.tensor([request.spacing_mm] * count),
    )
    return sample(
        model.transformer, conditions, count, request.sampling,
        seed=request.seed, batch_size=count, noise=noise,
    )  # fmt: skip


def _described(model: GenerativeModel, request: SynthesisRequest, model_sha256: str) -> dict[str, Any]:
    """The request as plain values: what makes a folder this request's."""
    scans = [scan.sha256 for scan, _ in _scans(request)]
    plain = {
        f.name: getattr(request, f.name)
        for f in dataclasses.fields(request)
        if f.name not in ("content", "between", "sampling")
    }
    described: dict[str, Any] = {
        "patient_data": _patient_data(model, request),
        "model_sha256": model_sha256,
        "model_policy": model.policy,
        "tokenizer_sha256": model.tokenizer_sha256,
        "mode": _mode(request),
        "content_sha256": scans,
        **plain,
        "sampling": dataclasses.asdict(request.sampling),
    }
    described = json.loads(json.dumps(described))  # tuples as lists, as they are read back
    return described


def _mode(request: SynthesisRequest) -> str:
    if request.between is not None:
        return "between two scans"
    if request.along:
        return f"along {request.along}"
    names = [name for name in ("content", "style") if name in request.told]
    return " and ".join(names) if names else "unconditional"


def _patient_data(model: GenerativeModel, request: SynthesisRequest) -> str:
    """Why the volumes are patient data; empty where they are not known to be."""
    why = []
    if model.patient_data:
        why.append("the model was trained on raw latents and may reproduce scans it has seen")
    if "content" in request.told:
        why.append("the volumes show the anatomy of a real scan")
    return "; ".join(why)


def _row(request: SynthesisRequest, row: int) -> dict[str, Any]:
    """What one volume is, beyond what all share."""
    share = shares(request.points)[row % request.points]
    low, high = request.amounts
    return {
        "noise": row // request.points,
        "share": round(share, 6) if request.between is not None else "",
        "amount": round(low + share * (high - low), 6) if request.along else "",
    }
