"""The table of Open Images V7: a map of each class in an image, cut at 0.5, at the points labelled for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from legrad.quality.label_metrics import class_iou, tabulate_counts
from pipeline.evaluation.map_scores import count_points
from pipeline.reproduce import paper
from pipeline.reproduce.measuring import USED, Methods, ReadSample, Record
from pipeline.shards.ground_truth import PointLabel

METRICS = {"point_mean_iou": "p-mIoU"}


def measure(methods: Methods, batch: Sequence[ReadSample]) -> list[Record]:
    """Return three counts of points for each class in each image and each method.

    They are the points of the object, those in the mask, and those that are both.
    """
    maps = methods.maps_of_classes(batch)
    pair = 0
    records = []
    for sample in batch:
        points = _points(sample)
        found = []
        for class_id in sample.class_ids:
            height, width = sample.image.image_height, sample.image.image_width
            counts = {
                name: count_points(points[class_id], heat.numpy() > paper.THRESHOLD)
                for name, heat in methods.heatmaps(maps, pair, height, width)
            }
            found.append({"class_id": class_id, "methods": counts})
            pair += 1
        records.append({"maps": found})
    return records


def _points(sample: ReadSample) -> dict[int, list[PointLabel]]:
    """Return the points of an image by the class that they are labelled for."""
    points: defaultdict[int, list[PointLabel]] = defaultdict(list)
    for point in sample.truth.document["points"]:
        label = PointLabel(point["x"], point["y"], point["class_id"], point["label"] == "yes")
        points[label.class_id].append(label)
    return points


def score(records: Iterator[Record], method: str) -> dict[str, float]:
    """Return the mean over classes of the IoU of a class over its points in all images."""
    sums: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for record in records:
        if record["state"] == USED:
            for each in record["maps"]:
                sums[each["class_id"]] += each["methods"][method]
    classes = np.array(list(sums), dtype=np.intp)
    table = tabulate_counts(np.stack(list(sums.values())), classes, np.zeros_like(classes), 1)
    return {"point_mean_iou": float(np.mean(list(class_iou(table).values())))}
