"""The site's own word that its patients are told apart rightly, given once: `meduet-site check
--confirm-patients`.

Kept in the site's folder: the hash of the rule and of which scan is whose (`patients_confirmed`), and that
map itself, so that a change can be told from growth. Another rule, another data folder, a known scan with
another patient, or a new kind of doubt needs a new confirmation. New scans that the same rule gives a patient
do not, nor do scans that went. The file names patients and stays at the site.

Does not do: guess (`client/scans/patients.py`).
"""

import json
from pathlib import Path
from typing import Any

from client.scans.patients import PatientMap
from storage.files import write_whole

FILE = "patients.json"
CURE = "Look at it: meduet-site check; if it is right: meduet-site check --confirm-patients."


def confirm(state_dir: Path, data_root: Path, found: PatientMap) -> str:
    """Keep that `found` is right; returns its hash. Raises `ValueError` when no scan has a patient."""
    if not found.num_patients:
        raise ValueError(
            f"Expected scans whose patients can be told; {found.rule}. Set patient_pattern in site.yaml, or"
            " name patients in a manifest."
        )
    kept = {
        "patients_confirmed": found.sha256,
        "data_root": str(data_root.resolve()),
        "rule": found.rule,
        "doubts": len(found.doubts),
        "patients": dict(found.patients),
    }
    write_whole(state_dir / FILE, json.dumps(kept, indent=0).encode())
    return found.sha256


def unconfirmed(state_dir: Path, data_root: Path, found: PatientMap) -> str:
    """Why the map needs a person's word, in one sentence that names nobody; "" when it was given."""
    kept = _kept(state_dir / FILE)
    if kept is None:
        return "nobody here has confirmed who the patients are"
    if kept["patients_confirmed"] == found.sha256:
        return ""
    before: dict[str, str] = kept["patients"]
    known = [path for path in found.patients if path in before]
    if kept["data_root"] != str(data_root.resolve()):
        return "the patients were confirmed of another data folder"
    if kept["rule"] != found.rule:
        return "the rule that tells patients apart is another than was confirmed"
    if changed := sum(found.patients[path] != before[path] for path in known):
        return f"{changed} scans have another patient than was confirmed"
    if not known:
        return "none of the scans that were confirmed is there"
    if len(found.doubts) > kept["doubts"]:
        return (
            "new scans raise a doubt about who the patients are that was not there when they were confirmed"
        )
    return ""


def _kept(path: Path) -> dict[str, Any] | None:
    """What was confirmed; None when there is nothing, or it is damaged: then it is asked for again."""
    try:
        kept = json.loads(path.read_bytes())
        whole = all(
            isinstance(kept[name], kind)
            for name, kind in (
                ("patients_confirmed", str), ("data_root", str), ("rule", str), ("doubts", int),
                ("patients", dict),
            )
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if whole else None
