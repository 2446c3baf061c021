"""Masks cut for a whole batch in one flat array, against the same steps one map at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from legrad.heatmaps import heatmap_columns, upsample_grid
from legrad.masks.flat import FlatLayout, interpolated
from legrad.masks.grids import HeatmapStack, independent_masks
from legrad.masks.rle import decode_rle, encode_changes, encode_rle
from legrad.masks.runs import RULES_ON_DEVICE, cost_pixels, cut_maps
from legrad.masks.thresholds import MaskRule

frames_of_maps = st.lists(st.tuples(st.integers(1, 23), st.integers(1, 23)), min_size=1, max_size=5)
map_sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
rules = st.sampled_from(
    [
        MaskRule("fixed", 0.4),
        MaskRule("fixed", 0.0),
        MaskRule("fixed", 1.0),
        MaskRule("otsu"),
        MaskRule("band", low=0.3, high=0.6),
        MaskRule("band", low=0.3, high=0.6, band_center="otsu"),
    ]
)
normalisations = st.sampled_from(["upsampled", "grid", None])


def random_maps(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """Maps in [0, 1], of which every third is constant."""
    maps = torch.from_numpy(np.random.default_rng(seed).random((count, *size), dtype=np.float32))
    maps[::3] = maps[::3, :1, :1]
    return maps


def decoded(cut, frames) -> list[list[np.ndarray]]:
    """The mask of each map, and the ignore mask if it has one."""
    return [
        [
            decode_rle(encode_changes(changes, *frame))
            for changes in (runs.mask, runs.ignore)
            if changes is not None
        ]
        for runs, frame in zip(cut.runs(), frames, strict=True)
    ]


def values_of_maps(maps: torch.Tensor, frames) -> list[np.ndarray]:
    """The interpolated values of each map in its frame."""
    flat = interpolated(maps, FlatLayout.of(frames, tuple(maps.shape[1:]), maps.device))
    parts = flat.split([height * width for height, width in frames])
    return [
        part.reshape(width, height).T.numpy() for part, (height, width) in zip(parts, frames, strict=True)
    ]


@settings(deadline=None)
@given(frames_of_maps, map_sizes, st.integers(0, 10_000))
def test_maps_of_many_frames_are_interpolated_as_each_alone(frames, size, seed):
    maps = random_maps(len(frames), size, seed)
    for one, frame, values in zip(maps, frames, values_of_maps(maps, frames), strict=True):
        np.testing.assert_allclose(values, upsample_grid(one, *frame), rtol=0, atol=1e-6)
        if one.min() == one.max():
            assert (values == float(one[0, 0])).all()


@settings(deadline=None)
@given(frames_of_maps, map_sizes, st.integers(0, 10_000), st.integers(1, 2000), st.floats(0, 1))
def test_the_changes_of_a_cut_are_its_encoding_to_the_last_bit(frames, size, seed, chunk_pixels, value):
    maps = random_maps(len(frames), size, seed)
    cut = cut_maps(maps, frames, MaskRule("fixed", value), None, max_chunk_pixels=chunk_pixels)
    expected = [encode_rle((values > np.float32(value))[None])[0] for values in values_of_maps(maps, frames)]
    received = [encode_changes(runs.mask, *frame) for runs, frame in zip(cut.runs(), frames, strict=True)]
    assert received == expected


@settings(deadline=None)
@given(frames_of_maps, map_sizes, st.integers(0, 10_000), st.integers(1, 2000), rules, normalisations)
def test_masks_agree_with_those_cut_on_the_cpu_but_for_pixels_on_a_threshold(
    frames, size, seed, chunk_pixels, rule, normalisation
):
    maps = random_maps(len(frames), size, seed)
    cut = cut_maps(maps, frames, rule, normalisation, max_chunk_pixels=chunk_pixels)
    for one, frame, masks, (low, high) in zip(
        maps, frames, decoded(cut, frames), cut.thresholds.tolist(), strict=True
    ):
        pixels = upsample_grid(one, *frame)
        if normalisation == "upsampled" and pixels.max() - pixels.min() <= 1e-5 * one.max():
            continue  # a frame so small that its pixels differ by rounding errors, which are stretched to 1
        stack = HeatmapStack(one.numpy()[None], *frame, normalisation)
        expected = independent_masks(stack, rule)
        if "otsu" in (rule.rule, rule.band_center) and abs(high - expected.thresholds[0]) > 1e-5:
            continue  # a rounding error may move a pixel to the next bin
        assert high == pytest.approx(expected.thresholds[0], abs=1e-6)
        heat = heatmap_columns(one.numpy(), *frame, normalisation).T
        is_near = (np.abs(heat - low) < 1e-5) | (np.abs(heat - high) < 1e-5)
        rles = [expected.rles, *([expected.ignores] if rule.rule == "band" else [])]
        for mask, (rle,) in zip(masks, rles, strict=True):
            assert not ((mask != decode_rle(rle)) & ~is_near).any()


def test_a_constant_map_has_no_foreground_and_a_map_above_the_threshold_nothing_else():
    maps = torch.stack([torch.zeros(3, 4), torch.full((3, 4), 0.7), torch.ones(3, 4)])
    frames = [(5, 6), (7, 4), (1, 1)]
    cut = cut_maps(maps, frames, MaskRule("fixed", 0.5), None)
    assert [mask.mean() for (mask,) in decoded(cut, frames)] == [0, 1, 1]
    cut = cut_maps(maps, frames, MaskRule("otsu"), "upsampled")
    assert [mask.any() for (mask,) in decoded(cut, frames)] == [False] * 3


@pytest.mark.parametrize("rule", RULES_ON_DEVICE)
def test_a_map_that_is_not_finite_spoils_no_other_and_has_no_threshold(rule):
    maps = random_maps(4, (3, 4), 1)
    spoilt = maps.clone()
    spoilt[1, 0, 0], spoilt[2] = torch.nan, torch.inf
    frames = [(9, 8)] * 4
    expected = decoded(cut_maps(maps, frames, MaskRule(rule), "upsampled"), frames)
    cut = cut_maps(spoilt, frames, MaskRule(rule), "upsampled")
    masks = decoded(cut, frames)
    for number in (0, 3):
        np.testing.assert_array_equal(masks[number], expected[number])
    assert cut.thresholds.isnan().any(dim=1).tolist() == [False, True, True, False]


def test_no_maps_have_no_masks():
    cut = cut_maps(torch.zeros(0, 3, 4), [], MaskRule("band"), "upsampled")
    assert cut.runs() == []


def test_a_wide_and_flat_frame_takes_its_columns_of_a_chunk():
    assert cost_pixels((1, 1000), 14) == 15_000
    assert cost_pixels((300, 400), 14) == 120_000


class Launches(TorchDispatchMode):
    """Counts operations that compute, and those for which the host waits."""

    def __init__(self):
        super().__init__()
        self.computing = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.computing += not (func.is_view or name in ("empty", "_unsafe_view", "detach", "new_empty"))
        self.waits += name in ("nonzero", "_local_scalar_dense", "masked_select", "bincount", "item")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("rule", "most"),
    [(MaskRule("fixed"), 60), (MaskRule("band"), 75), (MaskRule("otsu"), 110)],
    ids=["fixed", "band", "otsu"],
)
@pytest.mark.parametrize("normalisation", ["upsampled", None])
def test_the_number_of_operations_does_not_grow_with_the_batch_and_the_host_waits_once(
    rule, most, normalisation
):
    counted = []
    for count in (3, 9):
        maps, frames = random_maps(count, (5, 6), 0), [(20 + number, 30) for number in range(count)]
        with Launches() as launches:
            cut_maps(maps, frames, rule, normalisation)
        counted.append((launches.computing, launches.waits))
    assert counted[0] == counted[1]
    operations, waits = counted[0]
    assert operations <= most
    assert waits == 1
