"""Scenes: objects on backgrounds, first as a plan, then as pixels and visible masks at any size.

A plan holds every choice, so one plan renders alike at 48, 96 or 256 px. Lengths are in scene units: the
scene has area 1 and sides sqrt(aspect) and 1/sqrt(aspect), so squashing a scene of another aspect to a square
stretches what is in it, as it does with photos.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pipeline.demo.making.art import ArtBox
from pipeline.demo.making.backgrounds import draw_background, draw_shape
from pipeline.demo.making.concepts import CONCEPTS, DISTRACTOR_CODES
from pipeline.demo.making.regions import UNNAMED, Border, Region, sample_regions


@dataclass(frozen=True)
class SceneObject:
    """A sprite in a scene: centre in shares of the sides, long side in scene units, angle in radians."""

    class_id: int
    sprite: tuple[str, str]
    centre_x: float
    centre_y: float
    long_side: float
    angle: float
    is_mirrored: bool
    colour_gains: tuple[float, float, float]
    has_shadow: bool


@dataclass(frozen=True)
class Scene:
    """All choices of a scene; objects from back to front.

    `stuff_id` says what the background shows, if that has a name. `second` covers the background's part below
    the border.
    """

    objects: tuple[SceneObject, ...]
    background: str
    aspect: float
    clutter_count: int
    blur: float
    noise: float
    texture_seed: int
    stuff_id: int = UNNAMED
    second: Region | None = None
    border: Border | None = None

    @property
    def class_ids(self) -> tuple[int, ...]:
        """The named concepts, each once: things in order of first appearance, then stuff."""
        things = [item.class_id for item in self.objects]
        stuff = [self.stuff_id, *([self.second.class_id] if self.second else [])]
        return tuple(dict.fromkeys(class_id for class_id in things + stuff if class_id != UNNAMED))

    @property
    def shows_stuff(self) -> bool:
        """Whether a part of the background has a name."""
        return self.stuff_id != UNNAMED or (self.second is not None and self.second.class_id != UNNAMED)

    def is_several(self, class_id: int) -> bool:
        """Whether the concept is shown more than once."""
        return sum(item.class_id == class_id for item in self.objects) > 1


@dataclass(frozen=True)
class SceneStyle:
    """Distribution of scenes. Probabilities in [0, 1]; aspects are width / height.

    `stuff` has the names of textures by class id. `copy_counts` are equally likely numbers of copies of a
    scene's first concept; without, a few scenes show it twice.
    """

    artists: tuple[str, ...]
    backgrounds: tuple[str, ...]
    single_share: float = 0.0
    neutral_share: float = 0.0
    clutter_share: float = 0.35
    aspects: tuple[float, ...] = ()
    stuff_share: float = 0.0
    stuff: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    copy_counts: tuple[int, ...] = ()


class SpriteMips:
    """Every sprite at halving sizes, premultiplied, so that no affine map shrinks one more than twofold.

    `class_ids` are those of the things that any artist drew.
    """

    def __init__(self, art: ArtBox) -> None:
        self._levels = {key: _halvings(pixels) for key, pixels in art.sprites.items()}
        by_code: dict[str, list[str]] = {}
        for artist, code in sorted(art.sprites):
            by_code.setdefault(code, []).append(artist)
        self._artists_by_code: Mapping[str, Sequence[str]] = by_code
        self.class_ids = [
            class_id
            for class_id, concept in enumerate(CONCEPTS, start=1)
            if not by_code.keys().isdisjoint(concept.codes)
        ]

    def level(self, key: tuple[str, str], long_side_pixels: float) -> Image.Image:
        """Return the smallest stored size of a sprite that is at least as long, or the largest one."""
        levels = self._levels[key]
        return next((level for level in reversed(levels) if max(level.size) >= long_side_pixels), levels[0])

    def artists_of(self, code: str, among: Collection[str]) -> list[str]:
        """Return the given artists who drew the code point."""
        return [artist for artist in self._artists_by_code.get(code, ()) if artist in among]


def _halvings(pixels: np.ndarray) -> list[Image.Image]:
    levels = [Image.fromarray(pixels).convert("RGBa")]
    while max(levels[-1].size) > 12:
        levels.append(
            levels[-1].resize(
                (max(1, levels[-1].width // 2), max(1, levels[-1].height // 2)), Image.Resampling.BOX
            )
        )
    return levels


def sample_scene(rng: np.random.Generator, style: SceneStyle, mips: SpriteMips) -> Scene:
    """Plan a scene: up to three named concepts, perhaps a duplicate and an unnamed object, a background."""
    class_ids = _sample_class_ids(rng, style, mips.class_ids)
    objects: list[SceneObject] = []
    for class_id in class_ids:
        objects.append(
            _sample_object(rng, style, mips, class_id=class_id, placed=objects, crowd=len(class_ids))
        )
    for _ in range(_sample_copies(rng, style) if class_ids else 0):
        objects.append(
            _sample_object(rng, style, mips, class_id=class_ids[0], placed=objects, crowd=len(objects) + 1)
        )
    if rng.random() < (0.15 if class_ids else 0.5):
        objects.append(
            _sample_object(rng, style, mips, class_id=UNNAMED, placed=objects, crowd=len(class_ids) + 1)
        )
    order = rng.permutation(len(objects))
    aspect = float(rng.choice(style.aspects)) if style.aspects else math.exp(rng.uniform(-0.29, 0.29))
    scene = Scene(
        objects=tuple(objects[index] for index in order),
        background=style.backgrounds[int(rng.integers(len(style.backgrounds)))],
        aspect=aspect,
        clutter_count=int(rng.integers(1, 6)) if rng.random() < style.clutter_share else 0,
        blur=float(rng.uniform(0.002, 0.009)) if rng.random() < 0.25 else 0.0,
        noise=float(rng.uniform(2, 14)) if rng.random() < 0.4 else 0.0,
        texture_seed=int(rng.integers(1 << 62)),
    )
    # Nothing is drawn for styles without stuff, whose scenes stay as they were before there was any.
    if style.stuff_share > 0 and rng.random() < style.stuff_share:
        return _with_stuff(rng, style, scene)
    return scene


def _with_stuff(rng: np.random.Generator, style: SceneStyle, scene: Scene) -> Scene:
    first, second, border = sample_regions(rng, style.stuff, scene.background)
    return replace(scene, background=first.background, stuff_id=first.class_id, second=second, border=border)


def _sample_copies(rng: np.random.Generator, style: SceneStyle) -> int:
    """Return how many more objects show a scene's first concept."""
    if style.copy_counts:
        return int(rng.choice(style.copy_counts)) - 1
    return int(rng.random() < 0.12)


def _sample_class_ids(rng: np.random.Generator, style: SceneStyle, drawn: Sequence[int]) -> list[int]:
    if rng.random() < style.neutral_share:
        return []
    count = 1 if rng.random() < style.single_share else int(rng.choice([1, 2, 3], p=[0.35, 0.4, 0.25]))
    return [drawn[int(index)] for index in rng.choice(len(drawn), size=count, replace=False)]


def _sample_object(
    rng: np.random.Generator,
    style: SceneStyle,
    mips: SpriteMips,
    *,
    class_id: int,
    placed: Sequence[SceneObject],
    crowd: int,
) -> SceneObject:
    codes = CONCEPTS[class_id - 1].codes if class_id != UNNAMED else DISTRACTOR_CODES
    keys = [(artist, code) for code in codes for artist in mips.artists_of(code, style.artists)]
    centre_x, centre_y, long_side = _sample_place(rng, placed, crowd)
    is_turned_freely = rng.random() < 0.15
    return SceneObject(
        class_id=class_id,
        sprite=keys[int(rng.integers(len(keys)))],
        centre_x=centre_x,
        centre_y=centre_y,
        long_side=long_side,
        angle=rng.uniform(-math.pi, math.pi) if is_turned_freely else rng.normal(0.0, math.radians(14)),
        is_mirrored=bool(rng.random() < 0.5),
        colour_gains=_sample_gains(rng),
        has_shadow=bool(rng.random() < 0.5),
    )


def _sample_gains(rng: np.random.Generator) -> tuple[float, float, float]:
    red, green, blue = (float(gain) for gain in rng.uniform(0.75, 1.12) * rng.uniform(0.82, 1.12, 3))
    return red, green, blue


def _sample_place(
    rng: np.random.Generator, placed: Sequence[SceneObject], crowd: int
) -> tuple[float, float, float]:
    """Return a centre and a long side whose disc hardly overlaps placed discs; the last try is accepted."""
    largest = {1: 0.8, 2: 0.62, 3: 0.52}.get(crowd, 0.46)
    for attempt in range(14):
        long_side = rng.uniform(0.25, max(0.3, largest * (1 - 0.035 * attempt)))
        margin = 0.4 * long_side
        centre_x, centre_y = rng.uniform(margin, 1 - margin, 2)
        clearances = (
            math.hypot(centre_x - other.centre_x, centre_y - other.centre_y)
            - 0.36 * (long_side + other.long_side)
            for other in placed
        )
        if min(clearances, default=1.0) >= 0:
            break
    return float(centre_x), float(centre_y), float(long_side)


def render(
    scene: Scene, mips: SpriteMips, photos: Mapping[str, np.ndarray], height: int, width: int
) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: The plan; its aspect need not be the canvas's.
        mips: Holds the scene's sprites.
        photos: Holds the scene's background if that is a photo or a texture.
        height: Of the canvas in px.
        width: Of the canvas in px.

    Returns:
        RGB uint8 [height, width, 3].
    """
    rng = np.random.default_rng(scene.texture_seed)
    canvas = _draw_ground(scene, rng, height, width, photos)
    _draw_clutter(canvas, rng if not scene.shows_stuff else _clutter_rng(scene), scene.clutter_count)
    pixels = np.asarray(canvas, dtype=np.float32).copy()
    for item in scene.objects:
        _paint(pixels, item, mips, scene.aspect)
    return _weather(pixels, scene, rng)


def _draw_ground(
    scene: Scene, rng: np.random.Generator, height: int, width: int, photos: Mapping[str, np.ndarray]
) -> Image.Image:
    canvas = draw_background(scene.background, rng, height, width, photos, is_stuff=scene.stuff_id != UNNAMED)
    if scene.second is not None and scene.border is not None:
        is_stuff = scene.second.class_id != UNNAMED
        below = draw_background(scene.second.background, rng, height, width, photos, is_stuff=is_stuff)
        is_below = scene.border.is_below(height, width)
        canvas.paste(below, mask=Image.fromarray(np.uint8(255 * is_below)))
    return canvas


def _draw_clutter(canvas: Image.Image, rng: np.random.Generator, count: int) -> None:
    pen = ImageDraw.Draw(canvas)
    for _ in range(count):
        draw_shape(pen, rng, canvas.height, canvas.width, smallest=0.03, largest=0.22)


def _clutter_rng(scene: Scene) -> np.random.Generator:
    """Return the source of a scene's clutter alone, so that the ground truth of stuff can leave it out."""
    return np.random.default_rng((scene.texture_seed, 1))


def render_seg(
    scene: Scene, mips: SpriteMips, height: int, width: int, *, min_visible_share: float
) -> np.ndarray:
    """Return the class of the visible object or stuff of each pixel.

    Args:
        scene: The plan.
        mips: Holds the scene's sprites.
        height: Of the canvas in px.
        width: Of the canvas in px.
        min_visible_share: Concepts whose visible share of the canvas is smaller are marked 255.

    Returns:
        uint8 [height, width]: 0 background and unnamed objects, class id, or 255 to ignore.
    """
    seg = _stuff_seg(scene, height, width)
    numbers = _object_numbers(scene, mips, height, width)
    classes = np.array([UNNAMED, *(item.class_id for item in scene.objects)], np.uint8)
    seg[numbers > 0] = classes[numbers[numbers > 0]]
    for class_id in scene.class_ids:
        if np.mean(seg == class_id) < min_visible_share:
            seg[seg == class_id] = 255
    return seg


def _stuff_seg(scene: Scene, height: int, width: int) -> np.ndarray:
    seg = np.full((height, width), scene.stuff_id, np.uint8)
    if scene.second is not None and scene.border is not None:
        seg[scene.border.is_below(height, width)] = scene.second.class_id
    if scene.shows_stuff:
        canvas = Image.new("RGB", (width, height))
        _draw_clutter(canvas, _clutter_rng(scene), scene.clutter_count)
        seg[np.asarray(canvas).any(axis=2)] = UNNAMED
    return seg


def render_instances(
    scene: Scene, mips: SpriteMips, height: int, width: int, *, min_visible_share: float
) -> np.ndarray:
    """Return the number of the visible named object of each pixel; every copy has its own.

    Args:
        scene: The plan.
        mips: Holds the scene's sprites.
        height: Of the canvas in px.
        width: Of the canvas in px.
        min_visible_share: Objects whose visible share of the canvas is smaller are marked 255.

    Returns:
        uint8 [height, width]: 0 background, stuff and unnamed objects, number of the object from 1, or 255 to
            ignore.
    """
    numbers = _object_numbers(scene, mips, height, width)
    for number, item in enumerate(scene.objects, start=1):
        is_here = numbers == number
        if item.class_id == UNNAMED:
            numbers[is_here] = 0
        elif is_here.mean() < min_visible_share:
            numbers[is_here] = 255
    return numbers


def _object_numbers(scene: Scene, mips: SpriteMips, height: int, width: int) -> np.ndarray:
    """Return the number of the visible object of each pixel, from 1, or 0."""
    numbers = np.zeros((height, width), np.uint8)
    for number, item in enumerate(scene.objects, start=1):
        warped = _warp(item, mips, scene.aspect, height, width)
        if warped is not None:
            layer, rows, columns = warped
            numbers[rows, columns][layer[..., 3] > 127] = number
    return numbers


def _weather(pixels: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    if scene.noise > 0:
        # Drawn at one size for every canvas: noise per pixel would vanish when a large canvas is shrunk.
        grain = Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).resize((width, height))
        pixels += (np.asarray(grain, dtype=np.float32)[..., None] - 128) * (scene.noise / 74)
    image = Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))
    if scene.blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(scene.blur * math.sqrt(height * width)))
    return np.asarray(image)


def _paint(pixels: np.ndarray, item: SceneObject, mips: SpriteMips, aspect: float) -> None:
    height, width = pixels.shape[:2]
    if item.has_shadow:
        shadow = _warp(item, mips, aspect, height, width, offset=0.04, max_level_pixels=8)
        if shadow is not None:
            layer, rows, columns = shadow
            pixels[rows, columns] *= 1 - layer[..., 3:] * np.float32(0.45 / 255)
    warped = _warp(item, mips, aspect, height, width)
    if warped is not None:
        layer, rows, columns = warped
        opacity = layer[..., 3:] * np.float32(1 / 255)
        pixels[rows, columns] *= 1 - opacity
        pixels[rows, columns] += np.minimum(
            layer[..., :3] * np.array(item.colour_gains, np.float32), 255 * opacity
        )


def _warp(
    item: SceneObject,
    mips: SpriteMips,
    aspect: float,
    height: int,
    width: int,
    *,
    offset: float = 0.0,
    max_level_pixels: float = math.inf,
) -> tuple[np.ndarray, slice, slice] | None:
    """Return an object in premultiplied RGBA float32 and its box on the canvas; None outside."""
    target_pixels = item.long_side * math.sqrt(height * width)
    level = mips.level(item.sprite, min(target_pixels, max_level_pixels))
    matrix = _sprite_to_canvas(item, aspect, height, width) / max(level.size)
    half = np.abs(matrix) @ (level.width / 2, level.height / 2) + 1
    centre = np.array([(item.centre_x + offset) * width, (item.centre_y + offset) * height])
    left, top = (max(0, math.floor(low)) for low in centre - half)
    right, bottom = (
        min(size, math.ceil(high)) for size, high in zip((width, height), centre + half, strict=True)
    )
    if right <= left or bottom <= top:
        return None
    inverse = np.linalg.inv(matrix)
    shift = inverse @ (np.array([left, top]) - centre) + (level.width / 2, level.height / 2)
    is_enlarged = max(level.size) < target_pixels
    layer = level.transform(
        (right - left, bottom - top),
        Image.Transform.AFFINE,
        (inverse[0, 0], inverse[0, 1], shift[0], inverse[1, 0], inverse[1, 1], shift[1]),
        Image.Resampling.BICUBIC if is_enlarged else Image.Resampling.BILINEAR,
    )
    return np.asarray(layer, dtype=np.float32), slice(top, bottom), slice(left, right)


def _sprite_to_canvas(item: SceneObject, aspect: float, height: int, width: int) -> np.ndarray:
    """Return the map from sprite lengths, in shares of its long side, to canvas px: mirror, rotate, scale."""
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    stretch = np.diag([width / math.sqrt(aspect), height * math.sqrt(aspect)])
    mirror = np.diag([-1.0 if item.is_mirrored else 1.0, 1.0])
    matrix: np.ndarray = stretch @ turn @ mirror * item.long_side
    return matrix
