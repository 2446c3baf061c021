"""From heat maps to one label a pixel: the prompts of an image and its background compete."""

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
        heatmaps: of each text.
        peaks: maximum of each text's raw map.
    """

    heatmaps: HeatmapStack
    peaks: Float[Tensor, " texts"]


def competing_masks(
    prompts: Contestants, backgrounds: Contestants, rule: MaskRule, cleaning: Cleaning = NO_CLEANING
) -> ImageMasks:
    """Give each pixel to the prompt that is strongest there, unless it is background.

    A prompt's strength is its heat map, weighted by the square root of its raw peak's share in the highest
    peak of all prompts. A pixel is background where the winner's own heat map does not exceed the cut that
    the rule finds for the map of all winners, or where a background text is stronger. Of equal prompts the
    first one wins. With rule `band` a winner between the two cuts is ignored.

    Heat maps alone, each stretched to 1, let a prompt that is not in the image win as often as one that is;
    raw maps let one strong prompt take the others' objects. The square root lies between: on the demo's
    scenes as good as heat maps alone where each prompt is in the image, and 2 to 3 points of mIoU better
    where prompts are chosen by similarity. Cutting the heat map itself, not the strength, keeps `value`,
    `low` and `high` what they are for prompts by themselves.

    Args:
        prompts: what gets masks.
        backgrounds: what competes and gets no mask, in the same frame; there may be none.
        rule: finds the background's level.
        cleaning: what is done to the masks; they stay disjoint, since only background is filled.

    Returns:
        Disjoint masks without thresholds; with rule `band` one ignore mask.
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


def _weights(peaks: Float[Tensor, " maps"], highest: Float[Tensor, ""]) -> Float[Tensor, " maps"]:
    # relevance is not negative, but half precision or merging may round to less than zero
    return (peaks.clamp(min=0) / torch.where(highest > 0, highest, 1)).sqrt()


@dataclass(frozen=True)
class _Winners:
    """The greatest strength on each pixel, whose it is, and that one's heat map there; of no maps: zeros."""

    strength: Float[Tensor, "height width"]
    heatmap: Float[Tensor, "height width"]
    winner: Int16[Tensor, "height width"]


def _winners(texts: Contestants, highest_peak: Float[Tensor, ""]) -> _Winners:
    # equal texts have equal strengths but for rounding: without this they would win by turns
    firsts = first_of_equal_maps(texts.heatmaps.maps)
    peaks = texts.peaks.tolist()
    live = [number for number, first in enumerate(firsts) if first == number or peaks[first] != peaks[number]]
    stack = replace(texts.heatmaps, maps=texts.heatmaps.maps[live])
    weights = _weights(texts.peaks[live], highest_peak)
    # column by column, as maps are stored
    best = stack.maps.new_zeros(stack.width, stack.height, dtype=torch.float32).mT
    of_best, winner = torch.zeros_like(best), torch.full_like(best, NOBODY, dtype=torch.int16)
    # one after the other: argmax over the first dimension takes ten times as long
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
