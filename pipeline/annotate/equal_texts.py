"""Texts whose embeddings are equal but for rounding: wherever texts are chosen, they count as one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional as F

# Distance of two unit rows up to which they are equal. A text's neighbours in its batch, and another
# processor, move its row by up to 1.3e-6 in float32, 1.8e-3 in float16 and 1.3e-2 in bfloat16; texts that a
# trained tower tells apart lie hundreds of times as far from each other in float32, ten times in bfloat16.
EQUAL_WITHIN = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
EQUAL_WITHIN_FLOAT32 = 1e-4
ROWS_AT_ONCE = 256

# row of a text: the rows of the others that are equal to it
EqualRows = Mapping[int, frozenset[int]]


def equal_within(precision: torch.dtype) -> float:
    """Distance of two unit rows up to which they are equal, for a text tower of a precision."""
    return EQUAL_WITHIN.get(precision, EQUAL_WITHIN_FLOAT32)


def equal_rows(unit_rows: torch.Tensor, within: float) -> EqualRows:
    """Find the rows that are equal but for rounding.

    Args:
        unit_rows: embeddings, [texts, embed_dim].
        within: largest distance of equal rows.

    Returns:
        Nothing for a row that is equal to no other. Whether two rows are equal depends on these two alone.
    """
    # in float64, where the distance of two rows follows from their product to 1e-8
    rows = F.normalize(unit_rows.double(), dim=1)
    others: dict[int, set[int]] = {}
    for start in range(0, len(rows), ROWS_AT_ONCE):
        squared_distances = 2 - 2 * rows[start : start + ROWS_AT_ONCE] @ rows[start:].T
        pairs = (squared_distances <= within**2).triu(diagonal=1).nonzero() + start
        for first, second in pairs.tolist():
            others.setdefault(first, set()).add(second)
            others.setdefault(second, set()).add(first)
    return {row: frozenset(equal) for row, equal in others.items()}


def first_of_equal(rows: np.ndarray, equal: EqualRows) -> np.ndarray:
    """For each text of a list, the row of the first text in the list that is equal to it; often its own.

    Args:
        rows: of the texts, int64 [texts].
        equal: rows that are equal to each other.
    """
    position_of: dict[int, int] = {}
    firsts = []
    for position, row in enumerate(rows.tolist()):
        earlier = min(
            (position_of[other] for other in equal.get(row, ()) if other in position_of), default=None
        )
        firsts.append(row if earlier is None else int(rows[earlier]))
        if earlier is None:
            position_of.setdefault(row, position)
    return np.array(firsts, np.int64)


def without_equals(rows: np.ndarray, taken: np.ndarray, equal: EqualRows) -> np.ndarray:
    """Leave out the rows that are, or are equal to, one of those taken."""
    if not equal:
        return rows[~np.isin(rows, taken)]
    barred = set(taken.tolist())
    barred |= {other for row in taken.tolist() for other in equal.get(row, ())}
    return rows[~np.isin(rows, list(barred))]
