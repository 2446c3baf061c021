"""Explain several views of one image and merge them into one map: mirrored, at other scales, in windows.

`legrad.canvases` describes the canvases of an image and its views. Raw relevance is merged, so that views in
which a text has little relevance contribute little.

    canvases -> views -> encode, relevance -> mean on each canvas -> mean over canvases on the reference grid
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from legrad.arguments import ImageInput, each_image, shown
from legrad.canvases import Grid, View, Views, canvas_pixels, views_of
from legrad.classes import rows_of_prompts
from legrad.errors import InputError
from legrad.explainer import LeGrad
from legrad.images import Resize
from legrad.inputs import RaggedPrompts, as_ragged, check_text_embeddings, ragged_unit_rows
from legrad.method.towers import Tower
from legrad.method.trace import Trace


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
    images: Iterable[ImageInput],
    text_embeddings: Float[Tensor, "prompts embed_dim"] | None = None,
    *,
    views: Views,
    class_index: int | Sequence[int] | None = None,
    resize: Resize = "exact",
) -> list[Float[Tensor, "prompts grid_height grid_width"]]:
    """Explain images of any sizes by several views each.

    Args:
        explainer: explainer of the model.
        images: of any sizes; as in `LeGrad.preprocess`.
        text_embeddings: every prompt for every image; rows need not have unit length.
        views: the views to merge.
        class_index: of a classifier, in place of text embeddings: one class, or several for every image.
        resize: see `LeGrad.preprocess`.

    Returns:
        For each image raw relevance as in `LeGrad.relevance`, on the grid of the image's finest canvas.

    Raises:
        InputError: the model cannot encode a view, an element is no image, or embeddings or classes do not
            fit.

    Example:
        >>> views = legrad.Views(flip=True)
        >>> text_embeddings = explainer.embed_text(["a banana", "a panda"])
        >>> [each.shape for each in legrad.view_relevance(explainer, [image], text_embeddings, views=views)]
        [torch.Size([2, 12, 12])]
    """
    check_views(views, explainer.tower)
    merged = []
    for image in each_image(images):
        canvases = [
            torch.from_numpy(pixels)[None]
            for pixels in canvas_pixels(views, explainer.transform, image, resize)
        ]
        trace = explainer.encode(preprocessed(explainer, canvases[0]))
        rows = rows_of_prompts(explainer.tower, trace.image_features, text_embeddings, class_index, None)
        check_text_embeddings(trace.image_features, rows)
        image_index = torch.zeros(rows.shape[-2], dtype=torch.int64)
        prompts = as_ragged(trace.image_features, rows, image_index)
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
    if not isinstance(views, Views):
        raise InputError(f"views: expected legrad.Views(...), received {shown(views)}")
    if not tower.takes_any_grid and views.scales != (1.0,):
        raise InputError(
            f"scales: the positions of this tower ({tower.family}) are bound to one size, "
            f"received {views.scales}"
        )
    return views


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
