"""Harmonising scans at a site: file in, the same patient as another site would have scanned her out.

A scan is read and prepared as for training, encoded, moved to the asked style, decoded, and laid back on its
own grid: the written NIfTI has the scan's shape and affine and overlays it in any viewer. Intensities return
to the scan's own range (its percentiles, or the CT window in HU, beyond which nothing is known). Outside the
prepared crop the model saw nothing, and the volume holds the lower end of that range: never the original, for
a picture half acquired and half made would be read as one. A model of whole scans (`volumes.extent: scan`)
sees all of the foreground, by windows that overlap and are blended.

A harmonised scan is still the patient's: it stays where the scan may be. It is not an acquired image, and its
header and the JSON beside it say so. What this file does not do: ask a server, or choose a style
(`meduet_models/diffusion/harmonisation.py`), or make the volume (`meduet_models/diffusion/harmoniser.py`).

Axes: x y z = voxels as the scan stores them; d h w = the prepared volume.
"""

import dataclasses
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import torch

from client.latents.whole_scan import central_start
from meduet_models.diffusion.harmoniser import Harmonised, Harmoniser, OnStep
from meduet_models.encoded_scan import EncodedScan
from meduet_models.scan_latents import encoded
from meduet_models.tokenizer.tokenizer import Tokenizer
from scans.nifti import is_nifti_name, nifti_stem
from scans.scans import Scan, UnusableScan
from scans.volume_plan import VolumePlan
from scans.volumes import ras_spacing, read_scan
from scans.whole_volumes import WholeVolume
from storage.files import write_whole

_DESCRIPTION_BYTES = 79


def encode_scan(
    scan: Scan, volumes: VolumePlan, tokenizer: Tokenizer, device: torch.device | str = "cpu"
) -> EncodedScan:
    """A scan as the centre may be given it, by somebody who has the right to: patient data. `device`: where
    the tokenizer is."""
    prepared, latents = encoded(scan, volumes, tokenizer, device)
    start = (0, 0, 0)
    if isinstance(prepared, WholeVolume):
        d, h, w = (side // tokenizer.stride for side in volumes.shape)
        start = central_start(prepared.foreground, (d, h, w))
    x, y, z = ras_spacing(prepared.geometry).tolist()
    return EncodedScan(
        latents=latents,
        tokenizer_sha256=tokenizer.sha256,
        volumes=dataclasses.asdict(volumes),
        geometry=prepared.geometry.to_dict(),
        spacing_mm=(x, y, z),
        start=start,
    )


def harmonise_files(
    scans: Sequence[Path],
    targets: Sequence[Path],
    harmoniser: Harmoniser,
    on_scan: Callable[[int, int], None] = lambda done, total: None,
    on_step: OnStep = lambda done, total: None,
) -> list[tuple[Path, str]]:
    """Harmonise each scan into its target, with a JSON beside it; returns what could not be used, and why.

    A scan that cannot be used stops no other. Raises `OSError` when a target cannot be written.
    """
    unusable: list[tuple[Path, str]] = []
    for done, (path, target) in enumerate(zip(scans, targets, strict=True), start=1):
        try:
            scan = read_scan(path, harmoniser.volumes.four_d)
            write_harmonised(target, harmoniser(scan, on_step))
        except UnusableScan as error:
            unusable.append((path, str(error)))
        on_scan(done, len(scans))
    return unusable


def write_harmonised(path: Path, harmonised: Harmonised) -> None:
    """Write a NIfTI and the JSON of the same name, each whole or not at all."""
    image = nib.Nifti1Image(harmonised.array, harmonised.affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"FedMeDUET: made, not acquired; style of {harmonised.facts['style']}".encode()[
        :_DESCRIPTION_BYTES
    ]
    content: bytes = image.to_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content, mtime=0)  # the same volume is the same file
    write_whole(path, content)
    facts = json.dumps(dict(harmonised.facts), indent=1, sort_keys=True) + "\n"
    write_whole(path.with_name(f"{nifti_stem(path)}.json"), facts.encode())


def target_paths(scans: Sequence[Path], out: Path, style: str) -> list[Path]:
    """Where each scan's result goes: `out` itself if it names a NIfTI file, else a file in the folder `out`.

    Raises `ValueError` for one file and several scans, for a scan that is not there, and when a result would
    replace a scan or another result.
    """
    if missing := [path for path in scans if not path.exists()]:
        raise ValueError(f"Expected a scan at {missing[0]}; nothing is there.")
    if is_nifti_name(out):
        if len(scans) > 1:
            raise ValueError(f"Expected -o to be a folder for {len(scans)} scans; got the file {out}.")
        targets = [out]
    else:
        targets = [out / f"{_stem(path)}_as_{style}.nii.gz" for path in scans]
    if twice := [target for target in targets if targets.count(target) > 1]:
        raise ValueError(
            f"Expected scans of different names; two would become {twice[0].name}. Use two folders."
        )
    inputs = {path.resolve() for path in scans}
    if replaced := [target for target in targets if target.resolve() in inputs]:
        raise ValueError(f"Expected -o to be no scan; {replaced[0]} is one, and would be replaced.")
    return targets


def _stem(path: Path) -> str:
    return nifti_stem(path) if is_nifti_name(path) else path.stem if path.is_file() else path.name
