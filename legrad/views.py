"""Several views of one image, explained apart and merged into one map: mirrored, at other scales, in windows.

An image is resized to a few *canvases*: the whole image at the model's input size, at each scale, and, for
windows, closer. A *view* is what the model encodes at once: a whole canvas or a window of one, perhaps
mirrored. Windows lie on whole patches, so that their cells are cells of the canvas. Relevance stays raw until
the views are merged: what a view sees little of counts little.

    canvases -> views -> encode, relevance -> mean on each canvas -> mean over canvases on the reference grid
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from legrad.errors import InputError
from legrad.images import ImageTransform
from legrad.method.towers import Tower

Grid = tuple[int, int]  # cells down and across
MOST_SCALES = 8
LARGEST_FACTOR = 8.0
MOST_TILES = 256


@dataclass(frozen=True)
class Views:
    """Which views of an image are merged; as it stands, the whole image alone.

    Attributes:
        flip: every view also mirrored left to right.
        scales: the whole image at these multiples of the model's input size, each rounded to whole patches.
            The first one is the reference: the image's similarity is told there.
        tile: also windows of the model's input size over the image enlarged.
        tile_zoom: how many times larger than the model's input the image under the windows is; never larger
            than the image itself.
        tile_overlap: least share of a window that the next one repeats.
        max_tiles: most windows of an image; what would need more is seen from farther.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    tile: bool = False
    tile_zoom: float = 2.0
    tile_overlap: float = 0.25
    max_tiles: int = 16

    def __post_init__(self) -> None:
        """Raise an InputError where a value is out of range."""
        if not 1 <= len(self.scales) <= MOST_SCALES or len(set(self.scales)) < len(self.scales):
            raise InputError(f"scales: expected 1 to {MOST_SCALES} different factors, received {self.scales}")
        if not all(0 < scale <= LARGEST_FACTOR for scale in self.scales):
            raise InputError(
                f"scales: expected factors above 0, at most {LARGEST_FACTOR}, received {self.scales}"
            )
        if not 1 <= self.tile_zoom <= LARGEST_FACTOR:
            raise InputError(
                f"tile_zoom: expected a factor from 1 to {LARGEST_FACTOR}, received {self.tile_zoom}"
            )
        if not 0 <= self.tile_overlap < 1:
            raise InputError(f"tile_overlap: expected a share from 0, below 1, received {self.tile_overlap}")
        if not 1 <= self.max_tiles <= MOST_TILES:
            raise InputError(f"max_tiles: expected 1 to {MOST_TILES}, received {self.max_tiles}")


@dataclass(frozen=True)
class View:
    """One encode: a part of a canvas, in cells of the canvas.

    Attributes:
        canvas: which canvas.
        top: first row.
        left: first column.
        rows: how many.
        columns: how many.
        is_mirrored: seen mirrored left to right.
    """

    canvas: int
    top: int
    left: int
    rows: int
    columns: int
    is_mirrored: bool


def canvas_grids(
    views: Views, transform: ImageTransform, image_height: int, image_width: int
) -> tuple[Grid, ...]:
    """Give the grids of the canvases of an image: one for each scale, then the one under the windows.

    The last is left out where a single window would see the whole image.
    """
    patch = transform.patch_size
    grids = []
    for scale in views.scales:
        height, width = _scaled(transform, scale).input_size(image_height, image_width)
        grids.append((height // patch, width // patch))
    if views.tile:
        window = (transform.height // patch, transform.width // patch)
        tiled = _tiled_grid(views, window, image_height, image_width, patch)
        grids += [tiled] if tiled != window else []
    return tuple(grids)


def canvas_pixels(
    views: Views, transform: ImageTransform, image: Image.Image
) -> tuple[UInt8[np.ndarray, "height width 3"], ...]:
    """Resize an image of any mode to each of its canvases, as `ImageTransform.resize` does."""
    patch = transform.patch_size
    return tuple(
        transform.resize_to(image, rows * patch, columns * patch)
        for rows, columns in canvas_grids(views, transform, image.height, image.width)
    )


def canvas_bytes(views: Views, transform: ImageTransform) -> int:
    """Give the most bytes that the pixels of an image's canvases take, whatever its size."""
    scaled = (_scaled(transform, scale) for scale in views.scales)
    window = transform.height * transform.width
    pixels = sum(each.height * each.width for each in scaled) + views.tile * views.max_tiles * window
    return 3 * pixels


def views_of(views: Views, canvases: Sequence[Grid], window: Grid) -> tuple[View, ...]:
    """List the views of an image, first the whole image at the first scale.

    Args:
        views: which views are wanted.
        canvases: the image's, as `canvas_grids` gives them.
        window: cells of a window.
    """
    upright = [View(index, 0, 0, *grid, False) for index, grid in enumerate(canvases[: len(views.scales)])]
    for index, (rows, columns) in enumerate(canvases[len(views.scales) :], start=len(views.scales)):
        upright += [
            View(index, top, left, *window, False)
            for top in window_starts(rows, window[0], views.tile_overlap)
            for left in window_starts(columns, window[1], views.tile_overlap)
        ]
    mirrored = (False, True) if views.flip else (False,)
    return tuple(replace(view, is_mirrored=flag) for view in upright for flag in mirrored)


def window_starts(cells: int, window_cells: int, overlap: float) -> tuple[int, ...]:
    """Place windows along one axis: the first and the last flush with the borders, the others evenly between.

    Args:
        cells: of the axis, at least those of a window.
        window_cells: of a window.
        overlap: least share of a window that the next one repeats, from 0, below 1; windows move on by one
            cell at least.
    """
    spare = cells - window_cells
    moves = -(-spare // _longest_move(window_cells, overlap))
    return tuple(spare * move // moves for move in range(moves + 1)) if moves else (0,)


def reference_grid(canvases: Sequence[Grid]) -> Grid:
    """Give the grid on which an image's views are merged: that of its finest canvas."""
    return max(canvases, key=lambda grid: grid[0] * grid[1])


def resample_grids(
    grids: Float[Tensor, "*maps rows columns"], grid: Grid
) -> Float[Tensor, "*maps new_rows new_columns"]:
    """Resample maps that cover the same area, aligned by it: bilinear, antialiased where cells grow."""
    if tuple(grids.shape[-2:]) == grid:
        return grids
    if not grids.numel():
        return grids.new_zeros(*grids.shape[:-2], *grid)
    flat = grids.reshape(1, -1, *grids.shape[-2:])
    # Interpolating what stands above the minimum keeps a constant map constant to the last bit.
    lowest = flat.amin(dim=(-2, -1), keepdim=True)
    resampled = F.interpolate(flat - lowest, size=grid, mode="bilinear", antialias=True, align_corners=False)
    return resampled.add_(lowest).reshape(*grids.shape[:-2], *grid)


def merge_grids(
    canvases: Sequence[Grid],
    view_grids: Iterable[tuple[View, Float[Tensor, "maps _rows _columns"]]],
) -> Float[Tensor, "maps grid_rows grid_columns"]:
    """Merge raw maps of an image's views on its reference grid.

    Args:
        canvases: the image's.
        view_grids: each view and its maps, as the view was seen: a mirrored one's are mirrored back here.

    Returns:
        On every canvas the mean of the views that cover a cell, resampled to the reference grid; of that the
        mean over canvases.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    for view, grids in view_grids:
        upright = grids.flip(-1) if view.is_mirrored else grids
        if view.canvas not in sums:
            sums[view.canvas] = upright.new_zeros(len(upright), *canvases[view.canvas])
            counts[view.canvas] = upright.new_zeros(canvases[view.canvas])
        cells = (slice(view.top, view.top + view.rows), slice(view.left, view.left + view.columns))
        sums[view.canvas][:, cells[0], cells[1]] += upright
        counts[view.canvas][cells] += 1
    grid = reference_grid([canvases[index] for index in sums])
    means = [resample_grids(sums[index] / counts[index], grid) for index in sums]
    return torch.stack(means).mean(dim=0)


def check_views(views: Views, tower: Tower) -> Views:
    """Return the views, or raise an InputError where the tower cannot take one."""
    if not tower.takes_any_grid and views.scales != (1.0,):
        raise InputError(
            f"scales: the positions of this tower ({tower.family}) are bound to one size, "
            f"received {views.scales}"
        )
    return views


def _scaled(transform: ImageTransform, scale: float) -> ImageTransform:
    patch = transform.patch_size
    height, width = (
        max(1, round(side * scale / patch)) * patch for side in (transform.height, transform.width)
    )
    return replace(transform, height=height, width=width)


def _tiled_grid(views: Views, window: Grid, image_height: int, image_width: int, patch: int) -> Grid:
    """Give the grid of the canvas under the windows: the finest of at most `max_tiles` of them.

    Its shorter side, measured in windows, is `tile_zoom` windows long, or as many as the image's own pixels
    fill; at least one. An image so long that windows of its shorter side are too many is squeezed.
    """
    sides = (image_height, image_width)
    short, long = (0, 1) if window[0] * image_width >= window[1] * image_height else (1, 0)
    finest = max(1.0, min(views.tile_zoom, sides[short] / (window[short] * patch)))
    farthest = window[long] + (views.max_tiles - 1) * _longest_move(window[long], views.tile_overlap)
    for cells in range(round(window[short] * finest), window[short] - 1, -1):
        in_proportion = round(cells * sides[long] / sides[short])
        grid = [cells, cells]
        grid[long] = min(max(in_proportion, window[long]), farthest)
        tiled = (grid[0], grid[1])
        if _count_windows(tiled, window, views.tile_overlap) <= views.max_tiles:
            return tiled
    return window


def _count_windows(grid: Grid, window: Grid, overlap: float) -> int:
    return math.prod(len(window_starts(*axis, overlap)) for axis in zip(grid, window, strict=True))


def _longest_move(window_cells: int, overlap: float) -> int:
    # the small number: 12 cells of which a quarter is repeated move by 9, whatever 12 * 0.75 rounds to
    return max(1, math.floor(window_cells * (1 - overlap) + 1e-9))
