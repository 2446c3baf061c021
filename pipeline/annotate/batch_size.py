"""Find the batch size for `run.batch_size: auto`."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from legrad.memory import is_out_of_memory
from pipeline.annotate.engine import Engine
from pipeline.annotate.trial import TrialSamples

logger = logging.getLogger(__name__)

# a CPU core gains nothing from more, and memory grows with the batch
CPU_BATCH_SIZE = 8
FIRST_TRIED = 8
LARGEST_TRIED = 1024
WORTHWHILE_GAIN = 1.05


def find_batch_size(engine: Engine, trial: TrialSamples, device: torch.device) -> int:
    """Return the number of images that keeps a device busy: on CUDA by trial, on a CPU a fixed number.

    Args:
        engine: of the job, with its texts, views and refinement; as many batches are tried at the same time
            as the job has on the device.
        trial: makes samples of the job's kind.
        device: of the model.
    """
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    engine.batch_size = LARGEST_TRIED

    def step_s(images: int) -> float:
        def once_s() -> float:
            return engine.measure_s([trial.batch(images) for _ in range(engine.batches_at_once)])

        # the first run of a size also chooses kernels and allocates memory
        return min(once_s() for _ in range(2))

    found = search_batch_size(step_s)
    torch.cuda.empty_cache()
    logger.info("run.batch_size auto: %d images", found)
    return found


def search_batch_size(step_s: Callable[[int], float]) -> int:
    """Double the batch size while that is worthwhile and fits into memory.

    Args:
        step_s: runs batches of that many images, as many at the same time as the job does, and returns the
            seconds taken; raises an error for which `is_out_of_memory` holds where they do not fit.

    Returns:
        The smallest size that fits beyond which doubling gains less than 5 %, or does not fit. At least 1.
    """
    size, rate = FIRST_TRIED, _rate(step_s, FIRST_TRIED)
    while rate is None and size > 1:
        size //= 2
        rate = _rate(step_s, size)
    while rate is not None and size < LARGEST_TRIED:
        doubled = _rate(step_s, 2 * size)
        if doubled is None or doubled < WORTHWHILE_GAIN * rate:
            break
        size, rate = 2 * size, doubled
    return size


def _rate(step_s: Callable[[int], float], images: int) -> float | None:
    try:
        return images / step_s(images)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
