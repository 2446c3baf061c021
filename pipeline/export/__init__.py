"""Convert the masks of a job: COCO JSON, PASCAL VOC, mmsegmentation, YOLO, WebDataset.

write (which shards, resuming, counts) -> export_samples (image and rows of each)
    -> coco | voc | mmseg | yolo | webdataset
push: a finished export to the Hugging Face Hub, with a dataset card
"""

from typing import Literal

Format = Literal["coco", "voc", "mmseg", "yolo-seg", "webdataset"]
# formats whose label maps have one byte a pixel, and so at most 254 classes
LABEL_MAP_FORMATS: tuple[Format, ...] = ("voc", "mmseg", "webdataset")
# formats that have parts of masks: annotations or objects
PART_FORMATS: tuple[Format, ...] = ("coco", "voc", "yolo-seg")
