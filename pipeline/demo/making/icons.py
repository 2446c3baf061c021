"""Sprites of an artist whose package holds vector drawings by name: one JSON file of SVG bodies."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

ICONS_MEMBER = "package/icons.json"
ICON_SIDE_PIXELS = 128
_MAX_ICONS_BYTES = 16 << 20

# Names of the drawings in FxEmojis by code point, without fe0f. The set dates from 2015: it has neither fox,
# lion, owl, butterfly, crab, giraffe, zebra, carrot, broccoli nor cheese.
FXEMOJI_NAMES: Mapping[str, str] = {
    "1f436": "dog",
    "1f415": "dogside",
    "1f429": "poodle",
    "1f431": "cat",
    "1f408": "catside",
    "1f430": "bunny",
    "1f407": "bunnyside",
    "1f43c": "pandaface",
    "1f42f": "tiger",
    "1f405": "tigerside",
    "1f42e": "cowface",
    "1f404": "cow",
    "1f437": "pig",
    "1f416": "pigside",
    "1f438": "frog",
    "1f427": "penguin",
    "1f434": "horseface",
    "1f40e": "horse",
    "1f41d": "honeybee",
    "1f40c": "snail",
    "1f422": "turtle",
    "1f419": "octopus",
    "1f41f": "fish",
    "1f420": "tropicalfish",
    "1f42c": "dolphin",
    "1f418": "elephant",
    "1f34e": "redapple",
    "1f34f": "greenapple",
    "1f34b": "lemon",
    "1f34c": "banana",
    "1f349": "watermelon",
    "1f347": "grapes",
    "1f353": "strawberry",
    "1f34d": "pineapple",
    "1f33d": "earofmaize",
    "1f344": "mushroom",
    "1f354": "hamburger",
    "1f355": "sliceofpizza",
    "1f382": "birthdaycake",
    "1f370": "shortcake",
    "1f369": "doughnut",
    "1f697": "automobile",
    "1f698": "oncomingautomobile",
    "1f699": "recreationalvehicle",
    "1f68c": "bus",
    "1f68d": "oncomingbus",
    "1f6b2": "bicycle",
    "1f3cd": "motorcycle",
    "1f686": "train",
    "1f682": "steamlocomotive",
    "2708": "airplane",
    "1f681": "helicopter",
    "1f680": "rocket",
    "26f5": "sailboat",
    "2602": "umbrella",
    "2614": "umbrellawithraindrops",
    "1f3b8": "guitar",
    "1f3c0": "basketballandhoop",
    "1f4f7": "camera",
    "1f4f8": "camerawithflash",
    "23f0": "alarmclock",
    "1f570": "manltepiececlock",
    "1f4d5": "closedbook",
    "1f4d7": "greenbook",
    "1f4d8": "bluebook",
    "1f4d6": "openbook",
    "2702": "blackscissors",
    "1f388": "balloon",
    "1f451": "crown",
    "1f453": "glasses",
    "1f3e0": "housebuilding",
    "1f3e1": "housewithgarden",
    "1f333": "deciduoustree",
    "1f332": "evergreen",
    "1f339": "rose",
    "1f33b": "sunflower",
    "1f335": "cactus",
    "1f511": "key",
    "1f514": "bell",
    "1f48e": "gem",
    "1f3c6": "trophy",
    "1f4a1": "lightbulb",
    "1f50b": "battery",
    "1f52d": "telescope",
    "1f3ba": "trumpet",
    "2615": "hotbeverage",
    "1f373": "cooking",
    "1f36d": "lollipop",
    "1f45f": "mensrunner",
    "1f3a9": "tophat",
    "1f4a7": "droplet",
    "2b50": "star",
    "1f30d": "europeafricaglobe",
    "2693": "anchor",
    "1f528": "hammer",
    "1f525": "fire",
}


def read_icons(
    archive: Path, names: Mapping[str, str], codes: Collection[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Return the wanted drawings of a package, rendered; nothing is extracted to disk.

    Args:
        archive: A gzipped tar, as `npm pack` writes it.
        names: Of drawings by code point.
        codes: The wanted code points.

    Yields:
        Code point and RGBA uint8 [ICON_SIDE_PIXELS, ICON_SIDE_PIXELS, 4].

    Raises:
        RuntimeError: The package has no such file of drawings.
    """
    import resvg_py

    icons = _read_icons_file(archive)
    for code in sorted(names.keys() & codes):
        body, side = icons["icons"][names[code]]["body"], icons.get("height", 512)
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{body}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=ICON_SIDE_PIXELS, height=ICON_SIDE_PIXELS)
        with Image.open(io.BytesIO(bytes(png)), formats=("PNG",)) as image:
            yield code, np.asarray(image.convert("RGBA"))


def _read_icons_file(archive: Path) -> dict:
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.name == ICONS_MEMBER else None
            if stream is not None and member.size <= _MAX_ICONS_BYTES:
                icons: dict = json.load(stream)
                return icons
    raise RuntimeError(f"{archive} has no {ICONS_MEMBER}; expected a package of @iconify-json")
