"""Thresholds against numpy, and properties of rule `band`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from legrad.errors import MaskError
from legrad.heatmaps import minmax_normalise
from legrad.masks.grids import HeatmapStack, grid_to_masks
from legrad.masks.rle import decode_rle
from legrad.masks.thresholds import MaskRule, cuts_of, foreground_contrast, otsu_threshold, quantile_threshold

unit_maps = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9),
    elements=st.floats(0, 1, width=32),
)
shares = st.floats(0, 1)


@given(unit_maps, st.integers(0, 20))
def test_a_quantile_is_numpys_inverted_distribution(maps, twentieths):
    # at a twentieth of few pixels, no rounding moves the rank
    share = twentieths / 20
    expected = [np.quantile(each, share, method="inverted_cdf") for each in maps]
    assert quantile_threshold(torch.from_numpy(maps), share).tolist() == expected


@given(unit_maps, shares)
def test_a_quantile_leaves_at_least_its_share_of_the_pixels_outside(maps, share):
    for columns in maps:
        _, cut = cuts_of(columns, MaskRule("quantile", quantile=share))
        assert (columns <= cut).mean() >= share - 1e-6


@given(unit_maps, st.tuples(shares, shares).filter(lambda pair: pair[0] < pair[1]), st.data())
def test_a_band_splits_a_frame_into_background_ignored_and_foreground(maps, band, data):
    center = data.draw(st.sampled_from(["half", "otsu"]))
    rule = MaskRule("band", low=band[0], high=band[1], band_center=center)
    masks = grid_to_masks(torch.from_numpy(maps), 13, 11, rule)
    assert (masks.thresholds_low <= masks.thresholds).all()
    for rle, ignore in zip(masks.rles, masks.ignores, strict=True):
        assert not (decode_rle(rle) & decode_rle(ignore)).any()


def test_a_band_around_the_half_cuts_at_its_own_values():
    grid = torch.tensor([[[0.0, 0.2, 0.25, 0.5, 0.75, 0.8, 1.0]]])
    masks = grid_to_masks(grid, 1, 7, MaskRule("band", low=0.25, high=0.75))
    assert decode_rle(masks.rles[0])[0].tolist() == [False] * 5 + [True] * 2
    assert decode_rle(masks.ignores[0])[0].tolist() == [False] * 3 + [True] * 2 + [False] * 2
    assert (masks.thresholds.tolist(), masks.thresholds_low.tolist()) == ([0.75], [0.25])


@given(unit_maps)
def test_a_band_around_otsus_cut_has_it_at_one_half(maps):
    for columns in maps:
        cut = float(otsu_threshold(torch.from_numpy(columns)))
        below = cuts_of(columns, MaskRule("band", low=0.25, high=0.5, band_center="otsu"))
        assert below == pytest.approx((cut / 2, cut))
        above = cuts_of(columns, MaskRule("band", low=0.5, high=0.75, band_center="otsu"))
        assert above == pytest.approx((cut, (cut + 1) / 2))


@pytest.mark.parametrize("rule", ["fixed", "otsu", "quantile"])
def test_a_rule_of_one_cut_ignores_nothing(rule):
    masks = grid_to_masks(torch.rand(2, 4, 5), 8, 9, MaskRule(rule))
    assert (masks.ignores, masks.thresholds_low) == ([], None)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantile": 1.1},
        {"low": -0.1},
        {"high": float("nan")},
        {"low": 0.6, "high": 0.6},
        {"low": 0.9, "high": 0.2},
        {"band_center": "mean"},
    ],
)
def test_impossible_numbers_are_refused_by_name(settings):
    with pytest.raises(MaskError, match=f"{next(iter(settings))}.*received"):
        MaskRule("band", **settings)


def test_contrast_is_the_difference_of_the_means_above_and_below_otsus_threshold_in_raw_units():
    grid = torch.zeros(3, 4, 5)
    grid[0, :2, :2], grid[1, :2, :2] = 8.0, 0.5
    grid[1] += 3
    assert foreground_contrast(grid).tolist() == [8.0, 0.5, 0.0]


@given(unit_maps, st.floats(0.01, 100))
def test_contrast_has_the_unit_of_relevance(maps, unit):
    grids = torch.from_numpy(maps)
    np.testing.assert_allclose(
        foreground_contrast(grids * unit), foreground_contrast(grids) * unit, rtol=0.05, atol=1e-4 * unit
    )


@given(unit_maps)
def test_otsu_gives_the_same_threshold_for_maps_declared_as_stretched(maps):
    heatmaps = minmax_normalise(torch.from_numpy(maps))
    assert torch.equal(otsu_threshold(heatmaps, is_stretched=True), otsu_threshold(heatmaps))


def test_maps_that_are_heat_maps_already_are_resized_and_not_stretched():
    stack = HeatmapStack(np.full((1, 2, 2), 0.4, np.float32), 6, 8, normalisation=None)
    (columns,) = stack.columns()
    assert columns.shape == (8, 6)
    np.testing.assert_allclose(columns, 0.4, rtol=1e-6)
