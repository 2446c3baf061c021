"""Figures of label maps against scikit-learn, naive loops and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import distance_transform_edt
from skimage.segmentation import find_boundaries
from sklearn.metrics import confusion_matrix, jaccard_score

from legrad.quality.label_metrics import (
    CORRECT,
    CORRECT_KEPT,
    COUNTED,
    HIT,
    KEPT,
    MASKED,
    TRUE,
    bootstrap_difference,
    bootstrap_sums,
    boundary_f,
    class_iou,
    label_overlap,
    mean_iou,
    pixel_tally,
    point_overlap,
    share,
    tabulate_overlaps,
)

SHAPE = (6, 7)
label_maps = hnp.arrays(np.uint8, SHAPE, elements=st.integers(0, 4))
masks = hnp.arrays(np.bool_, SHAPE)
image_sets = st.lists(st.tuples(label_maps, label_maps, masks), min_size=1, max_size=4)


def table_of(images):
    return tabulate_overlaps([label_overlap(*image) for image in images])


def pooled(images):
    """Predicted and true class of every pixel that counts, over all images."""
    predicted, truth = (np.concatenate([image[k][image[2]] for image in images]) for k in (0, 1))
    return predicted, truth


def value_on(table, statistic):
    return statistic(np.asarray(table.counts.sum(axis=0)).reshape(1, -1))[0]


@settings(max_examples=15)
@given(image_sets)
def test_mean_iou_is_the_macro_jaccard_score_of_all_pixels_pooled(images):
    predicted, truth = pooled(images)
    table = table_of(images)
    for background in (True, False):
        labels = [c for c in np.union1d(predicted, truth) if background or c]
        found = value_on(table, mean_iou(table, background=background))
        if labels:
            expected = jaccard_score(truth, predicted, labels=labels, average="macro", zero_division=0)
            assert found == pytest.approx(expected)
        else:
            assert np.isnan(found)


@settings(max_examples=15)
@given(image_sets)
def test_the_iou_of_each_class_comes_from_margins_and_diagonal_of_the_confusion_matrix(images):
    predicted, truth = pooled(images)
    confusion = confusion_matrix(truth, predicted, labels=range(5)) if len(truth) else np.zeros((5, 5))
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    expected = {c: confusion[c, c] / union[c] for c in range(5) if union[c]}
    assert class_iou(table_of(images)) == pytest.approx(expected)


def test_mean_iou_of_two_images_worked_out_by_hand():
    everywhere = np.ones((1, 4), dtype=bool)
    first = (np.array([[1, 1, 0, 0]]), np.array([[1, 0, 0, 0]]), everywhere)
    second = (np.array([[2, 0, 0, 300]]), np.array([[2, 2, 0, 0]]), everywhere)
    table = table_of([first, second])
    # background: 3 agree of 5 true and 4 predicted; 1: 1 of 2; 2: 1 of 2; 300 is said once and never true
    assert class_iou(table) == pytest.approx({0: 3 / 6, 1: 1 / 2, 2: 1 / 2, 300: 0})
    assert value_on(table, mean_iou(table, background=True)) == pytest.approx(1.5 / 4)
    assert value_on(table, mean_iou(table, background=False)) == pytest.approx(1 / 3)


def test_labels_of_pixels_that_do_not_count_may_be_anything():
    counted = np.array([[True, False]])
    overlap = label_overlap(np.array([[1, 65535]]), np.array([[1, 7]]), counted)
    assert overlap.class_ids.tolist() == [1]


def test_a_set_without_any_class_has_no_mean_iou():
    nothing = np.zeros((1, 2), dtype=bool)
    table = tabulate_overlaps([label_overlap(np.zeros((1, 2), int), np.zeros((1, 2), int), nothing)])
    assert bootstrap_sums(table.counts, mean_iou(table, background=True)) is None


points = st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans()), min_size=1, max_size=20)


@settings(max_examples=40)
@given(st.lists(points, min_size=1, max_size=3))
def test_point_wise_iou_counts_true_positives_over_all_but_true_negatives(images):
    overlaps = [point_overlap(*(np.array(column) for column in zip(*image, strict=True))) for image in images]
    table = tabulate_overlaps(overlaps)
    expected = {}
    for class_id in range(1, 5):
        answers = [(yes, said) for image in images for c, yes, said in image if c == class_id]
        found = sum(yes and said for yes, said in answers)
        missed = sum(yes and not said for yes, said in answers)
        wrong = sum(said and not yes for yes, said in answers)
        if found + missed + wrong:
            expected[class_id] = found / (found + missed + wrong)
    assert class_iou(table) == pytest.approx(expected)
    if expected:
        assert value_on(table, mean_iou(table, background=False)) == pytest.approx(
            np.mean(list(expected.values()))
        )


@settings(max_examples=30)
@given(label_maps, label_maps, masks, masks)
def test_a_tally_equals_counting_pixel_by_pixel(predicted, truth, counted, kept):
    tally = pixel_tally(predicted, truth, counted, kept)
    expected = np.zeros(7)
    for place in np.ndindex(SHAPE):
        if counted[place]:
            right = predicted[place] == truth[place]
            expected[COUNTED] += 1
            expected[KEPT] += kept[place]
            expected[CORRECT] += right
            expected[CORRECT_KEPT] += right and kept[place]
            expected[MASKED] += predicted[place] > 0
            expected[HIT] += right and predicted[place] > 0
            expected[TRUE] += truth[place] > 0
    assert tally.tolist() == expected.tolist()


def test_a_share_is_undefined_where_nothing_is_counted():
    sums = np.array([[0.0, 0.0], [1.0, 4.0]])
    shares = share(0, 1)(sums)
    assert np.isnan(shares[0])
    assert shares[1] == 0.25


def test_the_interval_of_sums_is_that_of_resampled_images():
    counts = np.random.default_rng(3).integers(1, 9, (12, 2)).astype(float)
    found = bootstrap_sums(counts, share(0, 1), resamples=400, seed=5)
    draws = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=400)
    ratios = []
    for draw in [np.ones(12, int), *draws]:
        rows = np.repeat(counts, draw, axis=0)
        ratios.append(rows[:, 0].sum() / rows[:, 1].sum())
    assert (found.value, found.images) == (pytest.approx(ratios[0]), 12)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])))


def test_an_interval_narrows_with_more_images():
    def width(images):
        counts = np.stack([np.arange(images) % 2, np.ones(images)], axis=1).astype(float)
        estimate = bootstrap_sums(counts, share(0, 1))
        return estimate.high - estimate.low

    assert width(400) < width(40) / 2


def test_a_paired_difference_sees_through_what_images_have_in_common():
    difficulty = np.random.default_rng(0).uniform(0, 80, 30)
    worse = np.stack([difficulty, np.full(30, 100.0)], axis=1)
    better = worse + np.array([2.0, 0.0])
    difference = bootstrap_difference(better, worse, share(0, 1), share(0, 1))
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.02, 0.02, 0.02))
    alone = bootstrap_sums(better, share(0, 1))
    assert alone.high - alone.low > 0.1


def test_a_difference_of_other_images_is_refused():
    with pytest.raises(ValueError, match="the same images, received 2 and 3"):
        bootstrap_difference(np.ones((2, 3)), np.ones((3, 4)), share(0, 1), share(0, 1))


def boundary_f_by_distance_maps(mask, truth, valid, tolerance):
    """By dense distance transforms and skimage's boundaries."""
    reach = tolerance * np.hypot(*mask.shape)
    # padded by reflection, so that the frame is no boundary
    found, wanted = (
        find_boundaries(np.pad(part, 1, "edge").astype(int), connectivity=1, mode="inner")[1:-1, 1:-1] & part
        for part in (mask, truth)
    )
    if not found.any() and not wanted.any():
        return float((mask == truth)[valid].all())
    if not found.any() or not wanted.any():
        return 0.0
    judged = found & valid
    near_truth, near_mask = (distance_transform_edt(~part) <= reach for part in (wanted, found))
    precision = near_truth[judged].mean() if judged.any() else 1.0
    recall = near_mask[wanted].mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@settings(max_examples=60)
@given(masks, masks, masks, st.sampled_from([0.0, 0.11, 0.25]))
def test_boundary_f_equals_that_of_distance_maps(mask, truth, valid, tolerance):
    expected = boundary_f_by_distance_maps(mask, truth, valid, tolerance)
    assert boundary_f(mask, truth, valid, tolerance=tolerance) == pytest.approx(expected)


def square(top: int, left: int, side: int, size: int = 40) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


EVERYWHERE = np.ones((40, 40), dtype=bool)


def test_a_boundary_within_tolerance_is_found_and_one_beyond_is_not():
    # the diagonal is 56.6 pixels
    truth = square(10, 10, 12)
    assert boundary_f(square(11, 10, 12), truth, EVERYWHERE, tolerance=0.018) == 1.0
    assert boundary_f(square(11, 10, 12), truth, EVERYWHERE, tolerance=0.01) < 0.7
    assert boundary_f(square(25, 25, 12), truth, EVERYWHERE) == 0.0


def test_the_frame_of_the_image_is_no_boundary():
    left_half = np.zeros((40, 40), dtype=bool)
    left_half[:, :20] = True
    assert boundary_f(left_half, ~left_half, EVERYWHERE, tolerance=0.02) == 1.0
    assert boundary_f(EVERYWHERE, EVERYWHERE, EVERYWHERE) == 1.0
    assert boundary_f(~EVERYWHERE, EVERYWHERE, EVERYWHERE) == 0.0


def test_a_contour_in_pixels_that_do_not_count_costs_nothing():
    truth, rim = square(10, 10, 12), square(8, 8, 16) & ~square(10, 10, 12)
    assert boundary_f(square(8, 8, 16), truth, ~rim, tolerance=0.05) == 1.0


@settings(max_examples=40)
@given(masks, masks, st.sampled_from([0.05, 0.2]))
def test_boundary_f_is_symmetric_and_grows_with_the_tolerance(mask, truth, tolerance):
    everywhere = np.ones(SHAPE, dtype=bool)
    forward = boundary_f(mask, truth, everywhere, tolerance=tolerance)
    assert forward == pytest.approx(boundary_f(truth, mask, everywhere, tolerance=tolerance))
    assert forward <= boundary_f(mask, truth, everywhere, tolerance=2 * tolerance) + 1e-9
    assert boundary_f(truth, truth, everywhere, tolerance=tolerance) == 1.0
