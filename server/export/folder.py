"""A run as model hubs have models: `config.json`, `model.safetensors`, tokenizer and card, in one folder.

`meduet_models.load(FOLDER)` and `meduet embed --model FOLDER` read it; nothing else is needed.
"""

import json
from pathlib import Path

from meduet_models.published.pretrained import MODEL
from meduet_models.published.scan_model import TOKENIZER
from meduet_models.tokenizer.tokenizer import save_tokenizer
from meduet_models.weights import save_weights
from server.export.card import model_card
from server.export.facts import Release
from storage.files import write_whole


def write_folder(release: Release, out: Path) -> None:
    """Write the folder `out`, which must be there."""
    write_weights(release, out)
    write_whole(out / "config.json", json.dumps(release.config(), indent=1, sort_keys=True) + "\n")
    write_whole(out / "README.md", model_card(release))


def write_weights(release: Release, out: Path) -> None:
    """Write the weights with their header, and the tokenizer beside them where it is ours to give."""
    save_weights(out / MODEL, release.tensors, release.header())
    if release.tokenizer.description["architecture"]["kind"] != "maisi":  # its licence is not ours
        save_tokenizer(out / TOKENIZER, release.tokenizer, {"plan_sha256": release.plan.sha256})
