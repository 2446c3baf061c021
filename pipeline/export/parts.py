"""The parts of a row's mask that become annotations or objects of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from legrad.masks.cleaning import EIGHT_NEIGHBOURS
from pipeline.output.label_map import mask_at_size
from pipeline.output.schema import INSTANCES

Kind = Literal["stuff", "instances"]
Mask = Bool[np.ndarray, "height width"]

# name of a count
BELOW_MIN_AREA = "parts_below_min_area"


@dataclass(frozen=True)
class Parts:
    """Which parts of masks are taken.

    Attributes:
        kind: stuff: a mask is one part; instances: each element of the column `instances` is one, or each
            connected part of the mask where the job has not split masks.
        min_area: parts with fewer pixels are skipped.
    """

    kind: Kind
    min_area: int = 0

    def of(
        self, row: Mapping[str, Any], height: int, width: int, counts: Counter[str]
    ) -> Iterator[tuple[Mask, float]]:
        """Yield the parts of a row's mask, each with its score: the similarity, times the instance's own.

        Parts without a pixel are nothing. One is in memory at a time: a ragged mask has thousands.

        Args:
            row: an annotation row with a mask that has pixels.
            height: of the image, in pixels.
            width: of the image, in pixels.
            counts: takes `parts_below_min_area`.

        Raises:
            RleError: a mask is no run-length encoding of its size, or not of its image.
        """
        if self.kind == "instances" and row.get(INSTANCES) is not None:
            for instance in row[INSTANCES]:
                mask = mask_at_size(instance["mask"], height, width)
                if self._is_taken(int(mask.sum()), counts):
                    yield mask, row["similarity"] * float(instance["score"])
            return
        mask = mask_at_size(row["mask"], height, width)
        labels, count = ndimage.label(mask, EIGHT_NEIGHBOURS) if self.kind == "instances" else (mask, 1)
        areas = np.bincount(labels.ravel(), minlength=count + 1).tolist()
        for part in range(1, count + 1):
            if self._is_taken(areas[part], counts):
                yield labels == part, row["similarity"]

    def _is_taken(self, area: int, counts: Counter[str]) -> bool:
        if area and area < self.min_area:
            counts[BELOW_MIN_AREA] += 1
        return area > 0 and area >= self.min_area
