"""What workers measured of themselves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measures:
    """What one worker, or several together, have done since their models were loaded.

    Attributes:
        images_decoded: images decoded and resized, whatever became of their samples.
        device_busy_s: seconds in which the device step ran.
        ready_s: seconds since the model was loaded; of several workers, their sum.
    """

    images_decoded: int = 0
    device_busy_s: float = 0.0
    ready_s: float = 0.0

    @property
    def device_busy_share(self) -> float | None:
        """Share of the ready time in which the device step ran, in [0, 1]; None where there was none."""
        return min(1.0, self.device_busy_s / self.ready_s) if self.ready_s > 0 else None

    def __add__(self, other: Measures) -> Measures:
        return Measures(
            self.images_decoded + other.images_decoded,
            self.device_busy_s + other.device_busy_s,
            self.ready_s + other.ready_s,
        )

    def __sub__(self, earlier: Measures) -> Measures:
        return Measures(
            self.images_decoded - earlier.images_decoded,
            self.device_busy_s - earlier.device_busy_s,
            self.ready_s - earlier.ready_s,
        )
