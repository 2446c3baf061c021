"""Colours and noise that textures are drawn with."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE_PIXELS = 288

Texture = np.ndarray
Colour = tuple[float, float, float]


class Brush:
    """Source of all choices of one texture, and of noise: octaves in training, filtered spectra held out."""

    def __init__(self, rng: np.random.Generator, *, is_heldout: bool) -> None:
        self.rng, self.is_heldout = rng, is_heldout
        axis = np.linspace(0, 1, SIDE_PIXELS, dtype=np.float32)
        self.rows, self.columns = np.meshgrid(axis, axis, indexing="ij")

    def noise(self, rows: float, columns: float, octaves: int = 3) -> Texture:
        """Return smooth noise in [0, 1], with about so many cells down and across, and finer detail."""
        return (self._spectral if self.is_heldout else self._octaves)(rows, columns, octaves)

    def _octaves(self, rows: float, columns: float, octaves: int) -> Texture:
        total, weight = np.zeros((SIDE_PIXELS, SIDE_PIXELS), np.float32), 1.0
        for octave in range(octaves):
            shape = [min(SIDE_PIXELS, max(2, round(count * 2**octave) + 1)) for count in (rows, columns)]
            cells = Image.fromarray(self.rng.random(shape, dtype=np.float32))
            total += weight * np.asarray(cells.resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC))
            weight *= 0.55
        return stretched(total)

    def _spectral(self, rows: float, columns: float, octaves: int) -> Texture:
        down = np.fft.fftfreq(SIDE_PIXELS)[:, None] * SIDE_PIXELS / max(rows, 0.5)
        across = np.fft.rfftfreq(SIDE_PIXELS)[None] * SIDE_PIXELS / max(columns, 0.5)
        falloff = (1 + down**2 + across**2) ** -(2.2 - 0.3 * octaves)
        spectrum = np.fft.rfft2(self.rng.standard_normal((SIDE_PIXELS, SIDE_PIXELS))) * falloff
        return stretched(np.fft.irfft2(spectrum, s=(SIDE_PIXELS, SIDE_PIXELS)).astype(np.float32))

    def grain(self, strength: float) -> Texture:
        """Return noise of single pixels around 0, in grey levels [height, width, 1]."""
        return strength * self.rng.standard_normal((SIDE_PIXELS, SIDE_PIXELS, 1)).astype(np.float32)

    def colour(self, red: float, green: float, blue: float, spread: float = 14) -> Colour:
        """Return a colour near the given one."""
        shift = self.rng.normal(0, spread / 2)
        near = np.array([red, green, blue]) + shift + self.rng.normal(0, spread / 2, 3)
        return float(near[0]), float(near[1]), float(near[2])

    def pick(self, *colours: Colour) -> Colour:
        """Return one of the colours, varied."""
        return self.colour(*colours[int(self.rng.integers(len(colours)))])


def stretched(levels: Texture) -> Texture:
    """Return levels spread over [0, 1], the lowest and the highest hundredth clipped."""
    low, high = np.quantile(levels, (0.01, 0.99))
    return np.asarray(np.clip((levels - low) / max(float(high - low), 1e-6), 0, 1), np.float32)
