"""Regions of a scene's background: stuff, alone or beside something else, and their border."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.demo.making.concepts import FIRST_STUFF_ID, STUFF

UNNAMED = 0
_HIGH_UP = {"sky", "clouds", "mountains", "building", "wall", "curtain", "forest"}


@dataclass(frozen=True)
class Region:
    """A part of the background: the class it shows, or UNNAMED; its photo, texture or pattern."""

    class_id: int
    background: str


@dataclass(frozen=True)
class Border:
    """A wavy line across the image; lengths are shares of the sides, `phase` and `turns` are in periods."""

    position: float
    tilt: float
    amplitude: float
    turns: float
    phase: float
    is_upright: bool

    def is_below(self, height: int, width: int) -> np.ndarray:
        """Return which pixels lie below the border, or right of an upright one, bool [height, width]."""
        down = ((np.arange(height) + 0.5) / height)[:, None]
        across = ((np.arange(width) + 0.5) / width)[None]
        along, aside = (down, across) if self.is_upright else (across, down)
        wave = self.amplitude * np.sin(2 * np.pi * (self.turns * along + self.phase))
        return np.asarray(aside > self.position + self.tilt * (along - 0.5) + wave)


def sample_regions(
    rng: np.random.Generator, stuff: Mapping[int, tuple[str, ...]], unnamed_background: str
) -> tuple[Region, Region | None, Border | None]:
    """Plan a background that shows stuff.

    Args:
        rng: All choices.
        stuff: Names of textures by class id.
        unnamed_background: Shares the image with stuff in some scenes.

    Returns:
        The region above the border, or the only one; the one below it; the border.
    """
    draw = rng.random()
    if draw < 0.45:
        return _sample_region(rng, stuff, int(rng.choice(list(stuff)))), None, None
    first_id, second_id = (int(class_id) for class_id in rng.choice(list(stuff), size=2, replace=False))
    first, second = _sample_region(rng, stuff, first_id), _sample_region(rng, stuff, second_id)
    if draw < 0.6:
        second = Region(UNNAMED, unnamed_background)
    is_upright = bool(rng.random() < 0.25)
    is_wrong_way = second_id in _high_ids() and first_id not in _high_ids()
    if is_wrong_way and not is_upright and rng.random() < 0.7:
        first, second = second, first
    return first, second, _sample_border(rng, is_upright=is_upright)


def _high_ids() -> set[int]:
    return {index for index, stuff in enumerate(STUFF, start=FIRST_STUFF_ID) if stuff.name in _HIGH_UP}


def _sample_region(rng: np.random.Generator, stuff: Mapping[int, tuple[str, ...]], class_id: int) -> Region:
    names = stuff[class_id]
    return Region(class_id, names[int(rng.integers(len(names)))])


def _sample_border(rng: np.random.Generator, *, is_upright: bool) -> Border:
    return Border(
        position=float(rng.uniform(0.3, 0.7)),
        tilt=float(rng.normal(0, 0.15)),
        amplitude=float(rng.uniform(0.01, 0.07)) if rng.random() < 0.6 else 0.0,
        turns=float(rng.uniform(0.5, 3)),
        phase=float(rng.random()),
        is_upright=is_upright,
    )
