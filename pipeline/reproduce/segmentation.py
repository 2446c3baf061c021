"""The table of ImageNet-S: a map of each class in an image, cut at 0.5, against the pixels of the class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple

import torch

import legrad
from pipeline.datasets.truth_dataset import IGNORED
from pipeline.reproduce import paper
from pipeline.reproduce.measuring import USED, Methods, ReadSample, Record

METRICS = {
    "pixel_accuracy": "pixel accuracy",
    "mean_iou": "mIoU",
    "mean_average_precision": "mAP",
}


def measure(methods: Methods, batch: Sequence[ReadSample]) -> list[Record]:
    """Return, for each class in each image and each method, the values of a `legrad.MapLocalisation`."""
    maps = methods.maps_of_classes(batch)
    pair = 0
    records = []
    for sample in batch:
        found = []
        for class_id in sample.class_ids:
            found.append({"class_id": class_id, "methods": _localised(methods, maps, pair, sample, class_id)})
            pair += 1
        records.append({"maps": found})
    return records


def _localised(
    methods: Methods, maps: dict[str, torch.Tensor], pair: int, sample: ReadSample, class_id: int
) -> dict[str, list[float | None]]:
    label_map = sample.label_map
    truth, valid = label_map == class_id, label_map != IGNORED
    return {
        name: list(astuple(legrad.map_localisation(heat, truth, valid, threshold=paper.THRESHOLD)))
        for name, heat in methods.heatmaps(maps, pair, *label_map.shape)
    }


def score(records: Iterator[Record], method: str) -> dict[str, float]:
    """Return the metrics of one method over all images; raise an InputError if no image was used."""
    maps = (
        legrad.MapLocalisation(*each["methods"][method])
        for record in records
        if record["state"] == USED
        for each in record["maps"]
    )
    scores = legrad.localisation_scores(maps)
    return {metric: getattr(scores, metric) for metric in METRICS}
