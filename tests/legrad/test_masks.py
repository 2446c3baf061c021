"""Masks against independent oracles: numpy, scikit-image, pycocotools and torch, one map at a time."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco
from skimage.filters import threshold_otsu

from legrad.errors import MaskError
from legrad.heatmaps import heatmap_columns, heatmaps_of, minmax_normalise, upsample_grid
from legrad.masks.grids import grid_to_masks
from legrad.masks.rle import decode_rle, encode_rle, mask_area, mask_bbox_xywh
from legrad.masks.thresholds import MaskRule, otsu_threshold

mask_stacks = hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12))


def random_grids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def bbox_by_numpy(mask: np.ndarray) -> list[int]:
    if not mask.any():
        return [0, 0, 0, 0]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]


def masks_by_plain_steps(grids: torch.Tensor, height: int, width: int, threshold: float) -> np.ndarray:
    """One map at a time in float64: no chunks, no transposed layout."""
    masks = []
    for grid in grids.double():
        pixels = F.interpolate(grid[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
        masks.append(((pixels - pixels.min()) / (pixels.max() - pixels.min()) > threshold).numpy())
    return np.stack(masks)


def between_class_variance(heatmap: np.ndarray, cut: float) -> float:
    values = heatmap.astype(np.float64)
    above = values > cut
    gap = values[above].mean() - values[~above].mean()
    return above.mean() * (1 - above.mean()) * gap**2


# ---------------------------------------------------------------- run-length encoding


@settings(deadline=None)
@given(mask_stacks)
def test_masks_survive_a_round_trip_through_rle(masks):
    decoded = [decode_rle(rle) for rle in encode_rle(torch.from_numpy(masks))]
    np.testing.assert_array_equal(np.stack(decoded), masks)


@settings(deadline=None)
@given(mask_stacks)
def test_rle_is_what_pycocotools_makes_of_a_fortran_array(masks):
    for rle, mask in zip(encode_rle(torch.from_numpy(masks)), masks, strict=True):
        expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle == {"size": list(mask.shape), "counts": expected["counts"].decode()}


@settings(deadline=None)
@given(mask_stacks)
def test_rle_does_not_depend_on_the_memory_layout_or_the_type_of_the_masks(masks):
    column_major = torch.from_numpy(np.ascontiguousarray(masks.transpose(0, 2, 1))).mT
    expected = encode_rle(torch.from_numpy(masks))
    assert encode_rle(column_major) == expected
    assert encode_rle(masks) == expected
    assert encode_rle(torch.from_numpy(masks.astype(np.uint8) * 255)) == expected


@settings(deadline=None)
@given(mask_stacks)
def test_area_and_bbox_agree_with_numpy(masks):
    rles = encode_rle(torch.from_numpy(masks))
    assert mask_area(rles).tolist() == masks.sum(axis=(1, 2)).tolist()
    assert mask_bbox_xywh(rles).tolist() == [bbox_by_numpy(mask) for mask in masks]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 90_000), (400, 300), (65, 31)]), st.floats(0, 1))
def test_decoding_agrees_with_pycocotools_on_masks_with_long_and_short_runs(seed, size, density):
    rng = np.random.default_rng(seed)
    mask = rng.random(size) < density * np.linspace(0, 1, size[1]) ** 8
    rle = encode_rle(mask[None])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        expected = coco.decode(rle)
    np.testing.assert_array_equal(decode_rle(rle), expected)


def test_no_masks_have_no_rles_areas_or_boxes():
    assert encode_rle(torch.zeros(0, 5, 7, dtype=torch.bool)) == []
    assert mask_area([]).shape == (0,)
    assert mask_bbox_xywh([]).shape == (0, 4)


# ---------------------------------------------------------------- normalisation and upsampling


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=8),
        elements=st.floats(-(2.0**60), 2.0**60, width=32),
    )
)
def test_normalised_maps_span_zero_to_one_or_are_all_zero(maps):
    normalised = minmax_normalise(torch.from_numpy(maps)).numpy()
    for before, after in zip(maps, normalised, strict=True):
        if before.min() == before.max():
            assert not after.any()
        else:
            assert after.min() == 0
            assert after.max() == 1


def test_normalisation_leaves_its_input_alone_and_treats_each_map_by_itself():
    maps = random_grids(2, 3, 4, 5) * torch.tensor([1.0, 10.0, 1000.0])[:, None, None] - 7
    before = maps.clone()
    normalised = minmax_normalise(maps)
    assert torch.equal(maps, before)
    for image, prompt in np.ndindex(2, 3):
        one = maps[image, prompt].numpy()
        expected = (one - one.min()) / (one.max() - one.min())
        np.testing.assert_array_equal(normalised[image, prompt].numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_normalisation_keeps_the_type_of_its_maps(dtype):
    normalised = minmax_normalise(random_grids(2, 5, 3).to(dtype))
    assert normalised.dtype == dtype
    assert (normalised.amin((1, 2)) == 0).all()
    assert (normalised.amax((1, 2)) == 1).all()


@settings(max_examples=50, deadline=None)
@given(
    grid_size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    pixel_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    leading=st.sampled_from([(), (1,), (3,), (2, 3)]),
)
def test_upsampling_equals_torch_interpolation_of_each_map(grid_size, pixel_size, leading):
    grids = random_grids(*leading, *grid_size)
    pixels = upsample_grid(grids, *pixel_size)
    assert pixels.shape == (*leading, *pixel_size)
    for index in np.ndindex(*leading):
        alone = F.interpolate(grids[index][None, None], pixel_size, mode="bilinear", align_corners=False)[
            0, 0
        ]
        torch.testing.assert_close(pixels[index], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("normalisation", ["upsampled", "grid"])
def test_columns_of_one_map_equal_the_heat_maps_of_the_public_function(normalisation):
    grids = random_grids(3, 5, 9)
    heatmaps = heatmaps_of(grids, 61, 43, normalisation)
    for grid, heatmap in zip(grids, heatmaps, strict=True):
        columns = heatmap_columns(grid.numpy(), 61, 43, normalisation)
        np.testing.assert_array_equal(columns, heatmap.mT)


def test_a_frame_may_be_longer_than_opencv_counts_in_two_bytes():
    grid = random_grids(3, 4)
    expected = F.interpolate(grid[None, None], (2, 40_000), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(upsample_grid(grid, 2, 40_000), expected, rtol=0, atol=2e-6)


def test_upsampling_nothing_gives_nothing_of_the_right_shape():
    assert upsample_grid(torch.zeros(2, 0, 7, 5), 30, 20).shape == (2, 0, 30, 20)


def test_a_frame_without_pixels_is_refused():
    with pytest.raises(MaskError, match="received 0 x 20"):
        upsample_grid(torch.zeros(1, 7, 7), 0, 20)


# ---------------------------------------------------------------- thresholds


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    power=st.floats(0.2, 8),
    low=st.floats(0, 0.4),
    high=st.floats(0.6, 1),
)
def test_otsu_separates_as_well_as_scikit_images_cut(seed, power, low, high):
    values = np.random.default_rng(seed).random((3, 31, 23)) ** power
    heatmaps = (low + (high - low) * values).astype(np.float32)
    found = otsu_threshold(torch.from_numpy(heatmaps))
    for heatmap, threshold in zip(heatmaps, found, strict=True):
        # of two cuts that separate alike either may be found, so what is compared is how well they do
        expected = between_class_variance(heatmap, threshold_otsu(heatmap))
        assert between_class_variance(heatmap, float(threshold)) >= 0.998 * expected


def test_otsu_finds_the_gap_between_two_classes_in_every_map_of_any_batch_shape():
    heatmaps = torch.zeros(2, 3, 10, 20)
    heatmaps[0, :, :, :5], heatmaps[1, :, :, :15] = 0.9, 0.4
    thresholds = otsu_threshold(heatmaps)
    assert thresholds.shape == (2, 3)
    assert ((thresholds[0] > 0) & (thresholds[0] < 0.9)).all()
    assert ((thresholds[1] > 0) & (thresholds[1] < 0.4)).all()


def test_otsu_of_a_constant_map_leaves_no_pixel_above_it():
    for value in (0.0, 0.3, 1.0):
        heatmap = torch.full((1, 4, 6), value)
        assert float(otsu_threshold(heatmap)) == pytest.approx(value)
        assert not (heatmap > otsu_threshold(heatmap)).any()


def test_a_pixel_exactly_at_the_threshold_is_background():
    grid = torch.tensor([[[0.0, 0.5, 1.0]]])
    masks = grid_to_masks(grid, 1, 3, MaskRule("fixed", 0.5))
    assert decode_rle(masks.rles[0]).tolist() == [[False, False, True]]


@pytest.mark.parametrize(
    ("value", "expected_area"), [(0.0, 2), (1.0, 0)], ids=["lowest threshold", "highest threshold"]
)
def test_the_extreme_thresholds_leave_out_the_lowest_pixel_and_take_nothing(value, expected_area):
    masks = grid_to_masks(torch.tensor([[[0.0, 0.5, 1.0]]]), 1, 3, MaskRule("fixed", value))
    assert masks.areas.tolist() == [expected_area]


@pytest.mark.parametrize("rule", [("median", 0.5), ("fixed", -0.1), ("fixed", 1.5), ("fixed", float("nan"))])
def test_an_impossible_rule_is_refused(rule):
    with pytest.raises(MaskError, match="received"):
        MaskRule(*rule)


# ---------------------------------------------------------------- grids to masks


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.integers(0, 5),
    grid_size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    pixel_size=st.tuples(st.integers(2, 70), st.integers(2, 70)),
    threshold=st.floats(0.05, 0.95),
    max_chunk_pixels=st.integers(1, 10_000),
)
def test_masks_equal_plain_steps_in_float64_for_any_chunk_size(
    prompts, grid_size, pixel_size, threshold, max_chunk_pixels
):
    grids = random_grids(prompts, *grid_size)
    rule = MaskRule("fixed", threshold)
    found = grid_to_masks(grids, *pixel_size, rule, max_chunk_pixels=max_chunk_pixels)
    assert found.thresholds.tolist() == [np.float32(threshold)] * prompts
    assert len(found.rles) == prompts
    if prompts:
        # a pixel on the threshold itself may fall either way between float32 and float64
        lower = masks_by_plain_steps(grids, *pixel_size, threshold + 1e-5)
        upper = masks_by_plain_steps(grids, *pixel_size, threshold - 1e-5)
        masks = np.stack([decode_rle(rle) for rle in found.rles])
        assert (masks >= lower).all()
        assert (masks <= upper).all()


@pytest.mark.parametrize("rule", [MaskRule("fixed", 0.4), MaskRule("otsu")], ids=["fixed", "otsu"])
def test_masks_agree_with_the_public_steps_one_by_one(rule):
    grids = random_grids(7, 5, 9)
    found = grid_to_masks(grids, 61, 43, rule, max_chunk_pixels=2 * 61 * 43)
    for prompt, grid in enumerate(grids):
        heatmap = minmax_normalise(upsample_grid(grid, 61, 43))
        cut = float(otsu_threshold(heatmap)) if rule.rule == "otsu" else rule.value
        mask = heatmap.numpy() > np.float32(cut)
        assert found.thresholds[prompt] == np.float32(cut)
        assert (decode_rle(found.rles[prompt]) == mask).all()
        assert found.areas[prompt] == mask.sum()
        assert found.bboxes_xywh[prompt].tolist() == bbox_by_numpy(mask)


@pytest.mark.parametrize("pixel_size", [(1, 1), (1, 500), (2, 3), (7, 7), (1500, 9), (1024, 768)])
def test_masks_have_the_size_of_their_frame(pixel_size):
    masks = grid_to_masks(random_grids(2, 7, 7), *pixel_size, MaskRule("fixed", 0.5))
    assert [rle["size"] for rle in masks.rles] == [list(pixel_size)] * 2
    assert [decode_rle(rle).shape for rle in masks.rles] == [pixel_size] * 2


@pytest.mark.parametrize("rule", [MaskRule("fixed", 0.0), MaskRule("otsu")], ids=["fixed", "otsu"])
def test_a_constant_map_gives_an_empty_mask(rule):
    grids = torch.stack([torch.full((4, 4), 0.25), torch.zeros(4, 4)])
    masks = grid_to_masks(grids, 31, 17, rule)
    assert masks.areas.tolist() == [0, 0]
    assert masks.bboxes_xywh.tolist() == [[0, 0, 0, 0]] * 2
    assert not decode_rle(masks.rles[0]).any()


def test_no_prompts_give_no_masks_with_columns_of_the_right_types():
    masks = grid_to_masks(torch.zeros(0, 7, 7), 20, 30, MaskRule())
    assert masks.rles == []
    assert (masks.areas.dtype, masks.areas.shape) == (np.dtype(np.int64), (0,))
    assert (masks.bboxes_xywh.dtype, masks.bboxes_xywh.shape) == (np.dtype(np.float32), (0, 4))
    assert (masks.thresholds.dtype, masks.thresholds.shape) == (np.dtype(np.float32), (0,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_grids_are_upsampled_in_float32(dtype):
    grids = random_grids(2, 7, 7).to(dtype)
    rule = MaskRule("fixed", 0.5)
    assert grid_to_masks(grids, 50, 40, rule).rles == grid_to_masks(grids.float(), 50, 40, rule).rles


def test_grids_that_are_not_finite_are_refused_with_their_prompts():
    grids = random_grids(4, 7, 7)
    grids[1, 2, 3], grids[3, 0, 0] = float("nan"), float("inf")
    with pytest.raises(MaskError, match=r"prompts \[1, 3\]"):
        grid_to_masks(grids, 20, 30, MaskRule())
