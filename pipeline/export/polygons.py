"""Polygons of masks: outlines of their parts, with holes and parts connected by seams without area."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from contourpy import FillType, contour_generator
from jaxtyping import Bool, Float
from scipy.spatial import KDTree

# Along the edges between pixels: the centre of a pixel decides whether it is inside, as in pycocotools.
AT_EDGES = 0.5
# Through the centres of the outermost pixels: OpenCV fills a polygon with the pixels that it runs through.
AT_CENTRES = 0.99
# each costs a search tree of all points
MOST_JOINED_SINGLY = 100
_COLLINEAR = 1e-9

Polygon = Float[np.ndarray, "points xy"]
Mask = Bool[np.ndarray, "height width"]


def part_polygons(mask: Mask, level: float = AT_EDGES) -> list[Polygon]:
    """Return a closed polygon for each part of a mask, the last point unlike the first one.

    Holes are cut open: the polygon runs along a seam to the hole, around it, and back along the seam. Under
    the even-odd rule, and under that of non-zero winding, what it encloses is the part without the hole.

    Args:
        mask: the pixels.
        level: `AT_EDGES` or `AT_CENTRES`: where the outline runs.

    Returns:
        Points x, y in pixels from the left and upper edge of the image, so that the centre of the first
        pixel is 0.5, 0.5; none for an empty mask.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return []
    top, left = rows[0], columns[0]
    framed = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1).astype(np.float64)
    found = contour_generator(z=framed, fill_type=FillType.OuterOffset).filled(level, 2.0)
    first_centre = (left - 0.5, top - 0.5)
    polygons = []
    for points, offsets in zip(*found, strict=True):
        rings = [_corners(points[start : end - 1] + first_centre) for start, end in pairwise(offsets)]
        polygons.append(_with_seams(rings[0], rings[1:]))
    return polygons


def joined_polygon(polygons: Sequence[Polygon]) -> Polygon:
    """Return one polygon that encloses what several do: short seams connect the others to the largest one."""
    largest = max(range(len(polygons)), key=lambda index: _area(polygons[index]))
    joined, others = polygons[largest], [*polygons[:largest], *polygons[largest + 1 :]]
    tree = KDTree(joined)
    others.sort(key=lambda polygon: float(tree.query(polygon)[0].min()))
    # from part to part, the nearest first: seams across the background cover pixels when they are filled
    for polygon in others[:MOST_JOINED_SINGLY]:
        joined = _with_seams(joined, [polygon])
    return _with_seams(joined, others[MOST_JOINED_SINGLY:])


def iou(first: Mask, second: Mask) -> float:
    """Return the intersection over union of two masks; 1 if both are empty."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def _corners(ring: Polygon) -> Polygon:
    """Return a ring without the points in the middle of a straight line."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    corners: Polygon = ring[np.abs(turns) > _COLLINEAR]
    return corners


def _with_seams(base: Polygon, rings: Sequence[Polygon]) -> Polygon:
    """Insert rings into a polygon, each at the two points of both that are nearest to each other."""
    if not rings:
        return base
    tree = KDTree(base)
    inserted: dict[int, list[Polygon]] = defaultdict(list)
    for ring in rings:
        distances, places = tree.query(ring)
        start = int(np.argmin(distances))
        inserted[int(places[start])].append(np.concatenate([ring[start:], ring[: start + 1]]))
    pieces, position = [], 0
    for place in sorted(inserted):
        pieces.append(base[position : place + 1])
        for ring in inserted[place]:
            pieces += [ring, base[place : place + 1]]
        position = place + 1
    return np.concatenate([*pieces, base[position:]])


def _area(ring: Polygon) -> float:
    x, y = ring.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
