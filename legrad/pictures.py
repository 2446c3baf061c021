"""Draw heat maps over images, and panels side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from legrad.arguments import ImageInput, as_image, shown
from legrad.errors import InputError
from legrad.heatmaps import upsample_grid

COLORMAP = "turbo"
PANEL_GAP, LABEL_TOP, LABEL_HEIGHT, LABEL_SIZE = 8, 4, 22, 16
PAPER, INK = (255, 255, 255), (17, 24, 39)


def overlay(
    image: ImageInput,
    heatmap: Float[Tensor, "*ones height width"] | Float[np.ndarray, "*ones height width"],
) -> Image.Image:
    """Lay a heat map over a greyed image.

    Args:
        image: a PIL image of any size and mode, the path of a file, or an array; see `LeGrad.preprocess`.
        heatmap: values from 0 (blue) to 1 (red), a grid or pixels, on any device; interpolated to the image's
            size. Leading axes of length one are ignored.

    Returns:
        RGB, of the image's size.

    Raises:
        InputError: there is no image, or not exactly one map of finite values.

    Example:
        >>> heatmap = legrad.minmax_normalise(grids[0])
        >>> legrad.overlay(image, heatmap).save(folder / "overlay.png")
    """
    photo = np.asarray(as_image(image).convert("RGB"))
    return Image.fromarray(heat_over(photo, _one_map(heatmap)))


def _one_map(heatmap: Any) -> Float[Tensor, "height width"]:
    """Return one map of a caller's tensor or array."""
    if not isinstance(heatmap, Tensor | np.ndarray):
        raise InputError(f"heatmap: expected a tensor or an array [height, width], received {shown(heatmap)}")
    if isinstance(heatmap, np.ndarray) and heatmap.dtype.kind not in "fiub":
        raise InputError(f"heatmap: expected numbers, received {heatmap.dtype}")
    values = torch.as_tensor(heatmap).detach().float()
    shape = list(values.shape)
    if values.ndim < 2 or math.prod(shape[:-2]) != 1 or not values.numel():
        hint = "; pass one of them, such as heatmaps[0]" if values.ndim > 2 and values.numel() else ""
        raise InputError(f"heatmap: expected one map [height, width], received {shape}{hint}")
    if not values.isfinite().all():
        raise InputError("heatmap: expected values from 0 to 1, received NaN or infinity")
    return values.reshape(shape[-2:])


def heat_over(
    photo: UInt8[np.ndarray, "height width 3"], heatmap: Float[Tensor, "rows columns"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Lay a heat map from 0 to 1 over the pixels of an image; it is interpolated to the image's size."""
    import matplotlib as mpl

    height, width = photo.shape[:2]
    heat = upsample_grid(heatmap.float().cpu(), height, width).clamp(0, 1).numpy()
    colours = mpl.colormaps[COLORMAP](heat)[..., :3] * 255
    grey = photo.mean(axis=2, keepdims=True)
    blended: np.ndarray = np.rint(0.45 * grey + 0.55 * colours).astype(np.uint8)
    return blended


def draw_panels(
    labels: Sequence[Sequence[str]],
    panels: Sequence[UInt8[np.ndarray, "height width 3"]],
    *,
    per_line: int,
) -> Image.Image:
    """Draw panels of one size in a table, each with a label below it.

    Args:
        labels: lines of text below each panel; a line wider than the panel is cut and ends in an ellipsis.
        panels: at least one, all of one size.
        per_line: number of panels in a line.
    """
    height, width = panels[0].shape[:2]
    label_height = LABEL_TOP + LABEL_HEIGHT * max(map(len, labels))
    columns, lines = min(per_line, len(panels)), -(-len(panels) // per_line)
    step_x, step_y = width + PANEL_GAP, height + label_height
    picture = Image.new("RGB", (columns * step_x - PANEL_GAP, lines * step_y), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (label, panel) in enumerate(zip(labels, panels, strict=True)):
        left, top = number % per_line * step_x, number // per_line * step_y
        picture.paste(Image.fromarray(panel), (left, top))
        for line, text in enumerate(label):
            place = (left, top + height + LABEL_TOP + line * LABEL_HEIGHT)
            draw.text(place, _clipped(text, width), INK, font("DejaVuSans", LABEL_SIZE))
    return picture


def _clipped(text: str, width: int) -> str:
    """Return a text in one line, cut to a width in pixels."""
    letters = font("DejaVuSans", LABEL_SIZE)
    # A line of n pixels holds at most n letters; measuring a longer text would take long.
    one_line = " ".join(text[: width + 1].split())
    if letters.getlength(one_line) <= width and len(text) <= width:
        return one_line
    fitting = (one_line[:end] for end in range(len(one_line), 0, -1))
    return next((start for start in fitting if letters.getlength(f"{start}…") <= width), "") + "…"


def fitted(image: Image.Image, longer_side: int) -> Image.Image:
    """Resize an image so that its longer side has this many pixels; returns RGB."""
    scale = longer_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


@lru_cache(maxsize=16)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font that matplotlib includes, so that pictures look the same on every machine."""
    import matplotlib as mpl

    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)
