"""Scans that a command line names for synthesis: a file of an encoded scan, or an item of the latent bank.

`scan.safetensors`, or `bank:ITEM` with the bank's folder and key. What this file does not do: list a bank
(`meduet-server bank list`), or compute content.
"""

import json
from pathlib import Path

from federation.exchanges.latents import is_item
from meduet_models.encoded_scan import EncodedScan, load_encoded_scan
from server.latent_bank.bank import LatentBank

BANK = "bank:"


def named_scan(name: str, latent_bank: Path | None, key: Path | None) -> EncodedScan:
    """The encoded scan that `name` means.

    Raises `ValueError` when the file is none, the bank is not given, or has no such item to read.
    """
    if not name.startswith(BANK):
        return load_encoded_scan(Path(name))
    if latent_bank is None:
        raise ValueError(f"Expected --bank FOLDER with {name}; got none.")
    return scan_of_bank(latent_bank, key, name.removeprefix(BANK))


def scan_of_bank(folder: Path, key: Path | None, name: str) -> EncodedScan:
    """An item of a latent bank as an encoded scan; its geometry is not known.

    Raises `ValueError` when there is no such bank or item, or the item cannot be read.
    """
    latent_bank = LatentBank(folder, key, create=False)
    try:
        item = latent_bank.tables.item(name) if is_item(name) else None
        if item is None:
            raise ValueError(f"Expected an item of the bank {folder}; it has no {name[:40]!r}.")
        records, (sound,) = latent_bank.records([item.number])
        if not sound:
            raise ValueError(
                f"Expected item {name} of the bank {folder} to be readable; it is {item.state}, or damaged. "
                "Choose another (`meduet-server bank list`)."
            )
        examples = latent_bank.layout.unpack(records)
        terms = {
            term: json.loads(latent_bank.tables.meta(term) or "null") for term in ("tokenizer", "volumes")
        }
        x, y, z = examples.spacing[0].tolist()
        return EncodedScan(examples.latents[0], terms["tokenizer"], terms["volumes"], {}, (x, y, z))
    finally:
        latent_bank.close()
