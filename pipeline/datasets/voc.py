"""Read PASCAL VOC 2012, segmentation: ``VOCdevkit/VOC2012`` as the development kit unpacks.

    VOC2012/ImageSets/Segmentation/{train,val,trainval}.txt    one name a line
    VOC2012/JPEGImages/NAME.jpg
    VOC2012/SegmentationClass/NAME.png                         palette: index 0 background, 1 to 20, 255 void
    VOC2012/classes.txt                                        not in the kit: line i names class i

Without classes.txt, which `legrad export --format voc` writes, class ids are those of the development kit, in
alphabetical order.

Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/index.html, the sections on the segmentation
    image sets and on segmentation ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.classes import read_class_list
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
)
from pipeline.errors import SampleFailure, UserError

# spelled as prompts: the development kit writes diningtable, pottedplant and tvmonitor
CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
VOID = 255


def open_voc(root: str | Path, split: str = "val") -> TruthDataset:
    """Open a segmentation split of VOC 2012.

    Args:
        root: ``VOC2012``, or a folder that holds it or ``VOCdevkit/VOC2012``.
        split: train, val, trainval, or another list in ``ImageSets/Segmentation``.

    Raises:
        UserError: a list or folder is missing, or the names of classes are invalid.
    """
    places = [Path(root, below) for below in ("", "VOC2012", "VOCdevkit/VOC2012")]
    folder = next((place for place in places if (place / "ImageSets").is_dir()), places[0])
    require_folder(folder / "JPEGImages", "images")
    require_folder(folder / "SegmentationClass", "label maps")
    try:
        names = read_list(folder / "ImageSets" / "Segmentation" / f"{plain_name(split)}.txt")
    except SampleFailure as failure:
        raise UserError(f"split: {failure.message}") from None
    classes = _class_names(folder / "classes.txt")
    return TruthDataset(f"voc2012-{split}", classes, names, lambda name: _read(folder, name, classes))


def _class_names(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return CLASS_NAMES
    return tuple(entry.name for entry in read_class_list(str(path)))


def _read(folder: Path, name: str, class_names: Sequence[str]) -> TruthSample:
    stored = read_image(folder / "JPEGImages", f"{name}.jpg")
    data = read_file(folder / "SegmentationClass", f"{name}.png", missing="missing_label_map")
    indices = read_png(data, stored, ("P", "L"))
    return labelled_sample(stored, as_label_map(indices, indices == VOID), class_names)
