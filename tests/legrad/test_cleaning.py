"""Cleaning against scikit-image, and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import label

from legrad.errors import MaskError
from legrad.masks.cleaning import Cleaning, clean_mask
from legrad.masks.grids import grid_to_masks
from legrad.masks.rle import decode_rle
from legrad.masks.thresholds import MaskRule

masks_of_some_size = hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12))
shares = st.sampled_from([0.0, 0.02, 0.1, 0.3, 1.0])


def cleaned_by_scikit_image(mask: np.ndarray, cleaning: Cleaning) -> np.ndarray:
    kept = np.zeros_like(mask)
    parts = label(mask, connectivity=2)
    for part in range(1, parts.max() + 1):
        if (parts == part).sum() >= cleaning.min_component * mask.size:
            kept |= parts == part
    filled = kept.copy()
    gaps = label(~kept, connectivity=1)
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = True
    for gap in range(1, gaps.max() + 1):
        here = gaps == gap
        if not (here & ~inner).any() and here.sum() <= cleaning.max_hole * mask.size:
            filled |= here
    return filled


@given(masks_of_some_size, shares, shares)
def test_small_parts_and_small_holes_go_as_scikit_image_labels_them(masks, min_component, max_hole):
    cleaning = Cleaning(min_component=min_component, max_hole=max_hole)
    found = [clean_mask(mask, cleaning) for mask in masks]
    expected = [cleaned_by_scikit_image(mask, cleaning) for mask in masks]
    np.testing.assert_array_equal(found, expected)


def test_parts_that_touch_at_a_corner_are_one_and_what_reaches_the_border_is_no_hole():
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], bool)
    tidy = clean_mask(mask, Cleaning(min_component=3 / 16, max_hole=1.0))
    assert tidy.astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


def test_masks_are_cut_from_smoothed_maps_and_cleaned_afterwards():
    grid = torch.zeros(1, 12, 12)
    grid[0, 2:8, 2:8] = 1.0
    grid[0, 4, 4], grid[0, 11, 11] = 0.0, 1.0
    rule = MaskRule("fixed", 0.5)
    plain = decode_rle(grid_to_masks(grid, 12, 12, rule).rles[0])
    assert (plain[4, 4], plain[11, 11], plain.sum()) == (False, True, 36)
    by_parts = grid_to_masks(grid, 12, 12, rule, cleaning=Cleaning(min_component=0.05, max_hole=0.05))
    assert by_parts.areas.tolist() == [36]
    assert not decode_rle(by_parts.rles[0])[11, 11]
    smoothed = decode_rle(grid_to_masks(grid, 12, 12, rule, cleaning=Cleaning(smooth=1.0)).rles[0])
    assert smoothed[4, 4]


def test_a_band_ignores_what_cleaning_takes_away_and_nothing_that_it_adds():
    grid = torch.zeros(1, 12, 12)
    grid[0, 2:8, 2:8] = 1.0
    grid[0, 4, 4], grid[0, 11, 11] = 0.5, 1.0
    masks = grid_to_masks(
        grid, 12, 12, MaskRule("band"), cleaning=Cleaning(min_component=0.05, max_hole=0.05)
    )
    mask, ignore = decode_rle(masks.rles[0]), decode_rle(masks.ignores[0])
    assert (mask[4, 4], ignore[4, 4]) == (True, False)
    assert (mask[11, 11], ignore[11, 11]) == (False, True)


@pytest.mark.parametrize(
    "settings",
    [{"smooth": -1.0}, {"smooth": float("inf")}, {"min_component": 1.5}, {"max_hole": float("nan")}],
)
def test_impossible_cleaning_is_refused_by_name(settings):
    with pytest.raises(MaskError, match=f"{next(iter(settings))}.*received"):
        Cleaning(**settings)
