"""How far two lists of annotation rows are apart that should be the same but for rounding."""

from dataclasses import dataclass

import numpy as np

from legrad.masks.rle import decode_rle

SAME_COLUMNS = (
    "key",
    "sample_index",
    "prompt_index",
    "prompt",
    "prompt_truncated",
    "class_id",
    "status",
    "image_height",
    "image_width",
)


@dataclass(frozen=True)
class Agreement:
    """The greatest differences between rows of the same sample and prompt.

    Attributes:
        rows: rows compared.
        other_rows: rows whose key, prompt or status differs, or that are on one side alone.
        similarity: absolute.
        peak: relative.
        threshold: absolute, in heat-map units.
        equal_masks: share of the pairs of masks that are equal.
        moved_pixels: most pixels of a mask, or ignore mask, on which two rows differ.
        smallest_iou: of two masks.
        beyond: masks with an IoU below .99 and more than two pixels of difference.
    """

    rows: int
    other_rows: int
    similarity: float
    peak: float
    threshold: float
    equal_masks: float
    moved_pixels: int
    smallest_iou: float
    beyond: int


def agreement(rows, expected):
    """Compare rows, in whatever order."""
    mine, theirs = by_place(rows), by_place(expected)
    pairs = [(mine[place], theirs[place]) for place in mine.keys() & theirs.keys()]
    same = [pair for pair in pairs if all(pair[0][column] == pair[1][column] for column in SAME_COLUMNS)]
    moved = [
        moved_pixels(row[column], other[column])
        for row, other in same
        for column in ("mask", "ignore")
        if row[column] is not None and other[column] is not None
    ]
    one_sided = [row for row, other in same if (row["ignore"] is None) != (other["ignore"] is None)]
    return Agreement(
        len(pairs),
        len(mine.keys() | theirs.keys()) - len(same) + len(one_sided),
        greatest(abs(row["similarity"] - other["similarity"]) for row, other in same),
        greatest(abs(row["peak"] - other["peak"]) / max(row["peak"], 1e-30) for row, other in same),
        greatest(
            abs(row["threshold"] - other["threshold"]) for row, other in same if row["threshold"] is not None
        ),
        float(np.mean([pixels == 0 for pixels, _ in moved])) if moved else 1.0,
        max((pixels for pixels, _ in moved), default=0),
        min((iou for _, iou in moved), default=1.0),
        sum(iou < 0.99 and pixels > 2 for pixels, iou in moved),
    )


def by_place(rows):
    """Rows by what is unique of them; a sample by its key, so that it may be in another shard."""
    found = {(row["key"], row["prompt_index"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def moved_pixels(rle, other):
    """How many pixels two masks differ on, and their IoU."""
    mask, expected = decode_rle(rle), decode_rle(other)
    moved, union = int((mask != expected).sum()), int((mask | expected).sum())
    return moved, 1 - moved / max(union, 1)


def greatest(values):
    """The greatest of differences, 0 of none."""
    return float(max(values, default=0.0))
