"""Relevance of several views of an image, merged: one forward pass for each view."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from legrad.explainer import LeGrad
from legrad.method.trace import Trace
from legrad.views import Grid, View, Views, canvas_pixels, check_views, merge_grids, views_of


def view_relevance(
    explainer: LeGrad,
    images: Sequence[Image.Image],
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    *,
    views: Views,
) -> list[Float[Tensor, "prompts grid_height grid_width"]]:
    """Explain images of any sizes by several views each.

    Args:
        explainer: explains each view.
        images: of any modes; their pixels are resized anew for each scale.
        text_embeddings: every prompt for every image; rows of any length above zero.
        views: which views.

    Returns:
        For each image raw relevance, as `LeGrad.relevance` gives it, on the grid of the image's finest
        canvas.

    Raises:
        InputError: the model cannot take a view, or embeddings do not fit.
    """
    check_views(views, explainer.tower)
    merged = []
    for image in images:
        canvases = [
            torch.from_numpy(pixels)[None] for pixels in canvas_pixels(views, explainer.transform, image)
        ]
        trace = explainer.encode(preprocessed(explainer, canvases[0]))
        image_index = torch.zeros(len(text_embeddings), dtype=torch.int64)
        merged.append(merged_relevance(explainer, trace, canvases, text_embeddings, image_index, views=views))
    return merged


def merged_relevance(
    explainer: LeGrad,
    trace: Trace,
    canvases: Sequence[UInt8[Tensor, "batch _height _width 3"]],
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
    *,
    views: Views,
    images_at_once: int = 1,
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """Explain a batch of images by several views each, given the trace of the first view.

    Args:
        explainer: explains each view.
        trace: of the first canvas as it is.
        canvases: the batch on each canvas, as `legrad.views.canvas_pixels` resizes images; on any device.
        text_embeddings: one row for each prompt.
        image_index: for each prompt, the row of its image.
        views: which views.
        images_at_once: most images of a forward pass; views of one size share one. At least the whole batch
            goes together.

    Returns:
        Raw relevance on the reference grid, at the scale that it has on the first view.
    """
    first = explainer.relevance(trace, text_embeddings, image_index)
    grids = [_grid_of(explainer, canvas) for canvas in canvases]
    window = (
        explainer.transform.height // explainer.patch_size,
        explainer.transform.width // explainer.patch_size,
    )
    whole, *others = views_of(views, grids, window)
    if not others:
        return first
    tokens = _tokens(explainer, whole)
    batch, prompts = len(canvases[0]), len(text_embeddings)

    def explained() -> Iterator[tuple[View, Tensor]]:
        yield whole, first
        for part in _parts(others, max(1, images_at_once // batch)):
            pixels = torch.cat([_seen(canvases[view.canvas], view, explainer.patch_size) for view in part])
            rows = torch.cat([image_index + batch * place for place in range(len(part))])
            relevance = explainer.relevance(
                preprocessed(explainer, pixels), text_embeddings.repeat(len(part), 1), rows
            )
            # the derivative by one attention weight falls with the number of tokens that the score averages
            scale = 1.0 if explainer.scoring.pooler is not None else _tokens(explainer, part[0]) / tokens
            by_view = (relevance * scale).reshape(len(part), prompts, *relevance.shape[-2:])
            yield from zip(part, by_view, strict=True)

    return merge_grids(grids, explained())


def preprocessed(
    explainer: LeGrad, pixels: UInt8[Tensor, "batch height width 3"]
) -> Float[Tensor, "batch 3 height width"]:
    """Bring resized pixels to the model's device, range and dtype."""
    return explainer.transform.normalise(pixels.to(explainer.device), explainer.dtype)


def _parts(views: Sequence[View], length: int) -> Iterator[list[View]]:
    """Put views of one size together, at most `length` of them."""
    for _, alike in groupby(views, key=lambda view: (view.rows, view.columns)):
        listed = list(alike)
        yield from (listed[start : start + length] for start in range(0, len(listed), length))


def _seen(canvas: UInt8[Tensor, "batch height width 3"], view: View, patch: int) -> Tensor:
    top, left = view.top * patch, view.left * patch
    seen = canvas[:, top : top + view.rows * patch, left : left + view.columns * patch]
    return seen.flip(2) if view.is_mirrored else seen


def _tokens(explainer: LeGrad, view: View) -> int:
    return explainer.tower.prefix_tokens + view.rows * view.columns


def _grid_of(explainer: LeGrad, canvas: Tensor) -> Grid:
    return canvas.shape[1] // explainer.patch_size, canvas.shape[2] // explainer.patch_size
