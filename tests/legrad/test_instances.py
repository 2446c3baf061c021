"""Masks split into instances: discs, properties on random maps, bounds and ties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from legrad.errors import MaskError
from legrad.masks.instances import Splitting, encode_instances, split_mask, spread_labels
from legrad.masks.rle import decode_rle

GRID = (12, 12)
SIDE = 96


def disc(row: float, column: float, radius: float, *, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A cone of height 1 on a disc, 0 outside; float32."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    distance = np.hypot(rows - row, columns - column)
    return np.clip(1 - 0.5 * distance / radius, 0, 1).astype(np.float32) * (distance <= radius)


def parts_of(mask: np.ndarray, heat: np.ndarray, **options: float) -> list[np.ndarray]:
    found = split_mask(mask, heat, GRID, Splitting(**options))
    return [found.labels == number for number in range(1, len(found.scores) + 1)]


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def test_discs_that_touch_are_two_instances_and_the_hotter_one_is_first():
    cool, hot = 0.9 * disc(48, 26, 20), disc(48, 66, 20)
    heat = np.maximum(cool, hot)
    first, second = parts_of(heat > 0, heat)
    assert iou(first, hot > 0) > 0.95
    assert iou(second, cool > 0) > 0.95


def test_an_object_with_one_peak_is_one_instance_however_its_texture_ripples():
    ripples = 0.05 * np.sin(np.arange(SIDE)[:, None] * 1.3) * np.sin(np.arange(SIDE) * 1.7)
    heat = disc(48, 48, 40)
    heat = np.where(heat > 0, np.clip(heat + ripples, 0, 1), 0).astype(np.float32)
    (only,) = parts_of(heat > 0, heat)
    assert np.array_equal(only, heat > 0)


def test_parts_that_do_not_touch_are_two_instances_although_the_map_is_flat():
    mask = (disc(30, 30, 18) + disc(70, 70, 18)) > 0
    assert len(parts_of(mask, mask.astype(np.float32))) == 2


def test_a_speck_belongs_to_the_nearest_instance():
    heat = np.maximum(disc(48, 24, 20), disc(48, 70, 20))
    mask = heat > 0
    mask[48, 94] = True
    first, second = sorted(parts_of(mask, heat), key=lambda part: not part[48, 94])
    assert first[48, 94]
    assert first[48, 70]
    assert not second[48, 94]


def test_a_deeper_valley_is_required_where_the_configuration_says_so():
    heat = np.maximum(disc(48, 30, 24), disc(48, 64, 24))
    assert len(parts_of(heat > 0, heat, min_peak_drop=0.02)) == 2
    assert len(parts_of(heat > 0, heat, min_peak_drop=0.6)) == 1


def test_an_empty_mask_has_no_instance():
    found = split_mask(np.zeros((20, 30), bool), disc(5, 5, 4), GRID)
    assert not found.labels.any()
    assert len(found.scores) == 0
    assert encode_instances(found).rles == []


def test_a_mask_on_a_map_of_zeros_is_one_instance_of_score_zero():
    mask = disc(10, 12, 6, height=20, width=30) > 0
    found = split_mask(mask, np.zeros((7, 7), np.float32), (7, 7))
    assert np.array_equal(found.labels, mask.astype(np.uint8))
    assert found.scores.tolist() == [0]


def test_the_number_of_instances_is_bounded_and_the_union_stays_the_mask():
    heat = np.zeros((SIDE, SIDE), np.float32)
    for number, (row, column) in enumerate(np.ndindex(4, 4)):
        heat = np.maximum(heat, (1 - 0.02 * number) * disc(12 + 24 * row, 12 + 24 * column, 11))
    parts = parts_of(heat > 0, heat, most=5)
    assert len(parts) == 5
    assert np.array_equal(np.logical_or.reduce(parts), heat > 0)
    assert all(part[12, 12 + 24 * column] for column, part in enumerate(parts[:4]))


def test_equal_peaks_are_ordered_by_place_and_every_call_gives_the_same():
    heat = np.maximum(disc(48, 26, 20), disc(48, 70, 20))
    runs = [split_mask(heat > 0, heat, GRID) for _ in range(3)]
    assert runs[0].labels[48, 26] == 1
    assert all(np.array_equal(run.labels, runs[0].labels) for run in runs)


def test_encoded_instances_are_disjoint_and_have_their_areas_and_boxes():
    heat = np.maximum(disc(48, 26, 20), disc(48, 70, 20))
    found = split_mask(heat > 0, heat, GRID)
    encoded = encode_instances(found)
    masks = np.array([decode_rle(rle) for rle in encoded.rles])
    assert masks.sum(axis=0).max() == 1
    assert encoded.areas.tolist() == masks.sum(axis=(1, 2)).tolist()
    rows, columns = np.nonzero(masks[1])
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert encoded.bboxes_xywh[1].tolist() == box


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    frame=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    most=st.integers(1, 6),
)
def test_instances_are_disjoint_cover_the_mask_and_are_ordered(seed, frame, grid, most):
    random = np.random.default_rng(seed)
    heat = random.random((random.integers(1, 40), random.integers(1, 40)), dtype=np.float32)
    mask = random.random(frame) < random.random()
    found = split_mask(mask, heat, grid, Splitting(smooth=0.2, most=most))
    assert found.labels.shape == frame
    assert np.array_equal(found.labels > 0, mask)
    assert len(found.scores) <= most
    assert set(np.unique(found.labels[mask])) == set(range(1, len(found.scores) + 1))
    assert (np.diff(found.scores) <= 0).all()
    assert ((found.scores >= 0) & (found.scores <= 1)).all()


def test_labels_are_spread_to_the_pixels_of_a_mask_that_have_none():
    labels = np.zeros((4, 4), np.uint8)
    labels[0, 0], labels[3, 3] = 1, 2
    spread = spread_labels(labels, np.ones((8, 8), bool))
    assert spread[1, 1] == spread[3, 3] == 1
    assert spread[6, 6] == spread[4, 4] == 2


@pytest.mark.parametrize(
    "options", [{"min_peak_drop": 0.0}, {"min_peak_drop": 1.0}, {"smooth": -1.0}, {"most": 0}, {"most": 255}]
)
def test_a_value_out_of_range_is_refused(options):
    with pytest.raises(MaskError, match="expected"):
        Splitting(**options)


def test_a_missing_scikit_image_is_reported_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    heat = disc(48, 48, 20)
    with pytest.raises(MaskError, match=r"legrad-pipeline\[instances\]"):
        split_mask(heat > 0, heat, GRID)
