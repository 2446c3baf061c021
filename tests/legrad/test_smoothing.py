"""Smoothing of relevance grids, against scikit-image."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.filters import gaussian

import legrad
from legrad.masks.grids import grid_to_masks
from legrad.masks.rle import decode_rle
from legrad.masks.smoothing import smoothed_grids
from legrad.masks.thresholds import MaskRule


@given(st.integers(0, 1000), st.floats(0.2, 6))
def test_smoothing_is_a_gaussian_that_mirrors_at_the_edges(seed, sigma):
    grids = np.random.default_rng(seed).random((2, 3, 7, 9), dtype=np.float32)
    expected = [[gaussian(grid, sigma=sigma, mode="reflect") for grid in image] for image in grids]
    smooth = smoothed_grids(torch.from_numpy(grids), sigma)
    np.testing.assert_allclose(smooth.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(smooth.sum((2, 3)), grids.sum((2, 3)), rtol=1e-5)


def test_grids_that_are_not_smoothed_stay_as_they_are_and_constant_ones_stay_constant():
    grids = torch.rand(2, 3, 4)
    assert smoothed_grids(grids, 0.0) is grids
    constant = torch.full((1, 5, 6), 0.1)
    assert torch.equal(smoothed_grids(constant, 1.3), constant)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_smoothed_in_single_precision(dtype):
    grids = torch.rand(2, 5, 6).to(dtype)
    smooth = smoothed_grids(grids, 0.7)
    assert smooth.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(smooth.float(), smoothed_grids(grids.double(), 0.7).float())


@given(st.integers(0, 1000), st.integers(1, 20))
def test_a_grid_is_smoothed_alone_as_among_others(seed, count):
    generator = torch.Generator().manual_seed(seed)
    grids = torch.rand(count, 7, 9, generator=generator)
    alone = torch.cat([smoothed_grids(grid[None], 0.6) for grid in grids])
    assert torch.equal(smoothed_grids(grids, 0.6), alone)


def test_a_grid_that_is_not_finite_spoils_no_other():
    grids = torch.rand(3, 4, 5)
    grids[1, 2, 2] = torch.nan
    smooth = smoothed_grids(grids, 1.0)
    assert smooth[1].isnan().any()
    assert torch.equal(smooth[[0, 2]], smoothed_grids(grids[[0, 2]], 1.0))


def test_masks_of_the_library_are_cut_from_the_same_smooth_grids():
    grids = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0))
    rule = MaskRule("otsu")
    smooth = grid_to_masks(grids, 30, 40, rule, cleaning=legrad.Cleaning(smooth=1.0))
    by_hand = grid_to_masks(legrad.smoothed_grids(grids, 1.0), 30, 40, rule)
    for left, right in zip(smooth.rles, by_hand.rles, strict=True):
        np.testing.assert_array_equal(decode_rle(left), decode_rle(right))
    assert smooth.areas.tolist() != grid_to_masks(grids, 30, 40, rule).areas.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_smooths_as_the_cpu_does():
    grids = torch.rand(50, 14, 14)
    torch.testing.assert_close(smoothed_grids(grids.cuda(), 0.6).cpu(), smoothed_grids(grids, 0.6))
