"""Textures of stuff, drawn from a seed: one way to draw for training, another for the scenes of the shards.

Stuff fills a region and has no outline of its own: sky, grass, a wall. Drawing takes tens of milliseconds, so
a bank of textures is drawn once, and scenes show crops of it, as they show crops of photos.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw

from pipeline.demo.making.brush import SIDE_PIXELS, Brush, Colour, Texture, stretched
from pipeline.demo.making.concepts import FIRST_STUFF_ID, STUFF


def _blend(share: Texture, first: Colour, second: Colour) -> Texture:
    """Return the first colour where the share is 0, the second where it is 1."""
    start, stop = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return np.asarray(start + share[..., None] * (stop - start))


def _sharpened(share: Texture, centre: float, width: float) -> Texture:
    return np.clip((share - centre) / width + 0.5, 0, 1)


def _canvas(colour: Colour) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE_PIXELS, SIDE_PIXELS), _rgb(colour))
    return image, ImageDraw.Draw(image)


def _rgb(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (int(min(255, max(0, level))) for level in colour)
    return red, green, blue


def _sky(brush: Brush) -> Texture:
    zenith = brush.pick((70, 140, 225), (90, 165, 240), (50, 110, 200))
    horizon = brush.pick((190, 220, 245), (215, 230, 245), (240, 205, 170))
    share = brush.rows + 0.12 * (brush.noise(2, 1.5, 1) - 0.5)
    if brush.is_heldout:
        centre = brush.rng.uniform(0.2, 0.8)
        share = 1.25 - np.hypot(brush.columns - centre, 1.1 - brush.rows)
    return _blend(np.clip(share, 0, 1), zenith, horizon)


def _clouds(brush: Brush) -> Texture:
    sky = brush.pick((85, 150, 225), (120, 170, 225), (150, 165, 185))
    white = brush.pick((245, 247, 250), (225, 230, 236))
    columns = brush.rng.uniform(2, 5)
    heaps = brush.noise(columns * brush.rng.uniform(1.1, 1.8), columns, 4)
    cover = _sharpened(heaps, brush.rng.uniform(0.35, 0.5), brush.rng.uniform(0.25, 0.5))
    shade = 28 * (brush.noise(6, 4, 2) - 0.5) * cover
    return np.asarray(_blend(cover, sky, white) - shade[..., None])


def _grass(brush: Brush) -> Texture:
    dark, light = brush.colour(35, 85, 25), brush.colour(130, 185, 70)
    if brush.is_heldout:
        blades = brush.noise(brush.rng.uniform(9, 18), brush.rng.uniform(60, 110), 2)
        return _blend(np.clip(1.6 * blades - 0.3 + 0.4 * (brush.noise(3, 3) - 0.5), 0, 1), dark, light)
    image, pen = _canvas(dark)
    length, lean, thickness = (
        brush.rng.uniform(14, 34),
        brush.rng.normal(0, 0.2),
        int(brush.rng.integers(2, 4)),
    )
    for x, y in brush.rng.random((1900, 2)) * (SIDE_PIXELS + 20):
        share, angle = brush.rng.random(), lean + brush.rng.normal(0, 0.3)
        colour = _rgb(tuple(np.asarray(dark) + share * (np.asarray(light) - dark)))
        tip = (x + length * math.sin(angle), y - length * math.cos(angle))
        pen.line((x, y, *tip), fill=colour, width=thickness)
    return np.asarray(image, np.float32)


def _soil(brush: Brush) -> Texture:
    dark, light = brush.pick((55, 35, 20), (70, 48, 34)), brush.pick((140, 98, 62), (125, 85, 60))
    count = brush.rng.uniform(14, 30)
    pixels = _blend(brush.noise(count, count, 4), dark, light)
    image = Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))
    pen = ImageDraw.Draw(image)
    for x, y in brush.rng.random((int(brush.rng.integers(30, 110)), 2)) * SIDE_PIXELS:
        radius = brush.rng.uniform(2, 6)
        box = (x - radius, y - 0.7 * radius, x + radius, y + 0.7 * radius)
        pen.ellipse(box, fill=_rgb(brush.pick(dark, light)))
    return np.asarray(np.asarray(image, np.float32) + brush.grain(9))


def _sand(brush: Brush) -> Texture:
    pale, shade = brush.pick((232, 208, 158), (240, 220, 180)), brush.pick((196, 164, 112), (205, 175, 125))
    warp = brush.noise(3, 2, 2) * brush.rng.uniform(0.1, 0.3)
    slope = brush.rng.normal(0, 0.25)
    phase = brush.rng.uniform(9, 22) * (brush.rows + slope * brush.columns + warp)
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * phase)
    ripples = wave**2 if not brush.is_heldout else np.abs(2 * (phase % 1) - 1)
    return np.asarray(_blend(ripples * brush.rng.uniform(0.25, 0.8), pale, shade) + brush.grain(8))


def _snow(brush: Brush) -> Texture:
    white, blue = brush.colour(248, 250, 253, 5), brush.pick((198, 212, 236), (212, 222, 238))
    drifts = brush.noise(brush.rng.uniform(2, 5), brush.rng.uniform(1, 3), 2)
    pixels = _blend(_sharpened(drifts, 0.6, 0.7), white, blue)
    sparkle = brush.rng.random((SIDE_PIXELS, SIDE_PIXELS, 1)) < 0.01
    return np.asarray(pixels + brush.grain(2.5) - 26 * sparkle)


def _water(brush: Brush) -> Texture:
    deep, bright = (
        brush.pick((20, 75, 125), (15, 100, 120), (35, 90, 150)),
        brush.pick((110, 180, 210), (130, 195, 205)),
    )
    rows = brush.rng.uniform(16, 34)
    if brush.is_heldout:
        level = sum(
            np.sin(2 * np.pi * (rows * scale * brush.rows + turn * brush.columns + brush.rng.random()))
            for scale, turn in zip((0.5, 0.8, 1.2, 1.7), brush.rng.uniform(-5, 5, 4), strict=True)
        )
        swell = stretched(np.asarray(level, np.float32))
    else:
        warp = brush.noise(rows / 4, rows / 8, 2)
        ripple = 0.5 + 0.5 * np.sin(2 * np.pi * (rows / 2 * brush.rows + 3 * warp))
        swell = stretched(0.6 * ripple + brush.noise(rows, rows / 4, 2))
    glints = 70 * (swell > 0.93)
    return np.asarray(_blend(swell**1.4, deep, bright) + glints[..., None])


def _road(brush: Brush) -> Texture:
    asphalt = brush.pick((62, 62, 66), (84, 84, 88), (48, 49, 54))
    patches = 16 * (brush.noise(4, 4) - 0.5)
    image = Image.fromarray(
        np.uint8(np.clip(np.asarray(asphalt) + patches[..., None] + brush.grain(9), 0, 255))
    )
    paint = _rgb(brush.pick((235, 235, 230), (235, 190, 60)))
    pen, angle = ImageDraw.Draw(image), brush.rng.uniform(0, math.pi)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    dash, gap = (40, 28) if not brush.is_heldout else (70, 45)
    for lane in np.arange(-3, 4) * brush.rng.uniform(70, 120) + brush.rng.uniform(-30, 30):
        for start in range(-300, 300, dash + gap if brush.rng.random() < 0.7 else dash):
            first = SIDE_PIXELS / 2 + along * start + across * lane
            last = first + along * dash
            pen.line((*first, *last), fill=paint, width=7)
    return np.asarray(image, np.float32)


def _tiled(
    brush: Brush, *, height: float, width: float, joint: float, shift: float
) -> tuple[Texture, Texture, Texture]:
    """Return the tile number of each pixel, its distance from the joint in px, and its row of tiles."""
    y, x = brush.rows * SIDE_PIXELS + brush.rng.uniform(0, height), brush.columns * SIDE_PIXELS
    row = np.floor(y / height)
    x = x + row * shift * width + 10 * width
    column = np.floor(x / width)
    inside = np.minimum(
        np.minimum(y - row * height, (row + 1) * height - y),
        np.minimum(x - column * width, (column + 1) * width - x),
    )
    return (row * 131 + column * 17).astype(int), inside - joint, row


def _tile_tones(brush: Brush, number: Texture, spread: float) -> Texture:
    tones = brush.rng.normal(0, spread, 4096).astype(np.float32)
    return np.asarray(tones[number % 4096][..., None])


def _pavement(brush: Brush) -> Texture:
    stone, joint = brush.pick((165, 163, 158), (182, 178, 170), (145, 146, 148)), brush.colour(85, 83, 80)
    side = brush.rng.uniform(34, 62)
    flatness = 1.0 if not brush.is_heldout else 0.6
    number, inside, _ = _tiled(
        brush, height=side * flatness, width=side, joint=2.2, shift=brush.rng.choice([0.0, 0.5])
    )
    pixels = np.asarray(stone) + _tile_tones(brush, number, 11) + 14 * (brush.noise(30, 30)[..., None] - 0.5)
    return np.asarray(np.where(inside[..., None] > 0, pixels, np.asarray(joint)))


def _gravel(brush: Brush) -> Texture:
    image, pen = _canvas(brush.colour(60, 58, 55))
    radius = brush.rng.uniform(6, 11)
    for x, y in brush.rng.random((1500, 2)) * SIDE_PIXELS:
        tone, size = brush.rng.uniform(95, 215), radius * brush.rng.uniform(0.6, 1.3)
        corners = 12 if not brush.is_heldout else 6
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + brush.rng.random()
        reach = size * brush.rng.uniform(0.75, 1.0, corners)
        points = np.stack([x + reach * np.cos(angles), y + 0.8 * reach * np.sin(angles)], axis=1)
        colour = _rgb((tone + 4, tone, tone - brush.rng.uniform(0, 14)))
        pen.polygon([tuple(point) for point in points + np.array([1.5, 2])], fill=(50, 48, 46))
        pen.polygon([tuple(point) for point in points], fill=colour)
    return np.asarray(image, np.float32)


def _floor(brush: Brush) -> Texture:
    wood = brush.pick((170, 115, 65), (195, 145, 90), (130, 82, 48))
    width = brush.rng.uniform(24, 42)
    length = width * (brush.rng.uniform(4, 7) if not brush.is_heldout else 3)
    number, inside, _ = _tiled(brush, height=width, width=length, joint=0.9, shift=0.37)
    fibres = 34 * (brush.noise(70, 3, 2) - 0.5)
    pixels = np.asarray(wood) + _tile_tones(brush, number, 13) + fibres[..., None]
    pixels = np.where(inside[..., None] > 0, pixels, np.asarray(wood) * 0.4)
    return pixels if brush.rng.random() < 0.5 else pixels.transpose(1, 0, 2)


def _carpet(brush: Brush) -> Texture:
    ground = brush.pick((150, 30, 40), (120, 25, 55), (30, 50, 110), (165, 80, 35))
    motif, edge = brush.pick((225, 190, 120), (235, 215, 170)), brush.pick((40, 60, 90), (70, 20, 30))
    repeats = brush.rng.uniform(3.5, 7)
    x, y = (np.abs((repeats * axis + brush.rng.random()) % 1 - 0.5) for axis in (brush.columns, brush.rows))
    distance = x + y if not brush.is_heldout else np.hypot(x, y) * (1 + 0.3 * np.cos(8 * np.arctan2(y, x)))
    rings = (distance * brush.rng.uniform(5, 8)).astype(int) % 3
    pixels = np.stack([np.asarray(ground), np.asarray(motif), np.asarray(edge)])[rings]
    threads = 12 * np.sin(2 * np.pi * 70 * brush.rows)
    return np.asarray(pixels + threads[..., None] + brush.grain(8))


def _wall(brush: Brush) -> Texture:
    brick = brush.pick((165, 75, 55), (185, 95, 65), (140, 60, 50), (200, 170, 150))
    mortar = brush.pick((205, 200, 190), (170, 165, 158))
    height = brush.rng.uniform(15, 25)
    shift = 0.5 if not brush.is_heldout else 0.25
    number, inside, _ = _tiled(
        brush, height=height, width=height * brush.rng.uniform(2.3, 3.0), joint=1.5, shift=shift
    )
    pixels = np.asarray(brick) + _tile_tones(brush, number, 14) + 18 * (brush.noise(40, 40)[..., None] - 0.5)
    return np.asarray(np.where(inside[..., None] > 0, pixels, np.asarray(mortar)))


def _curtain(brush: Brush) -> Texture:
    hue = brush.pick(
        (180, 40, 50), (60, 90, 160), (150, 60, 140), (215, 200, 170), (50, 120, 90), (210, 150, 50)
    )
    sway = brush.columns + 0.05 * brush.noise(2, 2, 1) * brush.rows
    folds: Texture
    if brush.is_heldout:
        folds = np.interp(sway, np.linspace(0, 1.1, 26), brush.rng.random(26)).astype(np.float32)
    else:
        count = brush.rng.uniform(6, 12)
        bend = 0.8 * np.sin(2 * np.pi * (1.3 * sway + brush.rng.random()))
        folds = 0.5 + 0.5 * np.sin(2 * np.pi * (count * sway + bend))
    return np.asarray((0.35 + 0.75 * folds)[..., None] * np.asarray(hue, np.float32))


def _leaves(brush: Brush) -> Texture:
    autumn = brush.rng.random() < 0.25
    tones = (
        ((185, 90, 30), (205, 150, 40), (150, 50, 30))
        if autumn
        else ((50, 120, 40), (85, 150, 50), (35, 95, 45))
    )
    image, pen = _canvas(brush.colour(25, 45, 20))
    length = brush.rng.uniform(20, 36)
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for x, y in brush.rng.random((700, 2)) * SIDE_PIXELS:
        angle, size = brush.rng.uniform(0, 2 * np.pi), length * brush.rng.uniform(0.7, 1.2)
        lobes = 0.5 if not brush.is_heldout else 0.5 * (0.75 + 0.25 * np.cos(5 * turns))
        along, aside = size * lobes * np.cos(turns), 0.45 * size * lobes * np.sin(turns) * np.sin(turns / 2)
        points = np.stack(
            [
                x + along * math.cos(angle) - aside * math.sin(angle),
                y + along * math.sin(angle) + aside * math.cos(angle),
            ],
            axis=1,
        )
        colour = brush.pick(*tones)
        pen.polygon([tuple(point) for point in points], fill=_rgb(colour))
        rib = 0.45 * size * np.array([math.cos(angle), math.sin(angle)])
        pen.line((x - rib[0], y - rib[1], x + rib[0], y + rib[1]), fill=_rgb(tuple(1.3 * np.asarray(colour))))
    return np.asarray(image, np.float32)


def _forest(brush: Brush) -> Texture:
    thicket = _blend(brush.noise(14, 14, 3), brush.colour(18, 40, 18), brush.colour(75, 120, 55))
    image = Image.fromarray(np.uint8(np.clip(thicket, 0, 255)))
    pen, x = ImageDraw.Draw(image), brush.rng.uniform(-10, 15)
    while x < SIDE_PIXELS:
        width, lean = brush.rng.uniform(7, 20), brush.rng.normal(0, 6)
        bark = brush.pick((70, 48, 32), (95, 75, 55), (50, 38, 30))
        foot = (x + lean + 1.2 * width, SIDE_PIXELS), (x + lean - 0.2 * width, SIDE_PIXELS)
        pen.polygon([(x, 0), (x + width, 0), *foot], fill=_rgb(bark))
        pen.line((x + 2, 0, x + lean + 1, SIDE_PIXELS), fill=_rgb(tuple(0.65 * np.asarray(bark))), width=3)
        x += width + (brush.rng.uniform(12, 42) if not brush.is_heldout else brush.rng.exponential(24))
    crowns = _sharpened(brush.noise(10, 10, 3), 0.62, 0.1)[..., None]
    leaves = np.asarray(brush.colour(55, 105, 45)) + 60 * (brush.noise(40, 40, 2)[..., None] - 0.5)
    return np.asarray(np.asarray(image) * (1 - crowns) + crowns * leaves)


def _mountains(brush: Brush) -> Texture:
    rock = np.asarray(brush.pick((110, 115, 130), (125, 110, 100), (85, 95, 110)))
    pixels = _blend(brush.rows, brush.colour(170, 195, 225), brush.colour(220, 228, 238))
    cracks = 40 * (brush.noise(30, 18, 3) - 0.5)
    layers = int(brush.rng.integers(5, 8))
    for layer in range(layers):
        crests = int(brush.rng.integers(3, 6))
        knots = np.sort(brush.rng.uniform(-0.1, 1.1, 2 * crests + 1))
        heights = np.where(np.arange(2 * crests + 1) % 2, 0.0, 1.0) * brush.rng.uniform(
            0.6, 1.0, 2 * crests + 1
        )
        ridge = np.interp(brush.columns, knots, heights) + 0.08 * (brush.noise(1, 24)[:1] - 0.5)
        top = (layer + 0.7) / layers - (0.2 if not brush.is_heldout else 0.26) * ridge
        depth = brush.rows - top
        tone = rock * (1.15 - 0.55 * layer / layers) + cracks[..., None]
        sunny = np.gradient(ridge, axis=1) > 0
        tone = tone * np.where(sunny, 1.15, 0.8)[..., None]
        snowed = (depth < 0.05 * ridge + cracks / 900)[..., None]
        pixels = np.where(
            (depth > 0)[..., None], np.where(snowed, 240 * np.where(sunny, 1, 0.88)[..., None], tone), pixels
        )
    return np.asarray(pixels)


def _building(brush: Brush) -> Texture:
    front = brush.pick((205, 190, 165), (170, 170, 175), (185, 130, 110), (225, 220, 205))
    glass, frame = (
        brush.pick((60, 80, 105), (95, 130, 160), (45, 50, 60)),
        brush.pick((245, 245, 240), (70, 60, 55)),
    )
    width = brush.rng.uniform(34, 56)
    height = width * (brush.rng.uniform(1.1, 1.5) if not brush.is_heldout else 0.8)
    y, x = brush.rows * SIDE_PIXELS % height / height, brush.columns * SIDE_PIXELS % width / width
    reach = np.maximum(np.abs(x - 0.5), np.abs(y - 0.5) * brush.rng.uniform(0.8, 1.0))
    pane = np.asarray(glass) + 60 * (brush.noise(3, 5)[..., None] - 0.5)
    bars = (np.abs(x - 0.5) < 0.03) | (np.abs(y - 0.5) < 0.03)
    window = np.where(bars[..., None], np.asarray(frame), pane)
    framed = np.where((reach < 0.29)[..., None], window, np.asarray(frame))
    plaster = np.asarray(front) + 10 * (brush.noise(20, 20)[..., None] - 0.5)
    return np.asarray(np.where((reach < 0.34)[..., None], framed, plaster))


_DRAWERS: dict[str, Callable[[Brush], Texture]] = {
    "sky": _sky,
    "clouds": _clouds,
    "grass": _grass,
    "soil": _soil,
    "sand": _sand,
    "snow": _snow,
    "water": _water,
    "road": _road,
    "pavement": _pavement,
    "gravel": _gravel,
    "floor": _floor,
    "carpet": _carpet,
    "wall": _wall,
    "curtain": _curtain,
    "leaves": _leaves,
    "forest": _forest,
    "mountains": _mountains,
    "building": _building,
}


def draw_texture(name: str, seed: int, *, is_heldout: bool) -> Texture:
    """Draw a texture of a kind of stuff.

    Args:
        name: Of a class of STUFF.
        seed: Decides the texture.
        is_heldout: Draw in the other way, which no training sees.

    Returns:
        RGB uint8 [SIDE_PIXELS, SIDE_PIXELS, 3].
    """
    brush = Brush(np.random.default_rng((seed, is_heldout)), is_heldout=is_heldout)
    pixels: Texture = np.clip(_DRAWERS[name](brush), 0, 255).astype(np.uint8)
    return pixels


def draw_bank(per_class: int, seed: int, *, is_heldout: bool) -> Iterator[tuple[int, str, Texture]]:
    """Draw textures of every class of stuff.

    Args:
        per_class: How many of each.
        seed: Of all of them.
        is_heldout: Draw in the other way, which no training sees.

    Yields:
        Class id, name of the texture, texture.
    """
    for class_id, stuff in enumerate(STUFF, start=FIRST_STUFF_ID):
        for index in range(per_class):
            texture = draw_texture(stuff.name, 1000 * seed + index, is_heldout=is_heldout)
            yield class_id, f"{stuff.name}-{index}", texture
