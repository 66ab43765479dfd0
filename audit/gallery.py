"""Pictures of a report: middle slices of volumes, side by side, as a file in base64.

What this file does not do: judge pictures.

Axes: n = volumes, D H W = voxels.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.image import imsave
from torch import Tensor

from audit.findings import Picture

_GAP = 2


def picture(caption: str, columns: Sequence[Float[Tensor, "n 1 D H W"]]) -> Picture:
    """The middle slice of each volume in [0, 1]: a row for each, a column for each list."""
    strips = [np.concatenate([_slice(volume) for volume in column.detach()], axis=0) for column in columns]
    file = io.BytesIO()
    imsave(file, np.concatenate(strips, axis=1), cmap="gray", vmin=0.0, vmax=1.0, format="png")
    return Picture(caption=caption, png=base64.b64encode(file.getvalue()).decode())


def _slice(volume: Tensor) -> np.ndarray:
    """As a radiologist looks at it: front above, with a white edge."""
    middle = volume[0, :, :, volume.shape[-1] // 2].clamp(0, 1).numpy()
    return np.pad(np.rot90(middle), _GAP, constant_values=1.0)
