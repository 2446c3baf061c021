"""Read ImageNet-S: ``ImageNetS50``, ``ImageNetS300`` or ``ImageNetS919``, made by its authors' scripts.

    ImageNetS919/validation/n01440764/ILSVRC2012_val_00000293.JPEG
    ImageNetS919/validation-segmentation/n01440764/ILSVRC2012_val_00000293.png
    (train-semi and train-semi-segmentation: the same layout)

A label map is RGB: class id = R + 256 G; 0 is any other category, 1000 is ignored. Class id i is the i-th of
the sorted WordNet ids of the variant, which are the names of its class folders.

Source: https://github.com/LUSSeg/ImageNet-S, README, "Structure" and "Q&A".
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from pipeline.datasets.truth_dataset import (
    TruthDataset,
    TruthSample,
    as_label_map,
    labelled_sample,
    plain_name,
    read_file,
    read_image,
    read_list,
    read_png,
    require_folder,
    unique_names,
)
from pipeline.errors import SampleFailure, UserError

IGNORED_ID = 1000
VARIANTS = (50, 300, 919)


def open_imagenet_s(
    root: str | Path,
    split: str = "validation",
    variant: int = 919,
    categories_file: str | Path | None = None,
) -> TruthDataset:
    """Open a split of ImageNet-S.

    Args:
        root: ``ImageNetS<variant>``, or the folder that holds it.
        split: validation or train-semi.
        variant: number of classes: 50, 300 or 919.
        categories_file: the authors' ``ImageNetS_categories_im<variant>.txt``; needed if class folders are
            missing, because their order determines the ids.

    Raises:
        UserError: a folder is missing, or the number of classes is not that of the variant.
    """
    folder = Path(root)
    if (folder / f"ImageNetS{variant}").is_dir():
        folder /= f"ImageNetS{variant}"
    try:
        images = require_folder(folder / plain_name(split), "images")
    except SampleFailure as failure:
        raise UserError(f"split: {failure.message}") from None
    label_maps = require_folder(folder / f"{split}-segmentation", "label maps")
    wordnet_ids = _wordnet_ids(images, label_maps, variant, categories_file)
    class_names = imagenet_class_names(wordnet_ids)
    files = _files(images, wordnet_ids)
    names = sorted({*files, *_files(label_maps, wordnet_ids)})

    def read(name: str) -> TruthSample:
        several = files.get(name, [f"{name}.JPEG"])
        if len(several) > 1:
            message = f"several images have this name: {', '.join(several[:3])}"
            raise SampleFailure("read", "ambiguous_image", message)
        return _read(images, label_maps, name, several[0], class_names)

    return TruthDataset(f"imagenet-s{variant}-{split}", class_names, names, read)


def _wordnet_ids(
    images: Path, label_maps: Path, variant: int, categories_file: str | Path | None
) -> tuple[str, ...]:
    if categories_file is not None:
        # one version of the authors' list is unsorted
        found, where = {line.split()[0] for line in read_list(Path(categories_file))}, str(categories_file)
    else:
        folders = [*images.iterdir(), *label_maps.iterdir()]
        found, where = {path.name for path in folders if path.is_dir()}, f"{images} and {label_maps}"
    if len(found) != variant:
        raise UserError(
            f"{where}: expected {variant} classes, found {len(found)}; class ids are ranks among all of "
            "them. Choose another --variant, or give the authors' ImageNetS_categories file by --categories"
        )
    return tuple(sorted(found))


def imagenet_wordnet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of the 1,000 classes of ImageNet-1k, in their order, which is sorted."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())  # type: ignore[no-untyped-call]


def imagenet_class_names(wordnet_ids: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that open_clip's zero-shot classifier uses; raise a UserError for other classes."""
    from open_clip import IMAGENET_CLASSNAMES

    rank = {wordnet_id: index for index, wordnet_id in enumerate(imagenet_wordnet_ids())}
    unknown = [wordnet_id for wordnet_id in wordnet_ids if wordnet_id not in rank]
    if unknown:
        raise UserError(f"expected classes of ImageNet-1k, got {', '.join(unknown[:5])}")
    names = [str(IMAGENET_CLASSNAMES[rank[wordnet_id]]) for wordnet_id in wordnet_ids]
    return unique_names(names, wordnet_ids)


def _files(folder: Path, wordnet_ids: tuple[str, ...]) -> dict[str, list[str]]:
    """Return files by name, where a name is the class folder and the stem of the file."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in (path for wordnet_id in wordnet_ids for path in sorted((folder / wordnet_id).glob("*.*"))):
        found[f"{path.parent.name}/{path.stem}"].append(f"{path.parent.name}/{path.name}")
    return found


def _read(
    images: Path, label_maps: Path, name: str, image_file: str, class_names: tuple[str, ...]
) -> TruthSample:
    wordnet_id, _, stem = name.partition("/")
    stored = read_image(images / wordnet_id, image_file.partition("/")[2])
    data = read_file(label_maps / wordnet_id, f"{stem}.png", missing="missing_label_map")
    red_green = read_png(data, stored, ("RGB",))[:, :, :2].astype(np.uint16)
    class_ids = red_green[:, :, 0] + 256 * red_green[:, :, 1]
    return labelled_sample(stored, as_label_map(class_ids, class_ids == IGNORED_ID), class_names)
