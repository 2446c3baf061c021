"""Pictures of heat maps: over an image, and layer by layer."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from legrad.masks import heatmaps_of, minmax_normalise, upsample_grid

if TYPE_CHECKING:
    from legrad.explainer import LeGrad

COLORMAP = "turbo"
PANEL_GAP, LABEL_HEIGHT, LABEL_SIZE = 8, 26, 16
PAPER, INK = (255, 255, 255), (17, 24, 39)


def overlay(
    image: Image.Image, heatmap: Float[Tensor, "height width"] | Float[np.ndarray, "height width"]
) -> Image.Image:
    """Lay a heat map over a greyed image.

    Args:
        image: of any size and mode.
        heatmap: from 0 (blue) to 1 (red); a grid or pixels, stretched to the image.

    Returns:
        RGB, of the image's size.
    """
    photo = np.asarray(image.convert("RGB"))
    return Image.fromarray(heat_over(photo, torch.as_tensor(heatmap)))


def layer_strip(explainer: LeGrad, image: Image.Image, text: str, *, panel_side: int = 224) -> Image.Image:
    """Draw which layer contributes what: one panel for each explained block, and one for their sum.

    All blocks share one colour scale, so a pale panel is a block that adds little; its label gives the
    block's share of all relevance, in per cent.

    Args:
        explainer: made with the `layers` to show.
        image: of any size and mode.
        text: what is looked for.
        panel_side: longer side of a panel, in pixels.

    Source: the per-layer maps of https://arxiv.org/abs/2404.03214, section 3.3.
    """
    trace = explainer.encode(explainer.preprocess([image]))
    embedding = explainer.embed_text([text])
    grids = explainer.relevance(trace, embedding, per_layer=True)[:, 0, 0].float().cpu()
    shares = grids.sum(dim=(-2, -1)) / grids.sum().clamp(min=torch.finfo(grids.dtype).tiny)
    photo = np.asarray(_fitted(image, panel_side))
    height, width = photo.shape[:2]
    common_scale = minmax_normalise(grids.reshape(1, -1, grids.shape[-1])).reshape(grids.shape)
    panels = [
        (f"block {layer.index}: {100 * float(share):.0f} %", upsample_grid(grid, height, width))
        for layer, share, grid in zip(trace.layers, shares, common_scale, strict=True)
    ]
    merged = heatmaps_of(grids.sum(dim=0), height, width, explainer.tower.normalisation)
    return _strip(photo, [*panels, ("sum", merged)])


def heat_over(
    photo: UInt8[np.ndarray, "height width 3"], heatmap: Float[Tensor, "rows columns"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Lay a heat map from 0 to 1, in any frame, over the pixels of an image."""
    height, width = photo.shape[:2]
    heat = upsample_grid(heatmap.float().cpu(), height, width).clamp(0, 1).numpy()
    colours = mpl.colormaps[COLORMAP](heat)[..., :3] * 255
    grey = photo.mean(axis=2, keepdims=True)
    blended: np.ndarray = np.rint(0.45 * grey + 0.55 * colours).astype(np.uint8)
    return blended


def _strip(photo: UInt8[np.ndarray, "height width 3"], panels: list[tuple[str, Tensor]]) -> Image.Image:
    height, width = photo.shape[:2]
    step = width + PANEL_GAP
    strip = Image.new("RGB", (len(panels) * step - PANEL_GAP, height + LABEL_HEIGHT), PAPER)
    draw = ImageDraw.Draw(strip)
    for column, (label, heatmap) in enumerate(panels):
        strip.paste(Image.fromarray(heat_over(photo, heatmap)), (column * step, 0))
        draw.text((column * step, height + 4), label, INK, font("DejaVuSans", LABEL_SIZE))
    return strip


def _fitted(image: Image.Image, longer_side: int) -> Image.Image:
    scale = longer_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


@lru_cache(maxsize=16)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load one of the fonts that come with matplotlib, so that pictures look the same everywhere."""
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)
