"""Small pictures of one annotation row as data URIs of limited size."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter

from legrad.pictures import heat_over

# longest side in pixels and JPEG quality, best first
RUNGS = ((240, 82), (240, 65), (200, 60), (160, 55), (128, 45), (96, 40), (64, 30), (32, 30))
CLEAR, FILL, OUTLINE, IGNORED, TRUTH = range(5)
LAYER_RGBA = ((0, 0, 0, 0), (255, 122, 0, 95), (255, 122, 0, 255), (120, 120, 120, 150), (0, 184, 148, 255))

Mask = Bool[np.ndarray, "rows columns"]


@dataclass(frozen=True)
class RowParts:
    """The parts of the pictures of a row.

    Attributes:
        image: the original.
        heatmap: from 0 to 1, on the patch grid; None where the job stored none.
        mask: None for a rejected row.
        ignored: pixels that are neither object nor background; None without an ignore mask.
        truth: pixels of the object; None without ground truth.
    """

    image: Image.Image
    heatmap: Float[np.ndarray, "grid_height grid_width"] | None
    mask: Mask | None
    ignored: Mask | None = None
    truth: Mask | None = None


@dataclass(frozen=True)
class Pictures:
    """Pictures of one row, all of one size, as data URIs.

    Attributes:
        width: of each, in pixels.
        height: of each, in pixels.
        photo: the image.
        heat: the heat map over the greyed image.
        layer: mask, outlines and ignored pixels on a transparent background, laid over the others.
    """

    width: int
    height: int
    photo: str
    heat: str | None
    layer: str | None


def draw_pictures(parts: RowParts, max_bytes: int) -> Pictures | None:
    """Draw a row at the best size and quality that fit a number of bytes.

    Returns:
        The pictures, whose data URIs have at most `max_bytes` together; None if even the smallest exceed it.
    """
    for drawn in _candidates(parts):
        if sum(len(uri) for uri in (drawn.photo, drawn.heat, drawn.layer) if uri is not None) <= max_bytes:
            return drawn
    return None


def _candidates(parts: RowParts) -> Iterator[Pictures]:
    image = parts.image.convert("RGB")
    for side, quality in RUNGS:
        scale = min(1.0, side / max(image.size))
        width, height = (max(1, round(length * scale)) for length in image.size)
        photo = np.array(image.resize((width, height), Image.Resampling.LANCZOS))
        heat = None if parts.heatmap is None else heat_over(photo, torch.from_numpy(parts.heatmap))
        yield Pictures(
            width=width,
            height=height,
            photo=_jpeg(photo, quality),
            heat=None if heat is None else _jpeg(heat, quality),
            layer=_layer(parts, width, height),
        )


def _jpeg(pixels: UInt8[np.ndarray, "height width 3"], quality: int) -> str:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=quality, optimize=True)
    return _data_uri("image/jpeg", sink.getvalue())


def _layer(parts: RowParts, width: int, height: int) -> str | None:
    if parts.mask is None and parts.ignored is None and parts.truth is None:
        return None
    levels = np.full((height, width), CLEAR, dtype=np.uint8)
    if parts.ignored is not None:
        levels[_scaled(parts.ignored, width, height)] = IGNORED
    if parts.truth is not None:
        levels[_outline(_scaled(parts.truth, width, height))] = TRUTH
    if parts.mask is not None:
        inside = _scaled(parts.mask, width, height)
        levels[inside & (levels != TRUTH)] = FILL
        levels[_outline(inside)] = OUTLINE
    picture = Image.fromarray(levels).convert("P")
    picture.putpalette([value for rgba in LAYER_RGBA for value in rgba[:3]])
    sink = io.BytesIO()
    picture.save(sink, "PNG", transparency=bytes(rgba[3] for rgba in LAYER_RGBA), optimize=True)
    return _data_uri("image/png", sink.getvalue())


def _scaled(mask: Mask, width: int, height: int) -> Bool[np.ndarray, "height width"]:
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    scaled: np.ndarray = np.array(grey) >= 128
    return scaled


def _outline(inside: Mask) -> Mask:
    """Return the outermost pixels of a region; a region of the whole picture has an outline too."""
    framed = Image.fromarray(np.pad(inside, 1).astype(np.uint8) * 255)
    shrunk = np.array(framed.filter(ImageFilter.MinFilter(3)))[1:-1, 1:-1] > 0
    return inside & ~shrunk


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
