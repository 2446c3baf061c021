"""Rows of one scene against its truth, in cases small enough to count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from legrad.masks.rle import encode_rle
from legrad.quality import label_metrics
from pipeline.evaluation.mask_scores import WrittenMasks, score_written_masks
from pipeline.evaluation.scene_masks import SceneScores, row_target, score_scene
from pipeline.shards.ground_truth import PointLabel, Scene
from tests.helpers.ground_truth_shards import label_map

LABELS = label_map({1: (2, 10, 2, 12), 2: (12, 20, 20, 30), 255: (0, 24, 0, 2)})
DOG, CAR = LABELS == 1, LABELS == 2


def scene(labels: np.ndarray | None = LABELS, ids: tuple[int, ...] = (1, 2), **more: Any) -> Scene:
    return Scene("key", 0, b"", tuple(f"text {i}" for i in ids), ids, labels, **more)


def rle(mask: np.ndarray | None) -> Any:
    return None if mask is None else encode_rle(mask[None])[0]


def row(index: int, mask: np.ndarray | None, class_id: int | None = None, **columns: Any) -> dict[str, Any]:
    found = {
        "prompt_index": index,
        "class_id": class_id,
        "similarity": 0.3,
        "mask": rle(mask),
        "ignore": None,
    }
    return {**found, **columns}


def summary(*scenes: SceneScores) -> Any:
    return score_written_masks(WrittenMasks(scenes, 0, 0, ()))


def test_right_masks_of_captions_are_right_in_every_figure():
    scores = summary(score_scene(scene(), [row(0, DOG), row(1, CAR)], "captions"))
    figures = ("iou", "boundary_f", "mean_iou", "mean_iou_with_background", "mean_iou_kept", "pixel_accuracy")
    for name in (*figures, "precision", "recall", "coverage", "kept_accuracy"):
        assert getattr(scores, name).value == 1.0, name
    assert scores.class_iou == {0: 1.0, 1: 1.0, 2: 1.0}
    assert scores.point_mean_iou is None
    assert scores.presence_auroc is None, "every prompt names something that is there"


def test_the_mask_of_the_higher_similarity_takes_the_pixels_that_two_share():
    greedy = [row(0, DOG | CAR, similarity=0.9), row(1, CAR, similarity=0.1)]
    scores = summary(score_scene(scene(), greedy, "captions"))
    assert scores.class_iou == pytest.approx({0: 1.0, 1: DOG.sum() / (DOG | CAR).sum(), 2: 0.0})
    assert scores.recall.value == pytest.approx(DOG.sum() / (DOG | CAR).sum())


def test_pixels_that_rows_ignore_leave_the_kept_ones_and_count_as_background_elsewhere():
    unsure = np.zeros_like(DOG)
    unsure[6:10, 2:12] = True  # the lower half of the dog
    only_dog = scene(np.where(CAR, 0, LABELS).astype(np.uint8), (1,))
    scores = summary(score_scene(only_dog, [row(0, DOG & ~unsure, ignore=rle(unsure))], "captions"))
    counted = (LABELS != 255).sum()
    assert scores.coverage.value == pytest.approx(1 - unsure.sum() / counted)
    assert (scores.precision.value, scores.recall.value) == (1.0, 0.5)
    assert (scores.mean_iou.value, scores.mean_iou_kept.value) == (0.5, 1.0)
    assert (scores.pixel_accuracy.value, scores.kept_accuracy.value) == (1 - unsure.sum() / counted, 1.0)


def test_rows_of_classes_belong_to_the_class_they_name_whatever_their_ordinal():
    rows = [row(40, CAR, class_id=2), row(7, DOG, class_id=1)]
    scores = summary(score_scene(scene(ids=()), rows, "classes"))
    assert (scores.iou.value, scores.mean_iou.value, scores.rows_scored) == (1.0, 1.0, 2)


def test_absent_classes_are_rightly_rejected_or_false_alarms():
    rows = [
        row(0, DOG, class_id=1, similarity=0.5),
        row(1, None, class_id=2, similarity=0.2),
        row(2, None, class_id=3, similarity=0.1),
        row(3, None, class_id=4, similarity=0.1),
        row(4, CAR, class_id=5, similarity=0.4),
    ]
    scores = summary(score_scene(scene(), rows, "classes"))
    assert (scores.rows_scored, scores.rows_without_object) == (1, 1)
    assert (scores.rows_rejected, scores.rows_rejected_rightly) == (3, 2)
    assert scores.class_iou == pytest.approx({0: 1.0, 1: 1.0, 2: 0.0, 5: 0.0})
    # of present (.5, .2) and absent (.1, .1, .4) five of six pairs are in order
    assert scores.presence_auroc.value == pytest.approx(5 / 6)


def test_an_accepted_row_without_a_pixel_is_scored_as_a_miss():
    rows = [row(0, DOG, class_id=1), row(1, np.zeros_like(CAR), class_id=2)]
    scores = summary(score_scene(scene(), rows, "classes"))
    assert (scores.rows_scored, scores.rows_rejected, scores.iou.value) == (2, 0, 0.5)
    assert (scores.mean_iou.value, scores.precision.value) == (0.5, 1.0)


def test_classes_that_no_row_names_are_missed():
    scores = summary(score_scene(scene(), [row(0, DOG, class_id=1)], "classes"))
    assert scores.objects_without_row == 1
    assert scores.mean_iou.value == 0.5


def test_a_scene_without_rows_is_background_all_over():
    scores = summary(score_scene(scene(), [], "captions"))
    assert (scores.iou, scores.mean_iou.value, scores.objects_without_row) == (None, 0.0, 2)
    assert scores.pixel_accuracy.value == pytest.approx(1 - (DOG | CAR).sum() / (LABELS != 255).sum())
    assert scores.precision is None, "no pixel is in a mask"


def test_a_whole_caption_is_one_class_of_all_its_objects():
    scores = summary(score_scene(scene(), [row(0, DOG)], "caption"))
    expected = DOG.sum() / (DOG | CAR).sum()
    assert scores.class_iou[1] == pytest.approx(expected)
    assert scores.iou.value == pytest.approx(expected)


def test_classes_above_255_keep_their_ids():
    labels = np.where(CAR, 919, LABELS.astype(np.uint16))
    labels[LABELS == 255] = 65535
    rows = [row(0, DOG, class_id=1), row(918, CAR, class_id=919)]
    scores = summary(score_scene(scene(labels, ()), rows, "classes"))
    assert scores.class_iou == {0: 1.0, 1: 1.0, 919: 1.0}


POINTS = (
    PointLabel(5 / 40, 5 / 24, 1, True),  # on the dog
    PointLabel(25 / 40, 15 / 24, 1, False),  # on the car
    PointLabel(25 / 40, 15 / 24, 2, True),
    PointLabel(35 / 40, 3 / 24, 2, True),  # outside of both
    PointLabel(35 / 40, 3 / 24, 3, False),
)


def test_points_are_held_against_the_mask_of_their_own_class_in_any_frame():
    rows = [row(0, (DOG | CAR)[::2, ::2], class_id=1), row(1, CAR, class_id=2), row(2, CAR, class_id=9)]
    found = score_scene(scene(None, points=POINTS), rows, "classes")
    table = label_metrics.tabulate_overlaps([found.points])
    assert label_metrics.class_iou(table) == {1: 0.5, 2: 0.5}
    scores = summary(found)
    assert (scores.point_mean_iou.value, scores.mean_iou, scores.iou) == (0.5, None, None)
    # class 9 was never asked for
    assert (scores.rows_scored, scores.rows_without_object, scores.rows_unjudged) == (2, 0, 1)


def test_a_class_that_every_point_denies_is_absent():
    found = score_scene(scene(None, points=POINTS), [row(0, CAR, class_id=3)], "classes")
    assert (found.present, found.counts["accepted_absent"]) == ((False,), 1)
    assert found.counts["objects_without_row"] == 2


def test_a_row_is_about_nothing_where_its_object_is_not_to_be_seen():
    assert row_target(scene(ids=(1, 9)), row(1, DOG), "captions") is None
    assert row_target(scene(ids=(1, 9)), row(5, DOG), "captions") is None
    assert row_target(scene(None, points=POINTS), row(0, DOG), "captions") is None
    np.testing.assert_array_equal(row_target(scene(), row(1, DOG), "captions"), CAR)
    np.testing.assert_array_equal(row_target(scene(), row(0, DOG, class_id=2), "classes"), CAR)
    np.testing.assert_array_equal(row_target(scene(), row(0, DOG), "caption"), DOG | CAR)
