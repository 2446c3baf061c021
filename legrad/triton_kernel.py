"""Run a Triton kernel, or its torch version on machines where Triton does not work."""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import TypeVar

import torch

from legrad.memory import is_out_of_memory

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class TritonKernel:
    """A Triton kernel that is replaced by its torch version for the rest of the process once it fails.

    Triton compiles a kernel at its first use. That needs a C compiler, Python's headers and a GPU that Triton
    supports, so only using a kernel shows whether it works.

    Args:
        name: the kernel in log lines.
        device_types: types of the devices that the kernel runs on; "cpu" is for Triton's interpreter.
    """

    def __init__(self, name: str, device_types: tuple[str, ...] = ("cuda",)) -> None:
        self.name = name
        self.failure: str | None = None
        self._device_types = device_types
        self._has_run = False
        self._lock = threading.RLock()

    def runs_on(self, device: torch.device) -> bool:
        """Return whether the kernel is to be used on a device: it has not failed, and Triton is installed."""
        return device.type in self._device_types and self.failure is None and _has_triton()

    def run(
        self, device: torch.device, kernel: Callable[[], Result], fallback: Callable[[], Result]
    ) -> Result:
        """Return the result of the kernel, or of its torch version if the kernel fails or failed before.

        Args:
            device: the device of the operands.
            kernel: compiles and launches the kernel.
            fallback: computes the same with torch.

        Raises:
            Exception: the device or the host is out of memory, which the torch version would not mend; or the
                torch version failed.
        """
        # Other threads wait for the first use, so that a kernel that fails is compiled and reported once.
        with nullcontext() if self._has_run else self._lock:
            if self.failure is None:
                try:
                    with _current(device):
                        result = kernel()
                except Exception as error:
                    if isinstance(error, MemoryError) or is_out_of_memory(error):
                        raise
                    self._give_up(error)
                else:
                    self._has_run = True
                    return result
        return fallback()

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            if self.failure is None:
                reason = next(iter(str(error).splitlines()), "")
                self.failure = f"{type(error).__name__}: {reason}"
                logger.warning(
                    "Triton cannot run the kernel %r (%s); using its torch version, which is slower, until "
                    "this process ends",
                    self.name,
                    self.failure,
                )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _current(device: torch.device) -> AbstractContextManager[object]:
    # Triton launches on the current device, whatever the device of the operands.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
