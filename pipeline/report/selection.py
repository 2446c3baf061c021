"""Choose rows for the gallery: a random half, extreme scores, and some rows of each status."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, zip_longest

import numpy as np
from jaxtyping import Bool, Float, Int

from pipeline.output.schema import OK
from pipeline.report.scores import ScoredRows

RANDOM_SHARE = 0.5


def choose_rows(
    scores: ScoredRows, may_be_shown: Bool[np.ndarray, " rows"], count: int, generator: np.random.Generator
) -> tuple[list[int], set[int]]:
    """Choose rows for the gallery.

    Half are chosen at random, rejected ones included. The rest are, in turn, the highest and the lowest
    similarity and peak, the largest and the smallest masks, and rows of each status except `ok`.

    Args:
        scores: the sampled rows.
        may_be_shown: rows to choose from.
        count: maximum number of rows.
        generator: of the random half.

    Returns:
        The rows, random ones first; and the set of the random ones.
    """
    candidates = np.flatnonzero(may_be_shown)
    drawn = [int(row) for row in generator.permutation(candidates)]
    at_random = dict.fromkeys(drawn[: max(1, round(count * RANDOM_SHARE))] if count else ())
    by_turns = chain.from_iterable(zip_longest(*_extremes(scores, candidates)))
    rest = (int(row) for row in chain(by_turns, drawn) if row is not None and int(row) not in at_random)
    extremes = list(dict.fromkeys(rest))[: max(0, count - len(at_random))]
    return [*at_random, *extremes], set(at_random)


def _extremes(scores: ScoredRows, candidates: Int[np.ndarray, " rows"]) -> Iterator[Int[np.ndarray, " rows"]]:
    for values in (scores.similarity, scores.peak, scores.area_share):
        order = _ascending(values, candidates)
        yield order[::-1]
        yield order
    for status in sorted(set(scores.status[candidates]) - {OK}):
        yield candidates[scores.status[candidates] == status]


def _ascending(
    values: Float[np.ndarray, " rows"], candidates: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " some"]:
    finite = candidates[np.isfinite(values[candidates])]
    ascending: np.ndarray = finite[np.argsort(values[finite], kind="stable")]
    return ascending
