"""Which file is the label of which image, by names and folders alone.

A label carries its image's name, extended (`t2_seg-manual` labels `t2`) or in a folder of its own (`labels/`,
`labelsTr/`, beside `images/`). One label per image; every other one is accounted for.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from client.scans.nifti import nifti_stem
from client.scans.scans import Exclusion, Reason

LABEL_FOLDERS = frozenset(
    {"label", "labels", "labelstr", "labelsts", "mask", "masks", "seg", "segmentations"}
)
IMAGE_FOLDERS = frozenset({"image", "images", "imagestr", "imagests", "scans"})
LABEL_NAME = re.compile(
    r".+?[_.-](?:[a-z]*seg|segmentation|labels?|mask|lesion|roi)(?:[-_.].*)?", re.IGNORECASE
)
"""What a label that lies beside its image is called: the image's name, then this."""
NNUNET_CHANNEL = "_0000"
"""nnU-Net's images carry it; their labels do not."""

Offers = dict[Path, list[tuple[str, Path]]]
"""Per image, its labels, each with what its name adds to the image's ("" when the names are equal)."""


def is_label_name(path: Path) -> bool:
    """Whether a NIfTI file's name says that it is a label."""
    return LABEL_NAME.fullmatch(nifti_stem(path)) is not None


def label_folder(path: Path, root: Path) -> tuple[Path, Path] | None:
    """For root/a/labels/b/c.nii.gz: (root/a, b/c.nii.gz); None when no folder is named for labels."""
    parts = path.relative_to(root).parts
    for depth, part in enumerate(parts[:-1]):
        if part.lower() in LABEL_FOLDERS:
            return root.joinpath(*parts[:depth]), Path(*parts[depth + 1 :])
    return None


def find_images(labels: Iterable[Path], images: Iterable[Path], root: Path) -> Offers:
    """For each label the image it belongs to, if there is one.

    root/labels/b/c.nii.gz belongs to c in root/b or root/images/b; any other label to an image in its own
    folder. The image is the one of the same name, else the one with the longest name that the label's name
    extends.
    """
    by_place: dict[tuple[Path, str], Path] = {}
    folders: dict[Path, set[Path]] = defaultdict(set)  # image folders by the folder they lie in
    for image in images:
        by_place[image.parent, nifti_stem(image)] = image
        by_place.setdefault((image.parent, nifti_stem(image).removesuffix(NNUNET_CHANNEL)), image)
        for folder in image.parents:
            if folder.name.lower() in IMAGE_FOLDERS:
                folders[folder.parent].add(folder)
    offers: Offers = defaultdict(list)
    for label in labels:
        place = label_folder(label, root)
        if place is None:
            wanted = [label.parent]
        else:
            wanted = [folder / place[1].parent for folder in (place[0], *sorted(folders[place[0]]))]
        for folder in wanted:
            if found := _owner(label, folder, by_place):
                offers[found[0]].append((found[1], label))
                break
    return offers


def _owner(label: Path, folder: Path, by_place: Mapping[tuple[Path, str], Path]) -> tuple[Path, str] | None:
    stem = nifti_stem(label)
    for cut in range(len(stem), 0, -1):  # the longest image name first
        image = by_place.get((folder, stem[:cut]))
        if image is not None and image != label and (cut == len(stem) or stem[cut] in "_.-"):
            return image, stem[cut + 1 :]
    return None


def choose_labels(
    labels: Iterable[Path], offers: Offers, label_pattern: str
) -> tuple[dict[Path, Path], list[Exclusion]]:
    """One label per image, and each other label's exclusion.

    Of the labels of an image, the first in alphabetical order whose name is the image's or adds what
    `label_pattern` matches; the others are `label_not_chosen`; those of no image `label_without_image`.
    """
    chosen: dict[Path, Path] = {}
    exclusions: list[Exclusion] = []
    owned: set[Path] = set()
    for image, offered in offers.items():
        for added, label in sorted(offered):
            owned.add(label)
            if image not in chosen and (not added or re.fullmatch(label_pattern, added)):
                chosen[image] = label
            else:
                exclusions.append(Exclusion(label, Reason.LABEL_NOT_CHOSEN))
    exclusions += [Exclusion(label, Reason.LABEL_WITHOUT_IMAGE) for label in labels if label not in owned]
    return chosen, exclusions
