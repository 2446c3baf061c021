"""One device step of the pipeline on a GPU: maps a second, launches, waits, and the same beside mask threads.

    python tests/bench/gpu_step.py [--model ViT-B-16] [--precision bf16] [--batches 64 256] [--write]

Everything that `Engine.explain` does is measured: copies, text, similarities, relevance, refinement, and maps
brought to the CPU. No two captions are equal. Weights are random. Reading, decoding and masks are not part of
it, except that masks load the interpreter in the rows with `mask_threads`. Prints one JSON row a measurement;
a failed one is a row with its error. Without a GPU it runs one small case, which shows that it works.
"""

import argparse
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from published import figure_parser, recording

sys.path.insert(0, str(Path(__file__).parents[2]))
import legrad
from legrad.canvases import Views
from legrad.masks.grids import HeatmapStack, independent_masks
from legrad.masks.thresholds import MaskRule
from pipeline.annotate.engine import Engine
from pipeline.annotate.maps import refinement_of
from pipeline.annotate.trial import TrialSamples
from pipeline.config.masks import MasksConfig

IMAGE_HEIGHT, IMAGE_WIDTH = 375, 500


def main() -> None:
    """Measure each case."""
    arguments = options()
    is_cuda = torch.cuda.is_available()
    explainer = legrad.LeGrad.from_open_clip(
        arguments.model, precision=arguments.precision, device="cuda" if is_cuda else "cpu"
    )
    sizes = arguments.batches if is_cuda else [2]
    cases = list(product(sizes, [1, 4] if is_cuda else [1], ["none", "par"]))
    with recording(__file__, arguments, needs="a CUDA device") as record:
        for images, prompts, refine in cases:
            case = {"images": images, "prompts": prompts, "refine": refine}
            step = Step(explainer, images, prompts, refine)
            loads = [0, arguments.mask_threads] if refine == "par" and prompts == 1 else [0]
            for threads, at_once in product(loads, [1, 2]):
                load = {"mask_threads": threads, "batches_at_once": at_once}
                with masks_beside(threads):
                    found = found_or_error(partial(step.rate, arguments.repeats, at_once))
                record("steps", case | load | found)
            if is_cuda:
                record("waits", case | found_or_error(step.waits))
                record("launches", case | found_or_error(step.launches))


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = figure_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-16", help="of open_clip; weights are random")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="images in a step")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--mask-threads", type=int, default=8)
    return parser.parse_args()


def found_or_error(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what is measured; an error becomes the row."""
    try:
        return measure()
    except Exception as error:  # one failed measurement must not cost the others
        return {"error": f"{type(error).__name__}: {error}"[:500]}


class Step:
    """A device step of an engine, whose samples are made beforehand."""

    def __init__(self, explainer: legrad.LeGrad, images: int, prompts: int, refine: str) -> None:
        refinement = refinement_of(MasksConfig(refine=refine), explainer.patch_size)
        self._engine = Engine(explainer, 32, images, batches_at_once=2, refinement=refinement)
        self._trial = TrialSamples(explainer.transform, Views(), prompts)
        self._images, self._maps_per_image = images, prompts
        self._engine.warm_up(self._trial.batch(images))
        self._engine.warm_up(self._trial.batch(images))
        self._engine.clock.take_busy_s()

    def rate(self, repeats: int, at_once: int) -> dict[str, Any]:
        """Mean time of a step, and the share of it in which the device worked.

        Args:
            repeats: steps measured.
            at_once: batches on the device at the same time.
        """
        batches = [self._trial.batch(self._images) for _ in range(repeats)]
        started_s = time.perf_counter()
        with ThreadPoolExecutor(at_once) as threads:
            explained = sum(map(len, threads.map(self._engine.explain, batches)))
        all_s = time.perf_counter() - started_s
        return {
            "step_ms": round(1000 * all_s / repeats, 2),
            "maps_per_s": round(explained * self._maps_per_image / all_s, 1),
            "device_busy_share": round(self._engine.clock.take_busy_s() / all_s, 3),
        }

    def waits(self) -> dict[str, Any]:
        """Operations of one step for which the CPU waits, as torch counts them."""
        batch = self._trial.batch(self._images)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self._engine.explain(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"waits": sum("synchroniz" in str(warning.message) for warning in caught)}

    def launches(self) -> dict[str, Any]:
        """Kernels of one step, and those that take most of the device's time."""
        batch = self._trial.batch(self._images)
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            self._engine.explain(batch)
            torch.cuda.synchronize()
        averages = profile.key_averages()
        kernels = sorted(averages, key=lambda row: row.self_device_time_total, reverse=True)
        return {
            "launches": sum(row.count for row in averages if "LaunchKernel" in row.key),
            "slowest_ms": {row.key[:60]: round(row.self_device_time_total / 1000, 3) for row in kernels[:12]},
        }


@contextmanager
def masks_beside(threads: int) -> Iterator[None]:
    """Cut masks from maps in some threads of this process while the body runs."""
    done = threading.Event()
    stack = HeatmapStack(torch.rand(1, 224, 224).numpy(), IMAGE_HEIGHT, IMAGE_WIDTH, None)

    def cut() -> None:
        while not done.is_set():
            independent_masks(stack, MaskRule())

    started = [threading.Thread(target=cut) for _ in range(threads)]
    for thread in started:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in started:
            thread.join()


if __name__ == "__main__":
    main()
