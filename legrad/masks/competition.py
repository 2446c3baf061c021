"""Convert heat maps to one label per pixel: prompts compete with each other and with background texts."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int16

from legrad.masks.cleaning import NO_CLEANING, Cleaning, clean_mask
from legrad.masks.grids import HeatmapStack, ImageMasks, image_masks
from legrad.masks.rle import Rle, encode_columns
from legrad.masks.thresholds import MaskRule, cuts_of

NOBODY = np.int16(-1)


@dataclass(frozen=True)
class Contestants:
    """Texts that compete for the pixels of an image.

    Attributes:
        heatmaps: one heat map for each text.
        peaks: maximum of each text's raw relevance grid.
    """

    heatmaps: HeatmapStack
    peaks: Float32[np.ndarray, " texts"]


def competing_masks(
    prompts: Contestants, backgrounds: Contestants, rule: MaskRule, cleaning: Cleaning = NO_CLEANING
) -> ImageMasks:
    """Assign each pixel to the prompt that is strongest there, or to the background.

    The strength of a prompt is its heat map times sqrt(its raw peak / the highest raw peak of all prompts). A
    pixel is background if the heat map of the strongest prompt does not exceed the threshold, or if a
    background text is stronger. The rule finds this threshold on the map of the winners' heat maps. Among
    equal prompts the first one wins. With rule `band`, pixels between the two thresholds are ignored.

    Every heat map reaches 1, so by heat maps only, a prompt that is not in the image would win as often as
    one that is; by raw grids, one strong prompt would take the objects of the others. The square root is a
    compromise: on the demo scenes it is as good as heat maps only if every prompt is in the image, and 2 to
    3 points of mIoU better if prompts are chosen by similarity. The threshold applies to the heat map, not
    to the strength, so `value`, `low` and `high` mean the same as for independent masks.

    Args:
        prompts: texts that get masks.
        backgrounds: texts that compete but get no mask, in the same frame; may be empty.
        rule: finds the threshold between foreground and background.
        cleaning: cleaning of the masks; they stay disjoint, since only background is filled.

    Returns:
        Disjoint masks without thresholds; with rule `band` one ignore mask for the image.
    """
    won = winners_of(prompts, backgrounds)
    level_low, level_high = cuts_of(won.heat, rule)
    is_inside = won.heat > np.float32(level_high)
    winner = _cleaned(np.where(is_inside, won.winner, NOBODY), len(prompts.heatmaps), cleaning)
    rles = [encode_columns(winner == prompt) for prompt in range(len(prompts.heatmaps))]
    ignores: list[Rle] = []
    if rule.rule == "band":
        is_between = (won.winner != NOBODY) & (won.heat > np.float32(level_low)) & (winner == NOBODY)
        ignores = [encode_columns(is_between)]
    return image_masks(rles, ignores=ignores)


@dataclass(frozen=True)
class Winners:
    """The strongest prompt of each pixel, before any threshold.

    Attributes:
        heat: the heat map of the strongest prompt; zeros without prompts.
        winner: index of the strongest prompt; -1 where a background text is at least as strong.
    """

    heat: Float32[np.ndarray, "width height"]
    winner: Int16[np.ndarray, "width height"]


def winners_of(prompts: Contestants, backgrounds: Contestants) -> Winners:
    """Find the strongest prompt of each pixel; see `competing_masks`.

    Args:
        prompts: texts that get masks.
        backgrounds: texts that compete but get no mask, in the same frame; may be empty.
    """
    highest_peak = float(prompts.peaks.max(initial=0))
    strongest = _strongest(prompts, highest_peak)
    challenger = _strongest(backgrounds, highest_peak)
    is_prompts = strongest.strength > challenger.strength
    return Winners(strongest.heat, np.where(is_prompts, strongest.text, NOBODY))


@dataclass(frozen=True)
class _Strongest:
    """Greatest strength at each pixel, index of its text, and that text's heat map; zeros without texts."""

    strength: Float32[np.ndarray, "width height"]
    heat: Float32[np.ndarray, "width height"]
    text: Int16[np.ndarray, "width height"]


def _strongest(texts: Contestants, highest_peak: float) -> _Strongest:
    import cv2

    live = _distinct(texts)
    stack = replace(texts.heatmaps, maps=texts.heatmaps.maps[live])
    # Relevance is not negative, but half precision and merging may round below zero.
    weights = np.sqrt(texts.peaks[live].clip(min=0) / np.float32(highest_peak if highest_peak > 0 else 1))
    frame = (stack.width, stack.height)
    best, of_best = np.zeros(frame, np.float32), np.zeros(frame, np.float32)
    strongest = np.full(frame, NOBODY, np.int16)
    # A loop over maps, as argmax over the first dimension takes ten times as long.
    for index, heat, weight in zip(live, stack.columns(), weights, strict=True):
        strength = heat * weight
        is_stronger = (strength > best).view(np.uint8)
        # OpenCV copies where a mask is set seven times as fast as NumPy.
        cv2.copyTo(strength, is_stronger, best)
        cv2.copyTo(heat, is_stronger, of_best)
        cv2.copyTo(np.full(frame, index, np.int16), is_stronger, strongest)
    return _Strongest(best, of_best, strongest)


def _distinct(texts: Contestants) -> list[int]:
    """Return the positions of the texts but those that equal an earlier one in map and peak.

    Equal texts would win by rounding errors only, and the winner alternate between them.
    """
    if len(texts.peaks) < 2:
        return list(range(len(texts.peaks)))
    first: dict[tuple[bytes, float], int] = {}
    maps_and_peaks = zip(texts.heatmaps.maps, texts.peaks.tolist(), strict=True)
    keys = [(heat.tobytes(), peak) for heat, peak in maps_and_peaks]
    return [position for position, key in enumerate(keys) if first.setdefault(key, position) == position]


def _cleaned(
    winner: Int16[np.ndarray, "width height"], prompts: int, cleaning: Cleaning
) -> Int16[np.ndarray, "width height"]:
    if not cleaning.changes_masks:
        return winner
    tidy = np.full_like(winner, NOBODY)
    for prompt in range(prompts):
        was_won = winner == prompt
        mask = clean_mask(was_won, cleaning)
        free = (winner == NOBODY) & (tidy == NOBODY)
        tidy[mask & (was_won | free)] = prompt
    return tidy
