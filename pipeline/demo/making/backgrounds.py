"""Backgrounds of scenes: crops of photos, and patterns drawn from a seed, at any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageDraw

Drawer = Callable[[np.random.Generator, int, int], Image.Image]


def draw_background(
    kind: str,
    rng: np.random.Generator,
    height: int,
    width: int,
    photos: Mapping[str, np.ndarray],
    *,
    is_stuff: bool = False,
) -> Image.Image:
    """Draw a background of a kind: the name of a photo, or of a pattern.

    Args:
        kind: A key of `photos` or of PATTERNS.
        rng: All choices; none depends on the size, so that one seed looks alike at every size.
        height: In px.
        width: In px.
        photos: RGB uint8 by name.
        is_stuff: Vary colours less, so that stuff can still be recognised.
    """
    if kind in PATTERNS:
        return PATTERNS[kind](rng, height, width)
    return _photo_crop(rng, photos[kind], height, width, is_stuff=is_stuff)


def _photo_crop(
    rng: np.random.Generator, photo: np.ndarray, height: int, width: int, *, is_stuff: bool
) -> Image.Image:
    photo_height, photo_width = photo.shape[:2]
    scale = rng.uniform(0.35, 1.0) * min(photo_height / height, photo_width / width)
    crop_height, crop_width = scale * height, scale * width
    left, top = rng.random() * (photo_width - crop_width), rng.random() * (photo_height - crop_height)
    is_mirrored = rng.random() < 0.5
    colour_gains = (0.88, 1.12) if is_stuff else (0.6, 1.3)
    gains = rng.uniform(*colour_gains, 3) * rng.uniform(0.7, 1.15)
    crop = Image.fromarray(photo).resize(
        (width, height),
        Image.Resampling.BILINEAR,
        box=(left, top, left + crop_width, top + crop_height),
        reducing_gap=2.0,
    )
    if is_mirrored:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop.point(np.minimum(gains[:, None] * np.arange(256), 255).astype(int).ravel().tolist())


def _gradient(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return _grid_of_colours(rng, height, width, counts=(2, 3), resampling=Image.Resampling.BICUBIC)


def _plain(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), _colour(rng))


def _blobs(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return _grid_of_colours(rng, height, width, counts=(3, 14), resampling=Image.Resampling.BICUBIC)


def _tiles(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return _grid_of_colours(rng, height, width, counts=(3, 12), resampling=Image.Resampling.NEAREST)


def _shapes(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    image = _gradient(rng, height, width)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 10)):
        draw_shape(pen, rng, height, width, smallest=0.1, largest=0.5)
    return image


def _waves(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    level = np.zeros((height, width))
    for _ in range(4):
        row_turns, column_turns = rng.uniform(-9, 9, 2)
        level += np.sin(2 * np.pi * (row_turns * rows + column_turns * columns + rng.random()))
    share = (level[..., None] + 4) / 8
    return Image.fromarray(np.uint8(share * _colour(rng) + (1 - share) * np.asarray(_colour(rng))))


def _rings(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    image = Image.new("RGB", (width, height), _colour(rng))
    pen = ImageDraw.Draw(image)
    centre_x, centre_y, count = rng.random() * width, rng.random() * height, int(rng.integers(6, 16))
    for radius in np.linspace(1.5 * max(height, width), 0, count, endpoint=False):
        pen.ellipse(
            (centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius), fill=_colour(rng)
        )
    return image


PATTERNS: dict[str, Drawer] = {
    "gradient": _gradient,
    "plain": _plain,
    "blobs": _blobs,
    "tiles": _tiles,
    "shapes": _shapes,
    "waves": _waves,
    "rings": _rings,
}
TRAIN_PATTERNS = ("gradient", "plain", "blobs", "tiles", "shapes")
HELDOUT_PATTERNS = ("waves", "rings")


def draw_shape(
    pen: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    smallest: float,
    largest: float,
) -> None:
    """Draw an ellipse, a rectangle or a line of a random colour; sizes are shares of the image's sides."""
    centre_x, centre_y = rng.random() * width, rng.random() * height
    half_width, half_height = rng.uniform(smallest, largest, 2) * (width / 2, height / 2)
    box = (centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height)
    choice, colour = rng.integers(3), _colour(rng)
    if choice == 0:
        pen.ellipse(box, fill=colour)
    elif choice == 1:
        pen.rectangle(box, fill=colour)
    else:
        pen.line(box, fill=colour, width=max(1, int(0.03 * width)))


def _grid_of_colours(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    counts: tuple[int, int],
    resampling: Image.Resampling,
) -> Image.Image:
    rows, columns = (int(count) for count in rng.integers(counts[0], counts[1] + 1, 2))
    spread = rng.uniform(20, 128)
    colours = rng.uniform(40, 215, 3) + rng.uniform(-spread, spread, (rows, columns, 3))
    small = Image.fromarray(np.uint8(np.clip(colours, 0, 255)))
    return small.resize((width, height), resampling)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(level) for level in rng.integers(0, 256, 3))
    return red, green, blue
