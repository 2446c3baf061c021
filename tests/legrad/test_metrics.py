"""Metrics against definitions written out by hand, and against the properties they must have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score

from legrad.quality.metrics import (
    average_precision,
    best_threshold,
    bootstrap_mean,
    bootstrap_statistic,
    foreground_iou,
    iou_at_thresholds,
    mean_average_precision,
    own_object_preference,
    pointing_hits,
    presence_auroc,
    recall_at_present_count,
    top1_hits,
)

SHAPE = (2, 5, 7)
heatmaps = hnp.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32))
masks = hnp.arrays(np.bool_, SHAPE)
THRESHOLDS = np.arange(1, 20) / 20


def iou_by_sets(mask: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> float:
    predicted = {tuple(p) for p in np.argwhere(mask & valid)}
    actual = {tuple(p) for p in np.argwhere(truth & valid)}
    return len(predicted & actual) / len(predicted | actual) if predicted | actual else 1.0


@given(heatmaps, masks, masks)
def test_iou_at_thresholds_equals_counting_pixels_of_each_cut(heat, truth, valid):
    fast = iou_at_thresholds(heat, truth, valid, THRESHOLDS)
    for column, threshold in enumerate(THRESHOLDS.astype(np.float32)):
        for pair in range(len(heat)):
            expected = iou_by_sets(heat[pair] > threshold, truth[pair], valid[pair])
            assert fast[pair, column] == pytest.approx(expected)


@given(masks, masks, masks)
def test_foreground_iou_equals_the_sets_definition(mask, truth, valid):
    expected = [iou_by_sets(*triple) for triple in zip(mask, truth, valid, strict=True)]
    assert foreground_iou(mask, truth, valid) == pytest.approx(expected)


def test_a_pixel_exactly_at_the_threshold_is_background():
    heat = np.array([[[0.5, 0.75]]], dtype=np.float32)
    everywhere = np.ones((1, 1, 2), dtype=bool)
    assert iou_at_thresholds(heat, everywhere, everywhere, np.array([0.5]))[0, 0] == 0.5


def test_thresholds_out_of_order_are_refused():
    everywhere = np.ones((1, 1, 2), dtype=bool)
    with pytest.raises(ValueError, match="ascending"):
        iou_at_thresholds(np.zeros((1, 1, 2)), everywhere, everywhere, np.array([0.5, 0.2]))


def test_one_best_threshold_is_chosen_for_the_whole_set():
    iou = np.array([[0.9, 0.5, 0.1], [0.0, 0.5, 0.6]])
    assert best_threshold(iou, np.array([0.2, 0.4, 0.6])) == (0.4, 1)


def test_equally_good_thresholds_give_the_lowest():
    assert best_threshold(np.array([[0.2, 0.3, 0.3]]), np.array([0.2, 0.4, 0.6])) == (0.4, 1)


@given(heatmaps, masks, masks)
def test_pointing_looks_only_at_the_hottest_valid_pixel(heat, truth, valid):
    for pair, hit in enumerate(pointing_hits(heat, truth, valid)):
        ranked = sorted(np.argwhere(valid[pair]).tolist(), key=lambda p: (-heat[pair][tuple(p)], p))
        assert bool(hit) == bool(ranked and truth[pair][tuple(ranked[0])])


def test_a_constant_map_points_at_the_first_pixel():
    truth = np.zeros((2, 2, 2), dtype=bool)
    truth[0, 0, 0] = truth[1, 1, 1] = True
    hits = pointing_hits(np.zeros((2, 2, 2)), truth, np.ones((2, 2, 2), dtype=bool))
    assert hits.tolist() == [True, False]


@given(heatmaps, masks, masks)
def test_average_precision_is_scikit_learns(heat, truth, valid):
    if not (truth[0] & valid[0]).any():
        with pytest.raises(ValueError, match="at least one valid pixel"):
            average_precision(heat[0], truth[0], valid[0])
        return
    expected = average_precision_score(truth[0][valid[0]], heat[0][valid[0]])
    assert average_precision(heat[0], truth[0], valid[0]) == pytest.approx(expected, abs=1e-9)


@given(
    hnp.arrays(np.float32, (6, 4), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    hnp.arrays(np.bool_, (6, 4)),
)
def test_mean_average_precision_is_scikit_learns_over_the_classes_that_occur(scores, present):
    occurring = present.any(axis=0)
    if occurring.any():
        expected = average_precision_score(present[:, occurring], scores[:, occurring], average="macro")
        assert mean_average_precision(scores, present) == pytest.approx(expected, abs=1e-9)


@given(heatmaps, masks)
def test_ignored_pixels_change_no_metric(heat, truth):
    truth = truth.copy()
    truth[:, 0, 0] = True
    valid = np.ones(SHAPE, dtype=bool)
    valid[:, 3:, :] = False
    scrambled = heat.copy()
    scrambled[:, 3:, :] = 1 - scrambled[:, 3:, :]
    for metric in (pointing_hits, lambda *a: iou_at_thresholds(*a, THRESHOLDS)):
        np.testing.assert_array_equal(
            metric(heat, truth, valid), metric(scrambled, ~truth & ~valid | truth & valid, valid)
        )
    assert average_precision(heat[0], truth[0], valid[0]) == average_precision(
        scrambled[0], truth[0], valid[0]
    )


def two_objects() -> np.ndarray:
    truth = np.zeros((2, 4, 4), dtype=bool)
    truth[0, :2, :2] = truth[1, 2:, 1:] = True
    return truth


def test_maps_on_their_own_objects_prefer_them_and_swapped_maps_do_not():
    truth, valid = two_objects(), np.ones((2, 4, 4), dtype=bool)
    maps = truth.astype(np.float32)
    assert own_object_preference(maps, truth, valid).tolist() == [1, 1]
    assert own_object_preference(maps[::-1], truth, valid).tolist() == [0, 0]
    assert own_object_preference(np.ones_like(maps), truth, valid).tolist() == [0.5, 0.5]


@given(hnp.arrays(np.float32, (4, 4), elements=st.floats(0, 1, width=32)))
def test_a_map_that_ignores_the_prompt_prefers_its_object_half_of_the_time(heat):
    valid = np.ones((2, 4, 4), dtype=bool)
    assert own_object_preference(np.stack([heat, heat]), two_objects(), valid).mean() == 0.5


def test_preference_of_an_object_without_pixels_is_refused():
    with pytest.raises(ValueError, match="areas"):
        own_object_preference(
            np.zeros((2, 2, 2)), np.zeros((2, 2, 2), dtype=bool), np.ones((2, 2, 2), dtype=bool)
        )


SCORES = np.array([[0.9, 0.1, 0.5, 0.2], [0.3, 0.8, 0.15, 0.7]])
PRESENT = np.array([[True, False, False, True], [False, False, False, True]])


def test_recognition_of_two_images_worked_out_by_hand():
    assert top1_hits(SCORES, PRESENT).tolist() == [True, False]
    # image 0: classes 0 and 3 present, the two best are 0 and 2; image 1: class 3 present, the best is 1
    assert recall_at_present_count(SCORES, PRESENT).tolist() == [0.5, 0.0]
    # class 0: the only image with it ranks first; class 3: both images have it; classes 1 and 2 never occur
    assert mean_average_precision(SCORES, PRESENT) == 1.0
    present, absent = SCORES[PRESENT], SCORES[~PRESENT]
    assert presence_auroc(SCORES, PRESENT) == pytest.approx((present[:, None] > absent).mean())


def test_recognition_without_any_label_is_refused():
    nothing = np.zeros_like(PRESENT)
    with pytest.raises(ValueError, match="image 0 has none"):
        recall_at_present_count(SCORES, nothing)
    with pytest.raises(ValueError, match="class that occurs"):
        mean_average_precision(SCORES, nothing)
    with pytest.raises(ValueError, match="present and absent"):
        presence_auroc(SCORES, nothing)


@settings(max_examples=25)
@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)), st.integers(0, 5))
def test_an_interval_encloses_resampled_means_and_is_the_same_for_the_same_seed(values, seed):
    estimate = bootstrap_mean(values, np.arange(len(values)), seed=seed, resamples=200)
    assert estimate.value == pytest.approx(values.mean())
    assert values.min() - 1e-12 <= estimate.low <= estimate.high <= values.max() + 1e-12
    assert estimate == bootstrap_mean(values, np.arange(len(values)), seed=seed, resamples=200)


def test_the_interval_of_independent_values_is_that_of_the_normal_approximation():
    values = np.random.default_rng(3).normal(size=2000)
    estimate = bootstrap_mean(values, np.arange(2000), resamples=2000)
    half_width = 1.96 * values.std() / np.sqrt(2000)
    assert estimate.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert estimate.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)


def test_pairs_of_one_image_are_resampled_together():
    values = np.random.default_rng(4).normal(size=200)
    independent = bootstrap_mean(values, np.arange(200))
    repeated = bootstrap_mean(np.repeat(values, 10), np.repeat(np.arange(200), 10))
    assert (repeated.low, repeated.high) == pytest.approx((independent.low, independent.high))
    assert repeated.images == 200


def test_the_statistic_of_resampled_sets_agrees_with_the_mean_of_resampled_images():
    values = np.random.default_rng(5).normal(size=60)
    by_statistic = bootstrap_statistic(lambda rows: float(values[rows].mean()), 60, resamples=400, seed=7)
    by_mean = bootstrap_mean(values, np.arange(60), resamples=400, seed=7)
    assert by_statistic.low == pytest.approx(by_mean.low, abs=0.02)
    assert by_statistic.high == pytest.approx(by_mean.high, abs=0.02)


def test_a_mean_over_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one pair"):
        bootstrap_mean(np.empty(0), np.empty(0, dtype=np.int64))
