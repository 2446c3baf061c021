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
from pipeline.report.level_maps import LevelMap, level_map

# longest side in pixels and JPEG quality, best first
RUNGS = ((240, 82), (240, 65), (200, 60), (160, 55), (128, 45), (96, 40), (64, 30), (32, 30))
# dark beside bright: one of the two stands out on any image; report.css and maps.js have the same colours
MASK_RGB, TRUTH_RGB, DARK_RGB = (255, 214, 10), (0, 229, 255), (16, 16, 24)
BRIGHT_PIXELS, DARK_PIXELS, TRUTH_PIXELS, HATCH_PIXELS = 2, 1, 1, 6
CLEAR, DARK, TRUTH = range(3)
LAYER_RGBA = ((0, 0, 0, 0), (*DARK_RGB, 255), (*TRUTH_RGB, 255))
# of the bytes of a card, at most this share is the map for the slider
MAP_SHARE = 0.3

Mask = Bool[np.ndarray, "rows columns"]
Pixels = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class RowParts:
    """The parts of the pictures of a row.

    Attributes:
        image: the original.
        heatmap: from 0 to 1, on the patch grid; None where the job stored none.
        mask: None for a rejected row.
        ignored: pixels that are neither object nor background; None without an ignore mask.
        truth: pixels of the object; None without ground truth.
        slider_map: from 0 to 1; what lies above a threshold is its mask; None where the slider draws none.
    """

    image: Image.Image
    heatmap: Float[np.ndarray, "grid_height grid_width"] | None
    mask: Mask | None
    ignored: Mask | None = None
    truth: Mask | None = None
    slider_map: Float[np.ndarray, "map_height map_width"] | None = None


@dataclass(frozen=True)
class Pictures:
    """Pictures of one row, all of one size, as data URIs.

    Attributes:
        width: of each, in pixels.
        height: of each, in pixels.
        photo: the image.
        mask: the object in its colours within an outline, the rest grey and pale.
        heat: the heat map over the greyed image.
        layer: outline of the ground truth and hatching of ignored pixels, transparent elsewhere.
        levels: the map for the slider, as large as the limit allows.
    """

    width: int
    height: int
    photo: str
    mask: str
    heat: str | None = None
    layer: str | None = None
    levels: LevelMap | None = None


def draw_pictures(parts: RowParts, max_bytes: int) -> Pictures | None:
    """Draw a row at the best size and quality that fit a number of bytes.

    Returns:
        The pictures, whose data URIs have at most `max_bytes` together; None if even the smallest exceed it.
    """
    levels = None if parts.slider_map is None else level_map(parts.slider_map, int(MAP_SHARE * max_bytes))
    for drawn in _candidates(parts, levels):
        texts = (drawn.photo, drawn.mask, drawn.heat, drawn.layer, levels.text if levels else None)
        if sum(len(text) for text in texts if text is not None) <= max_bytes:
            return drawn
    return None


def paled(pixels: Pixels) -> Pixels:
    """Return an image in pale grey, as what is outside a mask is drawn."""
    pale: np.ndarray = np.rint(0.35 * pixels.mean(axis=2, keepdims=True) + 0.65 * 245).astype(np.uint8)
    return np.broadcast_to(pale, pixels.shape)


def mask_picture(photo: Pixels, inside: Mask | None) -> Pixels:
    """Draw an object in its colours within a bright and a dark line, and the rest pale.

    Args:
        photo: the image.
        inside: the object's pixels, of the same size; None: there are none.
    """
    if inside is None:
        return paled(photo)
    picture = np.where(inside[..., None], photo, paled(photo))
    picture[_widened(inside, DARK_PIXELS) & ~inside] = DARK_RGB
    picture[inside & ~_narrowed(inside, BRIGHT_PIXELS)] = MASK_RGB
    return picture


def _candidates(parts: RowParts, levels: LevelMap | None) -> Iterator[Pictures]:
    image = parts.image.convert("RGB")
    for side, quality in RUNGS:
        scale = min(1.0, side / max(image.size))
        width, height = (max(1, round(length * scale)) for length in image.size)
        photo = np.array(image.resize((width, height), Image.Resampling.LANCZOS))
        inside = None if parts.mask is None else _scaled(parts.mask, width, height)
        heat = None if parts.heatmap is None else heat_over(photo, torch.from_numpy(parts.heatmap))
        yield Pictures(
            width=width,
            height=height,
            photo=_jpeg(photo, quality),
            mask=_jpeg(mask_picture(photo, inside), quality),
            heat=None if heat is None else _jpeg(heat, quality),
            layer=_layer(parts, width, height),
            levels=levels,
        )


def _jpeg(pixels: Pixels, quality: int) -> str:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=quality, optimize=True)
    return _data_uri("image/jpeg", sink.getvalue())


def _layer(parts: RowParts, width: int, height: int) -> str | None:
    if parts.ignored is None and parts.truth is None:
        return None
    levels = np.full((height, width), CLEAR, dtype=np.uint8)
    if parts.ignored is not None:
        hatch = np.add.outer(np.arange(height), np.arange(width)) % HATCH_PIXELS < 2
        levels[_scaled(parts.ignored, width, height) & hatch] = DARK
    if parts.truth is not None:
        inside = _scaled(parts.truth, width, height)
        levels[_widened(inside, DARK_PIXELS) & ~inside] = DARK
        levels[inside & ~_narrowed(inside, TRUTH_PIXELS)] = TRUTH
    picture = Image.fromarray(levels).convert("P")
    picture.putpalette([value for rgba in LAYER_RGBA for value in rgba[:3]])
    sink = io.BytesIO()
    picture.save(sink, "PNG", transparency=bytes(rgba[3] for rgba in LAYER_RGBA), optimize=True)
    return _data_uri("image/png", sink.getvalue())


def _scaled(mask: Mask, width: int, height: int) -> Bool[np.ndarray, "height width"]:
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    scaled: np.ndarray = np.array(grey) >= 128
    return scaled


def _narrowed(inside: Mask, pixels: int) -> Mask:
    """Return a region without its outermost pixels; a region of the whole picture has some too."""
    framed = Image.fromarray(np.pad(inside, pixels).astype(np.uint8) * 255)
    narrowed: np.ndarray = np.array(framed.filter(ImageFilter.MinFilter(2 * pixels + 1))) > 0
    return narrowed[pixels:-pixels, pixels:-pixels]


def _widened(inside: Mask, pixels: int) -> Mask:
    framed = Image.fromarray(np.pad(inside, pixels).astype(np.uint8) * 255)
    widened: np.ndarray = np.array(framed.filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0
    return widened[pixels:-pixels, pixels:-pixels]


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
