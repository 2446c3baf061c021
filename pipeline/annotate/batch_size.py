"""Find the batch size for `run.batch_size: auto`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from PIL import Image

import legrad
from legrad.canvases import Views, canvas_pixels
from pipeline.annotate.engine import Engine
from pipeline.annotate.sample_states import PreparedSample
from pipeline.prompts.sample_prompts import Prompt
from pipeline.shards.images import WHOLE_IMAGE

logger = logging.getLogger(__name__)

# a CPU core gains nothing from more, and memory grows with the batch
CPU_BATCH_SIZE = 8
FIRST_TRIED = 8
LARGEST_TRIED = 1024
WORTHWHILE_GAIN = 1.05


def find_batch_size(explainer: legrad.LeGrad, prompts_per_sample: int, views: Views = WHOLE_IMAGE) -> int:
    """Return the number of images that keeps a device busy: on CUDA by trial, on a CPU a fixed number.

    Args:
        explainer: the loaded model.
        prompts_per_sample: prompts of each image of the trial.
        views: views of each image of the trial.
    """
    if explainer.device.type != "cuda":
        return CPU_BATCH_SIZE
    trial = Engine(explainer, prompts_per_sample, LARGEST_TRIED, views=views)
    sample = _trial_sample(explainer, prompts_per_sample, views)

    def step_s(images: int) -> float:
        # the first run of a size also chooses kernels and allocates memory
        return min(trial.measure_s([sample] * images) for _ in range(2))

    found = search_batch_size(step_s)
    torch.cuda.empty_cache()
    logger.info("run.batch_size auto: %d images", found)
    return found


def _trial_sample(explainer: legrad.LeGrad, prompts_per_sample: int, views: Views) -> PreparedSample:
    """Return a sample whose image has the input's aspect ratio, and as many pixels as views of it can use."""
    transform = explainer.transform
    factor = math.ceil(max(views.tile_zoom, *views.scales))
    width, height = transform.width * factor, transform.height * factor
    prompts = tuple(Prompt(index, f"{index}") for index in range(prompts_per_sample))
    canvases = canvas_pixels(views, transform, Image.new("RGB", (width, height)))
    return PreparedSample(0, "trial", height, width, canvases, prompts)


def search_batch_size(step_s: Callable[[int], float]) -> int:
    """Double the batch size while that is worthwhile and fits into memory.

    Args:
        step_s: runs a batch of that many images and returns the seconds taken; raises torch.OutOfMemoryError.

    Returns:
        The smallest size beyond which doubling gains less than 5 %; where memory runs out first, half of what
        fits, since two batches are on the device at a time. At least 1.
    """
    size, rate = FIRST_TRIED, _rate(step_s, FIRST_TRIED)
    while rate is None and size > 1:
        size //= 2
        rate = _rate(step_s, size)
    while rate is not None and size < LARGEST_TRIED:
        doubled = _rate(step_s, 2 * size)
        if doubled is None:
            return max(1, size // 2)
        if doubled < WORTHWHILE_GAIN * rate:
            break
        size, rate = 2 * size, doubled
    return size


def _rate(step_s: Callable[[int], float], images: int) -> float | None:
    try:
        return images / step_s(images)
    except torch.OutOfMemoryError:
        return None
