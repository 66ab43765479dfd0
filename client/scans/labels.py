"""Which file is the label of which image, by names and folders alone.

A label carries its image's name, extended (`t2_seg-manual` labels `t2`), or its case's (`case_seg` labels
`case_t1` and `case_t2`), beside it or in a folder of its own (`labels/`, `labelsTr/`, `DLMUSE_seg/`). One
label per image; every other one is accounted for. What calls itself a scan and is a label by its values is
found when it is read (`scans/scans.py`).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from client.scans.names import contrast_of
from scans.nifti import nifti_stem
from scans.scans import Exclusion, Reason

_WORDS = (
    r"[a-z0-9]*seg|segs|segmentations?|segmented|labels?|labelmaps?|lbl|masks?|[a-z]*mask|lesions?|roi|rois|gt"
    r"|groundtruth|ground-truth|annotations?|annot|contours?|parc|parcellations?|parcels|dlmuse|muse|dlicv|aseg"
    r"|aparc|wmparc|ribbon|synthseg|fastsurfer|tissues?|pveseg|manual"
)
_LABEL_FOLDER = re.compile(
    rf"(?:.*[_. -])?(?:{_WORDS.replace('[a-z0-9]*seg', '[a-z]{0,4}seg')}|labelst[rsv])(?:[_. -].*)?",
    re.IGNORECASE,
)
IMAGE_FOLDERS = frozenset({"image", "images", "imagestr", "imagests", "imagesval", "scans"})
LABEL_NAME = re.compile(rf".+?[_.-](?:{_WORDS})(?:[-_.+].*)?", re.IGNORECASE)
"""What a label that lies beside its image is called: the image's name, then this."""

_MADE_BEFORE = re.compile(r"[smrw]*[cp][1-6]|i?y_|w?j_|u_r?c[1-6]")
"""What SPM and CAT12 put before a scan's name: tissue maps (`c1`, `mwp2`), deformations (`y_`), Jacobians."""
_MADE_BEHIND = re.compile(
    r"(?:pve_?\d|posteriors?_?\d*|prob(?:s|ability|abilities|maps?)?_?\d*|\d?(?:inverse)?warp\d*"
    r"|(?:warp|def|deformation|disp|displacement|inv)?_?(?:field|coef|fieldcoef|warpcoef)|jac(?:obian)?"
    r"|(?:gm|wm|csf)_?(?:prob|pve|map)?|brain|bet|(?:skull_?)?strip(?:ped)?|n4(?:_?corr(?:ected)?)?"
    r"|bias_?corr(?:ected)?|restore|denoised?|reorient(?:ed)?|resampled?|(?:crop|tilt|eq)_\d)",
    re.IGNORECASE,
)
"""What FSL, ANTs, dcm2niix and others put behind it: `_pve_0`, `_1Warp`; the same scan once more: `_brain`,
`_n4`, `_Crop_1`."""

Offers = dict[Path, list[tuple[str, Path]]]
"""Per image, its labels, each with what its name adds to the image's ("" when the names are equal)."""


def is_label_name(path: Path) -> bool:
    """Whether a NIfTI file's name says that it is a label."""
    stem = nifti_stem(path)
    return LABEL_NAME.fullmatch(stem) is not None or re.fullmatch(_WORDS, stem, re.IGNORECASE) is not None


def made_from_others(scans: Sequence[Path]) -> list[Path]:
    """Those NIfTI files whose names say that software made them from another scan of the same folder (for
    CAT12, of the folder above `mri/`): maps of tissues and deformations, which look like scans, and the same
    scan stripped, corrected or cropped, which would count twice."""
    known = _Images(scans)

    def made(path: Path) -> bool:
        stem = nifti_stem(path)
        folders = [path.parent, *([path.parent.parent] if path.parent.name == "mri" else [])]
        ends = [stem[i:] for i in range(1, len(stem)) if _MADE_BEFORE.fullmatch(stem[:i])]
        if any((folder, end) in known.by_place for folder in folders for end in ends):
            return True
        images, added = known.of(path, path.parent)
        return bool(images) and _MADE_BEHIND.fullmatch(added) is not None

    return [path for path in scans if made(path)]


def label_folder(path: Path, root: Path) -> tuple[Path, Path] | None:
    """For root/a/labels/b/c.nii.gz: (root/a, b/c.nii.gz); None when no folder is named for labels."""
    parts = path.relative_to(root).parts
    for depth, part in enumerate(parts[:-1]):
        if _LABEL_FOLDER.fullmatch(part):
            return root.joinpath(*parts[:depth]), Path(*parts[depth + 1 :])
    return None


class _Images:
    """Images by the folder they lie in and the names that a label may carry for them."""

    def __init__(self, images: Iterable[Path]) -> None:
        self.by_place: dict[tuple[Path, str], list[Path]] = defaultdict(list)
        self.cases: dict[tuple[Path, str], list[Path]] = defaultdict(list)
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        self.folders: dict[Path, set[Path]] = defaultdict(set)
        """Folders named for images, by the folder they lie in."""
        for image in images:
            stem = nifti_stem(image)
            self.by_place[image.parent, stem].append(image)
            self.by_name[stem].append(image)
            if case := _case_of(stem):
                self.cases[image.parent, case].append(image)
            for folder in image.parents:
                if folder.name.lower() in IMAGE_FOLDERS:
                    self.folders[folder.parent].add(folder)

    def of(self, label: Path, folder: Path) -> tuple[list[Path], str]:
        """The images in `folder` that a label's name belongs to, and what it adds to theirs."""
        stem = nifti_stem(label)
        for cut in range(len(stem), 0, -1):  # the longest image name first
            if cut == len(stem) or stem[cut] in "_.-":
                place = (folder, stem[:cut])
                images = self.by_place.get(place) or self.cases.get(place) or []
                if images and label not in images:
                    return images, stem[cut + 1 :]
        return [], ""

    def anywhere(self, label: Path, below: Path) -> tuple[list[Path], str]:
        """The one image below a folder whose whole name a label's name is, or extends."""
        stem = nifti_stem(label)
        for cut in range(len(stem), 0, -1):
            if cut == len(stem) or stem[cut] in "_.-":
                images = [image for image in self.by_name.get(stem[:cut], []) if below in image.parents]
                if images:
                    return (images, stem[cut + 1 :]) if len(images) == 1 else ([], "")
        return [], ""


def _case_of(stem: str) -> str:
    """An image's name without nnU-Net's channel or the contrast at its end; "" when it has neither."""
    start, _, last = stem.rpartition(max("_.-", key=stem.rfind))
    return start if start and (re.fullmatch(r"00\d\d", last) or contrast_of(last)) else ""


def find_images(labels: Iterable[Path], images: Iterable[Path], root: Path) -> Offers:
    """For each label the image or images it belongs to, if there are.

    root/labels/b/c.nii.gz belongs to c in root/b or root/images/b, else to the only c below root; any other
    label to an image in its own folder. The image is the one of the same name, else the one with the longest
    name that the label's name extends, else the images of the case that it names.
    """
    known = _Images(images)
    offers: Offers = defaultdict(list)
    for label in labels:
        place = label_folder(label, root)
        if place is None:
            wanted = [label.parent]
        else:
            beside = (place[0], *sorted(known.folders[place[0]]))
            wanted = [folder / place[1].parent for folder in beside]
        found: list[Path] = []
        for folder in wanted:
            found, added = known.of(label, folder)
            if found:
                break
        if not found and place is not None:
            found, added = known.anywhere(label, place[0])
        for image in found:
            offers[image].append((added, label))
    return offers


def choose_labels(
    labels: Iterable[Path], offers: Mapping[Path, list[tuple[str, Path]]], label_pattern: str
) -> tuple[dict[Path, Path], list[Exclusion]]:
    """One label per image, and each other label's exclusion.

    Of the labels of an image, the first in alphabetical order whose name is the image's or adds what
    `label_pattern` matches; the others are `label_not_chosen`; those of no image `label_without_image`.
    """
    chosen: dict[Path, Path] = {}
    owned: set[Path] = set()
    for image, offered in offers.items():
        for added, label in sorted(offered):
            owned.add(label)
            if image not in chosen and (not added or re.fullmatch(label_pattern, added)):
                chosen[image] = label
    used = set(chosen.values())
    exclusions = [Exclusion(label, Reason.LABEL_NOT_CHOSEN) for label in sorted(owned - used)]
    exclusions += [Exclusion(label, Reason.LABEL_WITHOUT_IMAGE) for label in labels if label not in owned]
    return chosen, exclusions
