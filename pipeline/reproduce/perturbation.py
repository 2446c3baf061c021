"""The table of perturbation: the accuracy of the model as pixels are blackened in the order of a map.

Maps are of the class that is right (target) and of the class that the model names (predicted). An image is
right where the class that is right scores highest among the 1,000 classes of ImageNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

import legrad
from legrad.quality.perturbation import SHARES, area_under_curve
from pipeline.datasets.imagenet_s import imagenet_class_names, imagenet_wordnet_ids
from pipeline.reproduce.measuring import USED, Methods, ReadSample, Record

TESTS = {"negative": "deletion_negative", "positive": "deletion_positive"}
METRICS = {
    "negative_predicted": "negative, predicted",
    "negative_target": "negative, target",
    "positive_predicted": "positive, predicted",
    "positive_target": "positive, target",
}


def measure(methods: Methods, batch: Sequence[ReadSample]) -> list[Record]:
    """Return, for each image, map and method, whether the image is right at each share, as digits 0 and 1."""
    device = methods.explainer.device
    images = methods.images(batch)
    classes = methods.embed(imagenet_class_names(imagenet_wordnet_ids()))
    target = torch.tensor([sample.class_ids[0] - 1 for sample in batch], device=device)
    predicted = (methods.explainer.encode(images).image_features.float() @ classes.float().T).argmax(dim=1)
    # one pair for the target; another one where the model names another class
    other = (predicted != target).nonzero()[:, 0]
    rows = torch.cat([torch.arange(len(batch), device=device), other])
    explained = torch.cat([target, predicted[other]])
    pair_of_predicted = torch.arange(len(batch), device=device)
    pair_of_predicted[other] = len(batch) + torch.arange(len(other), device=device)
    maps = methods.maps(images, classes[explained], rows)
    height, width = images.shape[-2:]
    found: list[dict[str, dict[str, str]]] = [{"target": {}, "predicted": {}} for _ in batch]
    for name, grids in maps.items():
        heatmaps = legrad.heatmaps_of(grids, height, width, methods.explainer.tower.normalisation)
        curves = legrad.insertion_deletion(
            methods.explainer,
            images,
            heatmaps.to(device),
            classes[explained],
            rows,
            tests=list(TESTS.values()),
            filling="black",
            class_embeddings=classes,
            right_class=target[rows],
        )
        for row, texts in enumerate(found):
            for kind, pair in (("target", row), ("predicted", int(pair_of_predicted[row]))):
                texts[kind] |= {
                    f"{name}/{order}": _digits(curves[test].is_right[pair])  # type: ignore[index]
                    for order, test in TESTS.items()
                }
    return [
        {"class_id": sample.class_ids[0], "predicted_class_id": int(predicted[row]) + 1, "right": found[row]}
        for row, sample in enumerate(batch)
    ]


def _digits(is_right: np.ndarray) -> str:
    return "".join("1" if right else "0" for right in is_right)


def score(records: Iterator[Record], method: str) -> dict[str, float]:
    """Return the areas under the accuracy from 0 to 90 %, divided by that range."""
    sums = {metric: np.zeros(len(SHARES)) for metric in METRICS}
    images = 0
    for record in records:
        if record["state"] != USED:
            continue
        images += 1
        for metric in METRICS:
            order, kind = metric.split("_")
            sums[metric] += [int(digit) for digit in record["right"][kind][f"{method}/{order}"]]
    return {metric: float(area_under_curve(each / images)) for metric, each in sums.items()}
