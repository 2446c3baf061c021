"""Explain several views of one image and merge them into one map: mirrored, at other scales, in windows.

An image is resized to a few *canvases*: the whole image at each scale of the model's input size and, for
windows, enlarged. A *view* is what the model encodes at once: a canvas or a window of one, possibly mirrored.
Windows are aligned with patches, so that their cells are cells of the canvas. Raw relevance is merged, so
that views in which a text has little relevance contribute little.

    canvases -> views -> encode, relevance -> mean on each canvas -> mean over canvases on the reference grid
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from legrad.errors import InputError
from legrad.explainer import LeGrad
from legrad.images import ImageTransform
from legrad.inputs import RaggedPrompts, as_ragged, ragged_unit_rows
from legrad.method.towers import Tower
from legrad.method.trace import Trace

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
    views: Views, transform: ImageTransform, image: Image.Image
) -> tuple[UInt8[np.ndarray, "height width 3"], ...]:
    """Resize an image of any mode to each of its canvases, like `ImageTransform.resize`."""
    patch = transform.patch_size
    return tuple(
        transform.resize_to(image, rows * patch, columns * patch)
        for rows, columns in canvas_grids(views, transform, image.height, image.width)
    )


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


def reference_grid(canvases: Sequence[Grid]) -> Grid:
    """Return the grid on which an image's views are merged: that of its finest canvas."""
    return max(canvases, key=lambda grid: grid[0] * grid[1])


def resample_grids(
    grids: Float[Tensor, "*maps rows columns"], grid: Grid
) -> Float[Tensor, "*maps new_rows new_columns"]:
    """Resample maps to another grid over the same area: bilinear, antialiased if downsampling."""
    if tuple(grids.shape[-2:]) == grid:
        return grids
    if not grids.numel():
        return grids.new_zeros(*grids.shape[:-2], *grid)
    flat = grids.reshape(1, -1, *grids.shape[-2:])
    # Subtracting the minimum first keeps a constant map exactly constant.
    lowest = flat.amin(dim=(-2, -1), keepdim=True)
    resampled = F.interpolate(flat - lowest, size=grid, mode="bilinear", antialias=True, align_corners=False)
    return resampled.add_(lowest).reshape(*grids.shape[:-2], *grid)


def merge_grids(
    canvases: Sequence[Grid],
    view_grids: Iterable[tuple[View, Float[Tensor, "maps _rows _columns"]]],
) -> Float[Tensor, "maps grid_rows grid_columns"]:
    """Merge raw maps of an image's views on its reference grid.

    Args:
        canvases: grids of the image's canvases.
        view_grids: each view and its maps; maps of a mirrored view are mirrored back here.

    Returns:
        Mean over canvases, after resampling to the reference grid; on each canvas the mean over the views
        that cover a cell.
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


def view_relevance(
    explainer: LeGrad,
    images: Sequence[Image.Image],
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    *,
    views: Views,
) -> list[Float[Tensor, "prompts grid_height grid_width"]]:
    """Explain images of any sizes by several views each.

    Args:
        explainer: explainer of the model.
        images: images of any size and mode.
        text_embeddings: every prompt for every image; rows need not have unit length.
        views: the views to merge.

    Returns:
        For each image raw relevance as in `LeGrad.relevance`, on the grid of the image's finest canvas.

    Raises:
        InputError: the model cannot encode a view, or embeddings do not fit.
    """
    check_views(views, explainer.tower)
    merged = []
    for image in images:
        canvases = [
            torch.from_numpy(pixels)[None] for pixels in canvas_pixels(views, explainer.transform, image)
        ]
        trace = explainer.encode(preprocessed(explainer, canvases[0]))
        image_index = torch.zeros(len(text_embeddings), dtype=torch.int64)
        prompts = as_ragged(trace.image_features, text_embeddings, image_index)
        merged.append(merged_relevance(explainer, trace, canvases, prompts, views=views))
    return merged


def merged_relevance(
    explainer: LeGrad,
    trace: Trace,
    canvases: Sequence[UInt8[Tensor, "batch _height _width 3"]],
    prompts: RaggedPrompts,
    *,
    views: Views,
    images_at_once: int = 1,
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """Explain a batch of images by several views each, given the trace of the first view.

    Args:
        explainer: explainer of the model.
        trace: trace of the first canvas, not mirrored.
        canvases: the batch on each canvas, resized by `canvas_pixels`; on any device.
        prompts: texts, each with its image.
        views: the views to merge.
        images_at_once: largest number of images in a forward pass, if the batch is not larger; views of one
            size share a forward pass.

    Returns:
        Raw relevance on the reference grid, scaled like the relevance of the first view.
    """
    first = explainer.relevance(trace, prompts)
    patch = explainer.patch_size
    grids = [(canvas.shape[1] // patch, canvas.shape[2] // patch) for canvas in canvases]
    window = (explainer.transform.height // patch, explainer.transform.width // patch)
    whole, *others = views_of(views, grids, window)
    if not others:
        return first
    tokens = _tokens(explainer, whole)
    batch, maps = len(canvases[0]), len(prompts.unit_rows)

    def explained() -> Iterator[tuple[View, Tensor]]:
        yield whole, first
        for part in _parts(others, max(1, images_at_once // batch)):
            pixels = torch.cat([_seen(canvases[view.canvas], view, patch) for view in part])
            relevance = explainer.relevance(
                preprocessed(explainer, pixels), _repeated(prompts, len(part), batch)
            )
            # Relevance is inversely proportional to the number of tokens that the score averages.
            scale = 1.0 if explainer.scoring.pooler is not None else _tokens(explainer, part[0]) / tokens
            by_view = (relevance * scale).reshape(len(part), maps, *relevance.shape[-2:])
            yield from zip(part, by_view, strict=True)

    return merge_grids(grids, explained())


def _repeated(prompts: RaggedPrompts, times: int, batch: int) -> RaggedPrompts:
    """Return the prompts of several batches, one after the other."""
    rows = torch.cat([prompts.image_index + batch * place for place in range(times)])
    unit_rows = prompts.unit_rows.repeat(times, 1)
    return ragged_unit_rows(unit_rows, rows, one_by_one=prompts.one_by_one)


def preprocessed(
    explainer: LeGrad, pixels: UInt8[Tensor, "batch height width 3"]
) -> Float[Tensor, "batch 3 height width"]:
    """Normalise resized pixels, on the model's device and in its dtype."""
    return explainer.transform.normalise(pixels.to(explainer.device), explainer.dtype)


def check_views(views: Views, tower: Tower) -> Views:
    """Return the views; raise an InputError if the tower cannot encode one of them."""
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


def _parts(views: Sequence[View], length: int) -> Iterator[list[View]]:
    """Group consecutive views of one size, at most `length` in a group."""
    for _, alike in groupby(views, key=lambda view: (view.rows, view.columns)):
        listed = list(alike)
        yield from (listed[start : start + length] for start in range(0, len(listed), length))


def _seen(canvas: UInt8[Tensor, "batch height width 3"], view: View, patch: int) -> Tensor:
    top, left = view.top * patch, view.left * patch
    seen = canvas[:, top : top + view.rows * patch, left : left + view.columns * patch]
    return seen.flip(2) if view.is_mirrored else seen


def _tokens(explainer: LeGrad, view: View) -> int:
    return explainer.tower.prefix_tokens + view.rows * view.columns
