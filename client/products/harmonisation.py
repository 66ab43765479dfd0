"""Harmonising scans at a site: file in, the same patient as another site would have scanned her out.

A scan is read and prepared as for training, encoded, moved to the asked style, decoded, and laid back on its
own grid: the written NIfTI has the scan's shape and affine and overlays it in any viewer. Intensities return
to the scan's own range (its percentiles, or the CT window in HU, beyond which nothing is known). Outside the
prepared crop the model saw nothing, and the volume holds the lower end of that range: never the original, for
a picture half acquired and half made would be read as one. A model of whole scans (`volumes.extent: scan`)
sees all of the foreground, by windows that overlap and are blended.

A harmonised scan is still the patient's: it stays where the scan may be. It is not an acquired image, and its
header and the JSON beside it say so. What this file does not do: ask a server, choose a style
(`meduet_models/diffusion/harmonisation.py`), make the volume (`meduet_models/diffusion/harmoniser.py`), or
write files (`volume_files.py`).
"""

import dataclasses

import torch

from client.latents.whole_scan import central_start
from client.products.volume_files import VolumeFile
from meduet_models.diffusion.harmoniser import Harmonised
from meduet_models.encoded_scan import EncodedScan
from meduet_models.scan_latents import encoded
from meduet_models.tokenizer.tokenizer import Tokenizer
from scans.scans import Scan
from scans.volume_plan import VolumePlan
from scans.volumes import ras_spacing
from scans.whole_volumes import WholeVolume


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


def volume_file(made: Harmonised) -> VolumeFile:
    """A harmonised scan as it is written."""
    description = f"FedMeDUET: made, not acquired; style of {made.facts['style']}"
    return VolumeFile(made.array, made.affine, made.facts, description)
