"""Published weights as something that takes a scan: code, tokens, style, reconstruction, another style.

`load` reads the folder of a run, or its `model.safetensors`; how a scan is prepared, and which tokenizer and
network read it, is what the header says, so a scan means here what it meant at the sites. A scan is a path
(NIfTI, a DICOM file, a folder with one series) or an array with its affine. A model of whole scans
(`volumes.extent: scan`) sees all of the foreground, by windows that overlap.

What comes out is the patient's, as the scan is. What this file does not do: understand folders of many scans
(`client/products/embedding.py`), write files, or fetch anything.

Axes: x y z = voxels as stored; c d h w = latents; b = windows; p q r = tokens towards right, anterior,
superior; k = content channels, n = numbers in the code, m = numbers of a result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Shaped
from torch import Tensor
from torch.nn import functional as F

from forms.form import build
from forms.json_text import read_json
from meduet_models.diffusion.artefact import DIFFUSION_MODEL, GenerativeModel, load_generative_model
from meduet_models.diffusion.harmonisation import HarmonisationSettings
from meduet_models.diffusion.harmoniser import Harmonised, Harmoniser
from meduet_models.factors import VARIANCE_FLOOR
from meduet_models.published.pretrained import MODEL, Pretrained, load_pretrained
from meduet_models.published.signature import Signature, check_signature
from meduet_models.scan_latents import encoded
from meduet_models.tokenizer.tokenizer import Tokenizer, load_tokenizer_file, shipped_tokenizer
from meduet_models.tokenizer.whole_scans import decode_whole
from meduet_models.windows import Windows
from scans.scans import Scan, accept, check_shape, combine
from scans.volume_plan import VolumePlan
from scans.volumes import Prepared, intensity_range, lay_back, read_scan
from scans.whole_volumes import WholeVolume, lay_back_whole

TOKENIZER = "tokenizer.safetensors"
"""In a run's or an export's folder; it is the package's own where none is there."""
ScanLike = str | Path | Scan | Shaped[np.ndarray, "..."]
Affine = Float64[np.ndarray, "4 4"] | None


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A scan as a model holds it, on its own grid."""

    array: Float32[np.ndarray, "x y z"]
    """Intensities in the scan's own range; its lower end outside the part that the model sees."""
    affine: Float64[np.ndarray, "4 4"]
    """The scan's own: voxel indices to RAS+ mm."""
    through: str
    """`network`: content, style and tokenizer. `tokenizer`: the frozen tokenizer alone, where the style
    branch stayed at the sites."""


class ScanModel:
    """Published weights, ready for scans. Every result is float32 on the CPU; scans are never changed.

    Each method takes a path, or an array with `affine` (voxel indices to RAS+ mm), and raises `UnusableScan`
    (a `ValueError` with a reason) for what is no scan.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        volumes: VolumePlan,
        tokenizer: Tokenizer,
        generative: GenerativeModel | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network, self.tokenizer = pretrained.network.to(device), tokenizer.to(device)
        self.volumes, self.provenance = volumes, pretrained.provenance
        self.signature: Signature | None = None
        """Who signed the weights; None: nobody."""
        self._has_style, self._generative, self._device = pretrained.has_style, generative, device

    @torch.inference_mode()
    def embed(self, scan: ScanLike, affine: Affine = None) -> Float32[np.ndarray, " n"]:
        """The content code: what is where in the scan, without the site it is from; n = `network.code_size`.

        Of a whole scan: the mean of its windows' codes, each weighted with the foreground that it holds.
        Raises `ValueError` when the run fitted no code.
        """
        if not self.network.has_content_code:
            raise ValueError(
                "Expected weights with a content code; a run of one site has none. Take the pooled content "
                "(`.content`; --what content) instead."
            )
        return self._averaged(scan, affine, self.network.content_code)

    @torch.inference_mode()
    def content(self, scan: ScanLike, affine: Affine = None) -> Float32[np.ndarray, " k"]:
        """The mean of the content tokens; knows little of where things are."""
        return self._averaged(scan, affine, self.network.pooled_content)

    @torch.inference_mode()
    def tokens(self, scan: ScanLike, affine: Affine = None) -> Float32[np.ndarray, "p q r k"]:
        """Content tokens on their grid, each an edge of tokenizer stride times `network.patch_size` voxels of
        `volumes.spacing_mm` long. Of a whole scan: those of its windows, blended."""
        prepared, latents = self._latents(self._scan(scan, affine))
        if isinstance(prepared, WholeVolume):
            windows = self._windows(latents)
            like = torch.zeros(self.network.config.width, *windows.sides)
            blended = windows.blend(lambda some: self._token_grid(self._cut(latents, windows, some)), like)
        else:
            blended = self._token_grid(latents[None])[0]
        return _array(blended.movedim(0, -1))

    @torch.inference_mode()
    def style(self, scan: ScanLike, affine: Affine = None) -> Float32[np.ndarray, " m"]:
        """How the scan looks: of each of c latent channels the mean, then of each the log deviation, over the
        crop or the foreground, less the federation's and over its deviation; m = 2c."""
        prepared, latents = self._latents(self._scan(scan, affine))
        if isinstance(prepared, WholeVolume):
            latents = latents[:, prepared.foreground]
        flat, scale = latents.flatten(1), self.network.latent_deviation.cpu()
        variance, mean = torch.var_mean(flat, dim=1, correction=0)
        centre = self.network.latent_mean.cpu().flatten(1).mean(1)
        deviation = (variance + VARIANCE_FLOOR).sqrt()
        return _array(torch.cat([(mean - centre) / scale, (deviation / scale).log()]))

    @torch.inference_mode()
    def reconstruct(self, scan: ScanLike, affine: Affine = None) -> Reconstruction:
        """The scan from what the model holds of it, on the scan's own grid; `through` says which part."""
        read = self._scan(scan, affine)
        prepared, latents = self._latents(read)
        whole = isinstance(prepared, WholeVolume)
        if self._has_style:
            latents = self._decoded(latents, whole)
        if whole:
            volume = decode_whole(self.tokenizer, latents, self._device)
        else:
            volume = self.tokenizer.decode(latents[None].to(self._device))[0].cpu()
        low, high = intensity_range(read.array, self.volumes)
        back = lay_back_whole if whole else lay_back
        array, own = back(volume.clamp(0.0, 1.0), prepared.geometry)
        scaled = np.float32(low) + array.astype(np.float32) * np.float32(high - low)
        return Reconstruction(scaled, own, "network" if self._has_style else "tokenizer")

    def harmonise(self, scan: ScanLike, style: str, affine: Affine = None) -> Harmonised:
        """The same patient as the site `style` would have scanned her, on the scan's own grid; made, not
        acquired. Raises `ValueError` without a diffusion model, and listing the styles that it knows."""
        if self._generative is None:
            raise ValueError(
                f"Expected {DIFFUSION_MODEL} beside the weights; there is none. Make the run with a "
                "diffusion model (meduet-simulate diffusion=federated)."
            )
        harmoniser = Harmoniser(
            self._generative, self.tokenizer, HarmonisationSettings(style=style), device=self._device
        )
        return harmoniser(self._scan(scan, affine))

    def _scan(self, scan: ScanLike, affine: Affine) -> Scan:
        if isinstance(scan, str | Path | Scan) and affine is not None:
            raise ValueError("Expected affine only with an array; a file has its own.")
        if isinstance(scan, Scan):
            return scan
        if isinstance(scan, str | Path):
            if not Path(scan).exists():
                raise ValueError(f"Expected a scan at {scan}; nothing is there.")
            return read_scan(Path(scan), self.volumes.four_d)
        if affine is None:
            raise ValueError(
                "Expected the affine of the array (voxel indices to RAS+ mm: nibabel's image.affine); got "
                "none."
            )
        _, count = check_shape(scan.shape, self.volumes.four_d)
        volumes = np.moveaxis(np.asarray(scan).reshape(*scan.shape[:3], count), -1, 0)
        return accept(combine(iter(volumes), self.volumes.four_d), np.asarray(affine, np.float64), count)

    def _latents(self, scan: Scan) -> tuple[Prepared, Float32[Tensor, "c d h w"]]:
        return encoded(scan, self.volumes, self.tokenizer, self._device)

    def _averaged(
        self, scan: ScanLike, affine: Affine, read: Callable[[Tensor], Tensor]
    ) -> Float32[np.ndarray, " m"]:
        """What `read` says of the crop; of windows over a whole scan, weighted with their foreground."""
        prepared, latents = self._latents(self._scan(scan, affine))
        if not isinstance(prepared, WholeVolume):
            return _array(read(latents[None].to(self._device))[0])
        windows = self._windows(latents)
        held = _padded(prepared.foreground[None].float(), self.network.config.patch_size)
        total, weight = torch.zeros(()), torch.zeros(())
        for some in windows.chunks():
            weights = self._cut(held, windows, some).flatten(1).sum(1).cpu()
            said = read(self._cut(latents, windows, some)).float().cpu()
            total, weight = total + weights @ said, weight + weights.sum()
        return _array(total / weight)

    def _decoded(self, latents: Float[Tensor, "c d h w"], whole: bool) -> Float[Tensor, "c d h w"]:
        """Latents from content and style of themselves."""

        def part(windowed: Tensor) -> Tensor:
            return self.network.decode(self.network.encode(windowed.to(self._device))).cpu()

        if not whole:
            return part(latents[None])[0]
        windows = Windows.over(tuple(latents.shape[1:]), self.network.config.latent_grid)
        return windows.blend(lambda some: part(windows.cut(latents, some)), torch.zeros_like(latents))

    def _windows(self, latents: Float[Tensor, "c d h w"]) -> Windows:
        """Windows over a whole scan, counted in tokens: they begin where tokens do."""
        sides = tuple(-(-side // self.network.config.patch_size) for side in latents.shape[1:])
        return Windows.over(sides, self.network.config.token_grid)

    def _cut(self, latents: Float[Tensor, "c d h w"], windows: Windows, some: range) -> Tensor:
        """The latents of some windows, on the model's device."""
        edge = self.network.config.patch_size
        padded = _padded(latents, edge)
        cut = [
            padded[:, *(slice(a * edge, (a + n) * edge) for a, n in zip(start, windows.edges, strict=True))]
            for start in windows.starts[some.start : some.stop]
        ]
        return torch.stack(cut).to(self._device)

    def _token_grid(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b k p q r"]:
        tokens = self.network.content_tokens(latents.to(self._device)).float().cpu()
        return tokens.mT.reshape(*tokens.mT.shape[:2], *self.network.config.token_grid)


def load(
    source: str | Path,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    device: torch.device | str = "cpu",
    trusted: str | Path | None = None,
) -> ScanModel:
    """The model of a run or an export: its folder, or its `model.safetensors`.

    `tokenizer`: the one that the run used, or its file; none: that beside the weights, else the package's.
    `trusted`: certificate of the consortium's authority (ca.pem); weights that it did not sign are refused
    then. Raises `ValueError` in one line when a file is absent, damaged, changed since it was signed, or
    another tokenizer's.
    """
    source = Path(source)
    path = source / MODEL if source.is_dir() else source
    signature = check_signature(path, None if trusted is None else Path(trusted))
    pretrained = load_pretrained(path)
    if "volumes" not in pretrained.provenance:
        raise ValueError(
            f"Expected the header of {path.name} to say how scans become volumes; it does not. Make the run "
            "again, or export it, with this version."
        )
    volumes = build(
        VolumePlan, read_json(pretrained.provenance["volumes"], f"volumes in {path.name}"), "volumes"
    )
    generated = path.with_name(DIFFUSION_MODEL)
    generative = load_generative_model(generated) if generated.is_file() else None
    model = ScanModel(pretrained, volumes, tokenizer_of(path, pretrained, tokenizer), generative, device)
    model.signature = signature
    return model


def tokenizer_of(
    path: Path, pretrained: Pretrained, given: str | Path | Tokenizer | None = None
) -> Tokenizer:
    """The tokenizer of the weights at `path`; raises `ValueError` when what is there is another."""
    if isinstance(given, Tokenizer):
        found = given
    else:
        beside = path.with_name(TOKENIZER)
        own = beside if beside.is_file() else shipped_tokenizer(pretrained.network.config.latent_channels)
        file = Path(given) if given is not None else own
        if not file.is_file():
            raise ValueError(
                f"Expected the file of tokenizer {pretrained.tokenizer_sha256[:8]}…, whose latents the "
                f"weights read; there is none beside {path.name}. Give it (tokenizer=; --tokenizer FILE)."
            )
        found = load_tokenizer_file(file)
    if found.sha256 != pretrained.tokenizer_sha256:
        raise ValueError(
            f"Expected tokenizer {pretrained.tokenizer_sha256[:8]}…, whose latents the weights read; got "
            f"{found.sha256[:8]}… ({found.name}). Give the run's own (tokenizer=; --tokenizer FILE)."
        )
    return found


def _padded(x: Float[Tensor, "c d h w"], edge: int) -> Float[Tensor, "c d h w"]:
    """To whole tokens, by repeating the last cells."""
    ends = [pad for side in reversed(x.shape[1:]) for pad in (0, -side % edge)]
    return F.pad(x[None], ends, mode="replicate")[0] if any(ends) else x


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.float().cpu().contiguous().numpy()
    return array
