"""Masks by several rules, written as COCO annotations and read back with pycocotools.

python legrad/examples/masks_and_coco.py [FOLDER]
"""

# %% The bundled model. A real one: MODEL = ("ViT-B-16", "laion2b_s34b_b88k"), a name and a tag of open_clip.
import json

import numpy as np
from pycocotools.coco import COCO

import legrad
from legrad.examples.demo_data import load, output_folder, scenes

MODEL = "demo"
OUT = output_folder("masks_and_coco")
paths, texts = zip(*scenes(OUT, 3), strict=True)
explanations = legrad.explain_images(load(MODEL), paths, texts)

# %% One mask for each text, at the size of its image
for rule in (legrad.MaskRule("otsu"), legrad.MaskRule("fixed", value=0.6)):
    areas = [masks.areas.tolist() for masks in explanations.masks(rule)]
    print(f"{rule.rule}: pixels of the masks of each image: {areas}")
cleaning = legrad.Cleaning(smooth=0.6, min_component=0.02, max_hole=0.02)
masks_of_images = explanations.masks("otsu", cleaning=cleaning)

# %% COCO: a category for each text; the masks are in COCO's own encoding already.
categories = sorted({text for image in explanations.images for text in image.texts})
annotations = [
    {
        "image_id": position + 1,
        "category_id": categories.index(text) + 1,
        "segmentation": masks.rles[number],
        "area": int(masks.areas[number]),
        "bbox": masks.bboxes_xywh[number].tolist(),
        "iscrowd": 0,
    }
    for position, (image, masks) in enumerate(zip(explanations.images, masks_of_images, strict=True))
    for number, text in enumerate(image.texts)
]
dataset = {
    "images": [
        {"id": position + 1, "file_name": path.name, "height": image.height, "width": image.width}
        for position, (path, image) in enumerate(zip(paths, explanations.images, strict=True))
    ],
    "categories": [{"id": number + 1, "name": text} for number, text in enumerate(categories)],
    "annotations": [{"id": number + 1, **each} for number, each in enumerate(annotations)],
}
(OUT / "annotations.json").write_text(json.dumps(dataset))

# %% Read back: pycocotools for files of your own. It writes out of bounds on damaged encodings, which
# `legrad.decode_rle` refuses.
coco = COCO(OUT / "annotations.json")
same = [
    np.array_equal(coco.annToMask(annotation), legrad.decode_rle(annotation["segmentation"]))
    for annotation in coco.loadAnns(coco.getAnnIds())
]
print(f"{sum(same)} of {len(same)} masks of {len(coco.imgs)} images are the same in pycocotools and legrad")
