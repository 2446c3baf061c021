"""Masks as other tools read them: COCO JSON, VOC and mmsegmentation trees, WebDataset.

write (which shards, resuming, counts) -> export_samples (image and rows of each) -> coco | voc | webdataset
"""

from typing import Literal

Format = Literal["coco", "voc", "webdataset"]
# formats whose label maps have one byte a pixel, and so at most 254 classes
LABEL_MAP_FORMATS: tuple[Format, ...] = ("voc", "webdataset")
