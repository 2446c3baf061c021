"""Masks of competing prompts, against a pixel-by-pixel implementation in plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from legrad.heatmaps import heatmaps_of
from legrad.masks.cleaning import Cleaning
from legrad.masks.competition import Contestants, competing_masks
from legrad.masks.grids import HeatmapStack, independent_masks
from legrad.masks.rle import decode_rle
from legrad.masks.thresholds import MaskRule, otsu_threshold

FRAME = (17, 13)
NO_MAPS = torch.zeros(0, 4, 5)
rules = st.sampled_from(
    [MaskRule("fixed", 0.4), MaskRule("otsu"), MaskRule("quantile"), MaskRule("band", low=0.3, high=0.6)]
)


def random_grids(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, 1, 1, generator=generator) + 0.1
    return torch.rand(count, 4, 5, generator=generator) ** 2 * scale


def contestants(grids: torch.Tensor) -> Contestants:
    peaks = grids.amax((1, 2)) if len(grids) else torch.zeros(0)
    return Contestants(HeatmapStack(grids.numpy(), *FRAME), peaks.numpy())


def strengths_of(grids: torch.Tensor, highest_peak: float) -> list[np.ndarray]:
    return [
        heatmaps_of(grid, *FRAME, "upsampled").numpy() * np.sqrt(float(grid.max()) / highest_peak)
        for grid in grids
    ]


def decoded(rles) -> np.ndarray:
    return np.array([decode_rle(rle) for rle in rles]).reshape(len(rles), *FRAME)


@given(st.integers(1, 4), st.integers(0, 2), st.integers(0, 10_000), rules)
def test_each_pixel_goes_to_the_strongest(prompts, backgrounds, seed, rule):
    grids, others = random_grids(prompts, seed), random_grids(backgrounds, seed + 1)
    made = competing_masks(contestants(grids), contestants(others), rule)
    highest = float(grids.max())
    own, theirs = strengths_of(grids, highest), strengths_of(others, highest)
    plain = heatmaps_of(grids, *FRAME, "upsampled").numpy()
    heat = np.take_along_axis(plain, np.argmax(own, axis=0)[None], axis=0)[0]
    low, high = {
        "fixed": (0.4, 0.4),
        "otsu": (float(otsu_threshold(torch.from_numpy(heat))),) * 2,
        "quantile": (np.quantile(heat, 0.8, method="inverted_cdf"),) * 2,
        "band": (0.3, 0.6),
    }[rule.rule]
    masks = decoded(made.rles)
    ignored = decoded(made.ignores).any(axis=0)
    for y, x in np.ndindex(*FRAME):
        here = [float(each[y, x]) for each in own]
        rivals = [float(each[y, x]) for each in theirs] + sorted(here)[:-1]
        margins = [max(here) - rival for rival in rivals] + [heat[y, x] - low, heat[y, x] - high]
        if min(map(abs, margins)) < 1e-5:
            continue  # rounding may decide
        beats_texts = all(max(here) > each[y, x] for each in theirs)
        winner = int(np.argmax(here)) if beats_texts and heat[y, x] > high else None
        assert np.flatnonzero(masks[:, y, x]).tolist() == ([] if winner is None else [winner])
        if len(made.ignores):
            assert ignored[y, x] == (beats_texts and low < heat[y, x] < high)


@given(st.integers(0, 5), st.integers(0, 10_000), rules, st.sampled_from([0.0, 0.05, 0.3]))
def test_masks_and_the_ignored_never_meet_however_they_are_cleaned(prompts, seed, rule, share):
    cleaning = Cleaning(min_component=share, max_hole=share)
    made = competing_masks(contestants(random_grids(prompts, seed)), contestants(NO_MAPS), rule, cleaning)
    together = np.concatenate([decoded(made.rles), decoded(made.ignores)]).sum(axis=0)
    assert together.max(initial=0) <= 1
    assert made.areas.tolist() == [int(mask.sum()) for mask in decoded(made.rles)]
    assert made.thresholds is None
    assert len(made.ignores) == (rule.rule == "band")


def test_a_prompt_alone_has_the_mask_that_it_has_independently():
    grids = random_grids(1, 3)
    for rule in (MaskRule("otsu"), MaskRule("band")):
        alone = independent_masks(HeatmapStack(grids.numpy(), *FRAME), rule)
        competing = competing_masks(contestants(grids), contestants(NO_MAPS), rule)
        assert (competing.rles, list(competing.ignores)) == (alone.rles, list(alone.ignores))


def test_of_two_equal_prompts_the_first_one_wins():
    grids = random_grids(1, 5).repeat(2, 1, 1)
    masks = decoded(competing_masks(contestants(grids), contestants(NO_MAPS), MaskRule()).rles)
    assert masks[0].any()
    assert not masks[1].any()


def test_a_background_text_takes_pixels_and_gets_no_mask():
    grid = torch.zeros(1, 4, 5)
    grid[0, :, :3] = 1.0
    background = torch.zeros(1, 4, 5)
    background[0, :2] = 2.0
    rule = MaskRule("fixed", 0.5)
    without = competing_masks(contestants(grid), contestants(NO_MAPS), rule)
    with_it = competing_masks(contestants(grid), contestants(background), rule)
    assert len(with_it.rles) == 1
    assert 0 < with_it.areas[0] < without.areas[0]
    assert not decoded(with_it.rles)[0, :6].any()


def test_a_hole_that_another_prompt_fills_stays_the_others():
    grids = torch.zeros(2, 9, 9)
    grids[0, 1:8, 1:8] = 1.0
    grids[0, 4, 4], grids[1, 4, 4] = 0.0, 1.0
    frame = {"heatmaps": HeatmapStack(grids.numpy(), 9, 9), "peaks": np.ones(2, np.float32)}
    none = Contestants(HeatmapStack(np.zeros((0, 9, 9), np.float32), 9, 9), np.zeros(0, np.float32))
    made = competing_masks(Contestants(**frame), none, MaskRule(), Cleaning(max_hole=1.0))
    assert made.areas.tolist() == [48, 1]


@pytest.mark.parametrize("rule", [MaskRule("otsu"), MaskRule("band")])
def test_where_nothing_is_relevant_nobody_wins(rule):
    made = competing_masks(contestants(torch.zeros(2, 4, 5)), contestants(NO_MAPS), rule)
    assert made.areas.tolist() == [0, 0]


def test_of_equal_texts_the_first_wins_every_pixel_at_any_position_in_the_list():
    grids = random_grids(3, 5)
    once = competing_masks(contestants(grids), contestants(NO_MAPS), MaskRule("fixed", 0.4))
    again = torch.cat([grids[[0, 0, 1]], grids, grids[[0]]])
    made = competing_masks(contestants(again), contestants(again[[2, 2]] * 0.1), MaskRule("fixed", 0.4))
    masks = decoded(made.rles)
    assert (masks[[0, 2, 5]] == decoded(once.rles)).all()
    assert not masks[[1, 3, 4, 6]].any()


def test_equal_maps_of_another_peak_are_not_equal_texts():
    heatmap = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1)
    stack = HeatmapStack(heatmap.numpy(), *FRAME, normalisation=None)
    peaks = np.array([1.0, 4.0], np.float32)
    made = competing_masks(Contestants(stack, peaks), contestants(NO_MAPS), MaskRule("fixed", 0.4))
    assert made.areas[0] == 0 < made.areas[1]
