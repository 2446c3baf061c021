"""Find the owners' data in a folder: what each table needs, where it was looked for, and where to get it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.datasets.imagenet_s import VARIANTS, open_imagenet_s
from pipeline.datasets.imagenet_val import open_imagenet_val
from pipeline.datasets.openimages import open_openimages
from pipeline.datasets.truth_dataset import TruthDataset

OPEN_IMAGES_FOLDERS = ("openimages", "open-images-v7", "OpenImages", "OpenImagesV7", ".")
OPEN_IMAGES_TABLE = "oidv7-val-annotations-point-labels.csv"
IMAGENET_FOLDERS = (
    "imagenet/val",
    "imagenet/validation",
    "ILSVRC2012/val",
    "ILSVRC/Data/CLS-LOC/val",
    "val",
)


@dataclass(frozen=True)
class Found:
    """The data of a table.

    Attributes:
        place: the folder that has it.
        open: returns the dataset; raises UserError where it is not laid out as its owners ship it.
        note: how it differs from what the paper takes, or None.
    """

    place: Path
    open: Callable[[], TruthDataset]
    note: str | None = None


@dataclass(frozen=True)
class Missing:
    """A table without data.

    Attributes:
        looked_for: the places that were looked at, below the folder.
        get: where to get the data.
    """

    looked_for: tuple[str, ...]
    get: str


def find_imagenet_s(root: Path) -> Found | Missing:
    """Find ImageNet-S, the variant with the most classes; the folder itself may be that of a variant."""
    for variant in sorted(VARIANTS, reverse=True):
        name = f"ImageNetS{variant}"
        places = [root / name, *([root] if root.resolve().name == name else [])]
        for place in filter(_has_images_and_label_maps, places):
            categories = _first_file(place, root, name=f"ImageNetS_categories_im{variant}.txt")
            return Found(
                place,
                partial(open_imagenet_s, place, variant=variant, categories_file=categories),
                "ImageNet-S takes the place of the paper's ImageNet-Segmentation (4,276 images). Variant: "
                f"{variant} classes.",
            )
    return Missing(
        tuple(f"ImageNetS{variant}/validation and validation-segmentation" for variant in VARIANTS[::-1]),
        "https://github.com/LUSSeg/ImageNet-S: its scripts make the folders from the validation images of "
        "ImageNet",
    )


def find_openimages(root: Path) -> Found | Missing:
    """Find the point labels of the validation images of Open Images V7."""
    for place in (root / name for name in OPEN_IMAGES_FOLDERS):
        if (place / OPEN_IMAGES_TABLE).is_file():
            return Found(place, partial(open_openimages, place))
    return Missing(
        tuple(f"{name}/{OPEN_IMAGES_TABLE}" for name in OPEN_IMAGES_FOLDERS),
        "https://storage.googleapis.com/openimages/web/download_v7.html: Point-labels (val), Class Names, "
        "and the images of the validation split in validation/",
    )


def find_imagenet_val(root: Path) -> Found | Missing:
    """Find the validation images of ImageNet, or in their place those of ImageNet-S."""
    for place in (root / name for name in IMAGENET_FOLDERS):
        if place.is_dir():
            return Found(place, partial(open_imagenet_val, place))
    instead = find_imagenet_s(root)
    if isinstance(instead, Found):
        images = instead.place / "validation"
        note = "The images of ImageNet-S take the place of all 50,000 validation images of ImageNet."
        return Found(images, partial(open_imagenet_val, images), note)
    return Missing(
        (*(f"{name}/n01440764/*.JPEG" for name in IMAGENET_FOLDERS), *instead.looked_for),
        "https://image-net.org: ILSVRC2012, validation images, sorted into class folders",
    )


FINDERS: dict[str, Callable[[Path], Found | Missing]] = {
    "imagenet-s": find_imagenet_s,
    "openimages-v7": find_openimages,
    "perturbation": find_imagenet_val,
}


def _has_images_and_label_maps(place: Path) -> bool:
    return (place / "validation").is_dir() and (place / "validation-segmentation").is_dir()


def _first_file(*folders: Path, name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
