"""Read the validation images of ImageNet-1k in class folders, as torchvision's ImageFolder takes them.

    val/n01440764/ILSVRC2012_val_00000293.JPEG

Class id i is the i-th of the 1,000 sorted WordNet ids. The images of ImageNet-S have the same folders, for
some of the classes and images. A sample has one class, and no label map.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.datasets.imagenet_s import imagenet_class_names, imagenet_wordnet_ids
from pipeline.datasets.truth_dataset import (
    SkippedRecords,
    TruthDataset,
    TruthSample,
    class_fields,
    read_file,
    require_folder,
)
from pipeline.errors import UserError


def open_imagenet_val(root: str | Path) -> TruthDataset:
    """Open the images of class folders.

    Args:
        root: folder of the class folders, some or all of them.

    Raises:
        UserError: there is no such folder, or no class folder in it.
    """
    folder, wordnet_ids = require_folder(Path(root), "class folders"), imagenet_wordnet_ids()
    class_names = imagenet_class_names(wordnet_ids)
    class_of = {wordnet_id: class_id for class_id, wordnet_id in enumerate(wordnet_ids, 1)}
    skipped, names = SkippedRecords(), []
    for path in sorted(folder.iterdir()):
        if path.name in class_of and path.is_dir():
            names += [f"{path.name}/{image.name}" for image in sorted(path.iterdir()) if image.is_file()]
        elif not path.name.startswith("."):
            skipped.add("not_a_class_folder", path.name)
    if not names:
        raise UserError(
            f"{folder}: expected class folders with images, named by WordNet ids such as n01440764; found "
            "none"
        )

    def read(name: str) -> TruthSample:
        wordnet_id, _, file_name = name.partition("/")
        data = read_file(folder / wordnet_id, file_name, missing="missing_image")
        return TruthSample(data, class_fields([class_of[wordnet_id]], class_names), None)

    return TruthDataset("imagenet-val", class_names, names, read, skipped)
