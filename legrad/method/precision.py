"""Compute convolutions of float32 in float32: by default, cuDNN rounds their operands to TF32."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FULL_PRECISION = "ieee"
_CONVOLUTIONS: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]


class _FullPrecision:
    """Counts who needs full precision: the setting is one for all threads of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._setting_before = FULL_PRECISION

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._setting_before = _CONVOLUTIONS.fp32_precision
                _CONVOLUTIONS.fp32_precision = FULL_PRECISION
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _CONVOLUTIONS.fp32_precision = self._setting_before


_FULL_PRECISION = _FullPrecision()


@contextmanager
def full_precision_convolutions(dtype: torch.dtype) -> Iterator[None]:
    """Run convolutions inside in full precision if their operands are float32; then restore the setting.

    Args:
        dtype: of the operands; others are not affected by the setting.
    """
    if dtype != torch.float32:
        yield
        return
    _FULL_PRECISION.enter()
    try:
        yield
    finally:
        _FULL_PRECISION.leave()
