"""Which contrast a file is, by its name: one volume of a study, never taken for another.

A study is a set of volumes of one patient at one visit, each with its modality: nnU-Net's channels, BraTS'
`t1 t1ce t2 flair`, BIDS suffixes with what tells a part, an echo or an inversion apart. A site's names become
shared names by its own map (`modality_names`). Where no name in a folder says a contrast, every scan is what
the map's `*` says, or what the plan asks for; as soon as two contrasts are told apart, each is only what its
name says.

Does not do: read headers (`scans/dicom.py` brings a series' own names) or voxels.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from client.scans.names import channels_of, contrast_in, contrast_of, kind_of

UNKNOWN_MODALITY = "*"
"""The local name, in a site's map, of scans whose modality nothing says."""
ANY, MR = "any", "mr"
"""What a plan may ask for instead of one contrast."""
_NOT_MR = frozenset(("", *"ct cta pet fdg spect pib av45".split()))
_PARTS = frozenset({"phase", "real", "imag", "imaginary"})
_WHOLE = frozenset({"part-mag"})
"""Entities of BIDS that say what a suffix alone means."""
_QUALIFIERS = ("part", "echo", "inv", "ce", "mt", "flip")


@dataclass(frozen=True)
class ModalityNames:
    """How one site's names of modalities become the plan's."""

    shared: Mapping[str, str] = field(default_factory=dict)
    """Local name (BIDS suffix, channel, contrast in the file's name, manifest's modality, DICOM series
    description, protocol or modality, or `*`) to shared name."""
    wanted: tuple[str, ...] = ()
    """Shared names that the plan asks for; the first is that of scans whose modality nothing says."""

    def of(self, local: str) -> str:
        """The shared name of a scan called `local`; of one that nothing calls, what `*` or the plan says."""
        if not local:
            return self.shared.get(UNKNOWN_MODALITY, self.wanted[0] if self.wanted else "")
        folded = {name.casefold(): shared for name, shared in self.shared.items()}
        if (mapped := self.shared.get(local, folded.get(local.casefold()))) is not None:
            return mapped
        return next((name for name in self.wanted if _same(name, local)), local)

    def takes(self, shared: str) -> bool:
        """Whether the plan asks for scans of this shared name. `any` asks for every contrast, `mr` for every
        contrast of MR; neither for phase, real or imaginary parts, which must be named."""
        if shared in self.wanted:
            return True
        if not shared or shared.startswith("part-") or contrast_of(shared) in _PARTS:
            return False
        return ANY in self.wanted or (MR in self.wanted and contrast_of(shared) not in _NOT_MR)

    def of_series(self, names: Sequence[str]) -> str:
        """The shared name of a series with these names: that of the first the map knows, else the last."""
        known = [name for name in names if name in self.shared]
        return self.of((known or list(names[-1:]) or [""])[0])


def _same(one: str, other: str) -> bool:
    """Whether two names say one contrast: `T1w` and `t1`."""
    return one.casefold() == other.casefold() or (
        bool(contrast_of(one)) and contrast_of(one) == contrast_of(other)
    )


def contrasts_of_files(
    paths: Sequence[PurePath], patients: Sequence[str], names: ModalityNames, root: Path
) -> list[str]:
    """Local name of each image in folders of any make (paths below `root`, without extension); "" where
    nothing tells images apart.

    A single contrast in all names says nothing, unless the plan asks for a contrast that it is not.
    """
    channels = channels_of({path.name for path in paths})
    if channels:
        titles = _channel_titles(root)
        locals_ = [titles.get(channels[path.name][1], channels[path.name][1]) if path.name in channels else ""
                   for path in paths]  # fmt: skip
    else:
        locals_ = [_contrast(path, patient) for path, patient in zip(paths, patients, strict=True)]
    named = {contrast_of(name) or name for name in locals_}
    if len(named) == 1 and not any(name in names.shared for name in locals_):
        (only,) = named
        other = any(map(contrast_of, names.wanted)) and contrast_of(only)
        if not other or any(_same(wanted, only) for wanted in names.wanted):
            return [""] * len(paths)
    return locals_


def _contrast(path: PurePath, patient: str) -> str:
    """The contrast that a file's name says, else the nearest folder's; the patient's own name says none."""
    for part in reversed(path.parts):
        if kind_of(part) == "contrast" or part is path.name or not patient or patient not in part:
            if contrast := contrast_in(part.replace(patient, "") if patient else part):
                return contrast
        elif contrast := contrast_in(part.replace(patient, "")):
            return contrast
    return ""


def _channel_titles(root: Path) -> dict[str, str]:
    """What nnU-Net's dataset.json calls the channels; empty where it does not say."""
    try:
        described = json.loads((root / "dataset.json").read_text(encoding="utf-8-sig"))
        named = described.get("channel_names") or described.get("modality") or {}
        titles = {f"{int(number):04d}": str(title) for number, title in named.items()}
    except (OSError, ValueError, AttributeError):
        return {}
    return titles if len(set(titles.values())) == len(titles) else {}


def contrasts_of_bids(stems: Sequence[str]) -> list[str]:
    """Local name of each BIDS image: its suffix, with the entities that make it another volume.

    `part-phase_T1w` is no T1w; `part-mag_T1w` is. `echo-2_T2starw` is an echo of its own where there are
    several, `inv-1_MP2RAGE` likewise; a contrast agent (`ce-…`) always counts.
    """
    entities = [_qualifiers(stem) for stem in stems]
    suffixes = [stem.rpartition("_")[2] for stem in stems]
    values: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for suffix, own in zip(suffixes, entities, strict=True):
        for key in _QUALIFIERS:
            values[suffix, key][own.get(key, "")] += 1
    found = []
    for suffix, own in zip(suffixes, entities, strict=True):
        telling = [
            f"{key}-{value}"
            for key, value in own.items()
            if f"{key}-{value}" not in _WHOLE and (key in ("ce", "part") or len(values[suffix, key]) > 1)
        ]
        found.append("_".join([*telling, suffix]))
    return found


def _qualifiers(stem: str) -> dict[str, str]:
    return {key: value for key, value in re.findall(r"_([a-z]+)-([A-Za-z0-9]+)", stem) if key in _QUALIFIERS}
