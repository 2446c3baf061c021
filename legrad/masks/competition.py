"""Convert heat maps to one label per pixel: prompts compete with each other and with background texts."""

import itertools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int16
from torch import Tensor

from legrad.heatmaps import first_of_equal_maps
from legrad.masks.cleaning import NO_CLEANING, Cleaning, clean_masks
from legrad.masks.grids import HeatmapStack, ImageMasks, image_masks
from legrad.masks.rle import Rle, encode_rle
from legrad.masks.thresholds import MaskRule, cuts_of

NOBODY = -1


@dataclass(frozen=True)
class Contestants:
    """Texts that compete for the pixels of an image.

    Attributes:
        heatmaps: one heat map for each text.
        peaks: maximum of each text's raw relevance grid.
    """

    heatmaps: HeatmapStack
    peaks: Float[Tensor, " texts"]


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
    highest_peak = prompts.peaks.amax() if len(prompts.peaks) else prompts.peaks.new_tensor(1.0)
    won = _winners(prompts, highest_peak)
    challenger = _winners(backgrounds, highest_peak)
    level_low, level_high = cuts_of(won.heatmap[None], rule)
    is_prompts = won.strength > challenger.strength
    winner = torch.where(is_prompts & (won.heatmap > level_high), won.winner, NOBODY)
    winner = _cleaned(winner, len(prompts.heatmaps), cleaning)
    rles = [rle for prompt in range(len(prompts.heatmaps)) for rle in encode_rle((winner == prompt)[None])]
    ignores: list[Rle] = []
    if rule.rule == "band":
        ignores = encode_rle((is_prompts & (won.heatmap > level_low) & (winner == NOBODY))[None])
    return image_masks(rles, ignores=ignores)


@dataclass(frozen=True)
class _Winners:
    """Greatest strength at each pixel, index of its text, and that text's heat map; zeros without texts."""

    strength: Float[Tensor, "height width"]
    heatmap: Float[Tensor, "height width"]
    winner: Int16[Tensor, "height width"]


def _winners(texts: Contestants, highest_peak: Float[Tensor, ""]) -> _Winners:
    # Equal texts differ only by rounding: without this, the winner would alternate between them.
    firsts = first_of_equal_maps(texts.heatmaps.maps)
    peaks = texts.peaks.tolist()
    live = [number for number, first in enumerate(firsts) if first == number or peaks[first] != peaks[number]]
    stack = replace(texts.heatmaps, maps=texts.heatmaps.maps[live])
    # Relevance is not negative, but half precision and merging may round below zero.
    weights = (texts.peaks[live].clamp(min=0) / torch.where(highest_peak > 0, highest_peak, 1)).sqrt()
    # Stored column by column, as the maps are.
    best = stack.maps.new_zeros(stack.width, stack.height, dtype=torch.float32).mT
    of_best, winner = torch.zeros_like(best), torch.full_like(best, NOBODY, dtype=torch.int16)
    # A loop over maps, as argmax over the first dimension takes ten times as long.
    heatmaps = itertools.chain.from_iterable(stack.chunks())
    for index, heatmap, weight in zip(live, heatmaps, weights, strict=True):
        strength = heatmap * weight
        is_stronger = strength > best
        winner.masked_fill_(is_stronger, index)
        best = torch.where(is_stronger, strength, best)
        of_best = torch.where(is_stronger, heatmap, of_best)
    return _Winners(best, of_best, winner)


def _cleaned(
    winner: Int16[Tensor, "height width"], prompts: int, cleaning: Cleaning
) -> Int16[Tensor, "height width"]:
    if not cleaning.changes_masks:
        return winner
    tidy = torch.full_like(winner, NOBODY)
    for prompt in range(prompts):
        was_won: Bool[Tensor, "height width"] = winner == prompt
        mask = clean_masks(was_won[None], cleaning)[0]
        free = (winner == NOBODY) & (tidy == NOBODY)
        tidy[mask & (was_won | free)] = prompt
    return tidy
