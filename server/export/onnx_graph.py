"""A run as one ONNX graph: a prepared volume in, its content code out; tokenizer and encoder in one.

What prepares a volume (orientation, spacing, window, crop) is in the metadata, not in the graph; of a model
of whole scans the graph is one window. Needs the packages of the extra [export].

Axes: b = 1 volume, D H W = voxels of `volumes.shape`, n = numbers in the code.
"""

import json
import logging
import warnings
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meduet_models.meduet import layer_normed
from server.export.card import model_card
from server.export.facts import Release
from storage.files import write_whole

GRAPH = "model.onnx"
_USE = """\
```python
import onnxruntime

graph = onnxruntime.InferenceSession("model.onnx")
code = graph.run(None, {{"volume": volume}})[0]   # volume: float32, 1 x 1 x D x H x W, in [0, 1]; {size}
```
`config.json` (and the graph's metadata) say how a scan becomes `volume`.
"""


class VolumeToCode(nn.Module):
    """Tokenizer, encoder and code, without a choice that depends on data."""

    def __init__(self, release: Release) -> None:
        super().__init__()
        self.tokenizer, self.network = release.tokenizer, release.pretrained.network
        self.code = self.network.code

    def forward(self, volume: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, "b n"]:
        """The content code of prepared volumes."""
        content = self.network.content_head(
            self.network.encoder(self.network.embed_latents(self.tokenizer.encode(volume)))
        )
        return self.code.read(layer_normed(content))


def write_onnx(release: Release, out: Path) -> None:
    """Write the graph, its configuration and card into the folder `out`.

    Raises `ValueError` for a run without a content code, and `ModuleNotFoundError` without its packages.
    """
    import onnx
    import onnxscript  # noqa: F401  PyTorch's exporter is written in it

    module, volume = VolumeToCode(release).eval(), torch.rand(1, 1, *release.volumes.shape)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            module, (volume,), input_names=["volume"], output_names=["code"], dynamo=True, verbose=False
        )
    assert program is not None, "dynamo's exporter gives a program"
    graph = program.model_proto
    config = release.config()
    props = {name: value if isinstance(value, str) else json.dumps(value) for name, value in config.items()}
    onnx.helper.set_model_props(graph, props)
    write_whole(out / GRAPH, graph.SerializeToString())
    write_whole(out / "config.json", json.dumps(config, indent=1, sort_keys=True) + "\n")
    write_whole(out / "README.md", model_card(release, _USE))
