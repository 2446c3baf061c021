"""Canvases and views of an image: which sizes it is resized to, and which parts of these the model encodes.

An image is resized to a few *canvases*: the whole image at each scale of the model's input size and, for
windows, enlarged. A *view* is what the model encodes at once: a canvas or a window of one, possibly mirrored.
Windows are aligned with patches, so that their cells are cells of the canvas.

This module imports no model code, so that processes that only decode images start quickly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from legrad.errors import InputError
from legrad.images import ImageTransform, Resize, fast_pixels, fast_resize

Grid = tuple[int, int]  # rows and columns of cells
MOST_SCALES = 8
LARGEST_FACTOR = 8.0
MOST_TILES = 256


@dataclass(frozen=True)
class Views:
    """Views of an image that are merged; by default, only the whole image.

    Attributes:
        flip: add every view mirrored left to right.
        scales: 1 to 8 multiples of the model's input size, above 0 and at most 8, at each of which the whole
            image is a view, rounded to whole patches. Similarities are computed at the first scale.
        tile: add windows of the model's input size over the enlarged image.
        tile_zoom: size of the enlarged image relative to the model's input, from 1 to 8; the image is never
            enlarged beyond its own size.
        tile_overlap: least share of a window that overlaps with the next one, from 0, below 1.
        max_tiles: largest number of windows of an image, from 1 to 256; an image that needs more windows is
            downscaled to fit.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> views = legrad.Views(flip=True, scales=(1.0, 1.5))
        >>> grids = legrad.view_relevance(explainer, [image], explainer.embed_text(["a panda"]), views=views)
        >>> grids[0].shape
        torch.Size([1, 18, 18])
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    tile: bool = False
    tile_zoom: float = 2.0
    tile_overlap: float = 0.25
    max_tiles: int = 16

    def __post_init__(self) -> None:
        """Raise an InputError if a value is out of range."""
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
    """A part of a canvas that is encoded at once, in cells of the canvas.

    Attributes:
        canvas: index of the canvas.
        top: first row.
        left: first column.
        rows: number of rows.
        columns: number of columns.
        is_mirrored: whether the view is mirrored left to right.
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
    """Return the grids of the canvases of an image: one for each scale, then the one for windows.

    The last one is omitted if a single window would cover the whole image.
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
    views: Views, transform: ImageTransform, image: Image.Image, resize: Resize = "exact"
) -> tuple[UInt8[np.ndarray, "height width 3"], ...]:
    """Resize an image of any mode to each of its canvases, like `ImageTransform.resize`."""
    sizes = canvas_sizes(views, transform, image.height, image.width)
    if resize == "fast" and (pixels := fast_pixels(image)) is not None:
        return tuple(fast_resize(pixels, *size, transform.interpolation) for size in sizes)
    return tuple(transform.resize_to(image, *size) for size in sizes)


def canvas_sizes(
    views: Views, transform: ImageTransform, image_height: int, image_width: int
) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) in pixels of the canvases of an image, in the order of `canvas_grids`."""
    patch = transform.patch_size
    grids = canvas_grids(views, transform, image_height, image_width)
    return tuple((rows * patch, columns * patch) for rows, columns in grids)


def canvas_bytes(views: Views, transform: ImageTransform) -> int:
    """Return an upper bound on the bytes of the pixels of an image's canvases, for images of any size."""
    scaled = (_scaled(transform, scale) for scale in views.scales)
    window = transform.height * transform.width
    pixels = sum(each.height * each.width for each in scaled) + views.tile * views.max_tiles * window
    return 3 * pixels


def views_of(views: Views, canvases: Sequence[Grid], window: Grid) -> tuple[View, ...]:
    """List the views of an image, first the whole image at the first scale.

    Args:
        views: the views to make.
        canvases: grids of the image's canvases, as returned by `canvas_grids`.
        window: rows and columns of a window, in cells.
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
    """Return the first cells of windows along one axis, evenly spaced from border to border.

    Args:
        cells: length of the axis, at least `window_cells`.
        window_cells: length of a window.
        overlap: least share of a window that overlaps with the next one, from 0, below 1; windows are at
            least one cell apart.
    """
    spare = cells - window_cells
    moves = -(-spare // _longest_move(window_cells, overlap))
    return tuple(spare * move // moves for move in range(moves + 1)) if moves else (0,)


def _scaled(transform: ImageTransform, scale: float) -> ImageTransform:
    patch = transform.patch_size
    height, width = (
        max(1, round(side * scale / patch)) * patch for side in (transform.height, transform.width)
    )
    return replace(transform, height=height, width=width)


def _tiled_grid(views: Views, window: Grid, image_height: int, image_width: int, patch: int) -> Grid:
    """Return the grid of the canvas for windows: the finest one that needs at most `max_tiles` windows.

    Its shorter side is at most `tile_zoom` windows long, and no longer than the image's own pixels allow, but
    at least one window. An image that is too elongated for that is squeezed along its longer side.
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
        axes = zip(tiled, window, strict=True)
        if math.prod(len(window_starts(*axis, views.tile_overlap)) for axis in axes) <= views.max_tiles:
            return tiled
    return window


def _longest_move(window_cells: int, overlap: float) -> int:
    # The small number makes up for rounding: windows of 12 cells that overlap by a quarter are 9 cells apart.
    return max(1, math.floor(window_cells * (1 - overlap) + 1e-9))
