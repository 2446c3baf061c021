"""Measure samples/s of a worker without its device: model, text tower, PAR and device copies are skipped.

    python tests/bench/host_ceiling.py [--images 500x375:1 500x375:4] [--workers 1:1 2:2 2:0] [--write]

Everything else is what a worker does: tar, JPEG, captions and CLIP's tokenizer, batches put together in
memory that is used again (as page-locked memory is), masks from refined maps of 224 x 224 in half precision,
RLE, Parquet on the local disk, the next shard begun as soon as there is room. Image features, text rows,
relevance grids and refined maps are ready-made (`ready_made.py`). `--workers` are cores and sample processes;
with 0 processes, the work is done in as many threads as cores.

The floor is what pixels and masks alone need, measured in the same run on one thread: torchvision's
decode_jpeg and its antialiased bicubic resize on uint8 to 224 x 224, and for each prompt OpenCV's bilinear
resize of one float map to the image and pycocotools' encoding of one uint8 mask.

Prints one JSON row a case, medians of rounds after a warm-up:

    samples_per_s                      of the whole worker
    cpu_ms_per_sample                  CPU time of all its processes
    device_process_cpu_ms_per_sample   CPU time of the process that would hold the device
    floor_ms_per_sample, ratio         the floor, and cpu_ms_per_sample over it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import open_clip
import ready_made
import torch
import torchvision
from made_shards import jpeg, write_shards
from proc import cpu_s_of
from published import figure_parser, recording
from pycocotools import mask as coco
from shards_in_flight import work_through
from torchvision.transforms.v2 import InterpolationMode, functional

from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.processes import SampleProcesses
from pipeline.config.load import parse_config
from pipeline.config.schema import JobConfig

INPUT_SIDE = 224
IMAGES = 64
# (side, prompts), and (cores, processes)
IMAGE_CASES = (("500x375", 1), ("500x375", 4), ("64x48", 1), ("1600x1200", 1))
WORKER_CASES = ((1, 1), (2, 2), (2, 0))


def main() -> None:
    """Measure the chosen cases; each in a process of its own, which keeps to its cores."""
    arguments = options()
    if arguments.one_case:
        print(json.dumps(measured(arguments)), flush=True)
        return
    with recording(__file__, arguments) as record:
        for side, prompts in arguments.images:
            for cores, processes in arguments.workers:
                case = {"side": side, "prompts": prompts, "cores": cores, "processes": processes}
                record("cases", case | in_own_process(arguments, case))


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = figure_parser(__doc__)
    parser.add_argument(
        "--images", nargs="+", type=_image_case, default=IMAGE_CASES, help="WIDTHxHEIGHT:PROMPTS of each case"
    )
    parser.add_argument(
        "--workers", nargs="+", type=_worker_case, default=WORKER_CASES, help="CORES:PROCESSES of each case"
    )
    parser.add_argument("--resize", default="fast", help="input.resize")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=250, help="samples of a shard")
    parser.add_argument("--rounds", type=int, default=2, help="rounds after the warm-up")
    parser.add_argument("--one-case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    vars(arguments).update(arguments.one_case or {})
    return arguments


def _image_case(text: str) -> tuple[str, int]:
    side, _, prompts = text.partition(":")
    return side, int(prompts or 1)


def _worker_case(text: str) -> tuple[int, int]:
    cores, _, processes = text.partition(":")
    return int(cores), int(processes or cores)


def in_own_process(arguments: argparse.Namespace, case: dict[str, Any]) -> dict[str, float]:
    """Measure one case in a process of its own."""
    kept = ("resize", "batch_size", "shards", "samples", "rounds")
    settings = {name: getattr(arguments, name) for name in kept} | case
    command = [sys.executable, __file__, f"--one-case={json.dumps(settings)}"]
    found: dict[str, float] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return found


def measured(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the figures of one case."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    width, height = map(int, arguments.side.split("x"))
    images = [jpeg(seed, width, height) for seed in range(IMAGES)]
    rounds = rounds_of_worker(arguments, images)
    row = {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}
    floor = round(floor_ms(images, arguments.prompts, width, height), 3)
    ratio = round(row["cpu_ms_per_sample"] / floor, 2)
    return {**row, "floor_ms_per_sample": floor, "ratio": ratio}


def rounds_of_worker(arguments: argparse.Namespace, images: Sequence[bytes]) -> list[dict[str, float]]:
    """Return the figures of each round but the first."""
    with tempfile.TemporaryDirectory() as folder, device_is_skipped():
        shards, out = Path(folder, "shards"), Path(folder, "out")
        shards.mkdir()
        write_shards(
            shards,
            images,
            shards=arguments.shards,
            samples=arguments.samples,
            prompts=arguments.prompts,
        )
        with worker(arguments, config_of(arguments, shards, out)) as annotator:
            return [one_round(annotator, shards) for _ in range(arguments.rounds + 1)][1:]


def config_of(arguments: argparse.Namespace, shards: Path, out: Path) -> JobConfig:
    """Return a job with a caption list for each sample and refined maps."""
    return parse_config(
        {
            "input": {"shards": f"{shards}/*.tar", "caption": "json:captions", "resize": arguments.resize},
            "model": {"name": "ViT-B-16", "pretrained": "openai"},
            "prompts": {"source": "captions"},
            "masks": {"refine": "par"},
            "output": {"dir": str(out)},
            "run": {"batch_size": arguments.batch_size},
        }
    )


@contextlib.contextmanager
def worker(arguments: argparse.Namespace, config: JobConfig) -> Iterator[ShardAnnotator]:
    """Yield the annotator of a worker whose model computes nothing."""
    processes = SampleProcesses(arguments.processes, config.run.decode_bytes) if arguments.processes else None
    annotator = ShardAnnotator(
        config,
        explainer(),
        decode_threads=arguments.processes or arguments.cores,
        metadata={},
        batches_at_once=2,
        processes=processes,
    )
    with contextlib.closing(annotator):
        yield annotator


def explainer() -> ready_made.ReadyMadeLeGrad:
    """Return a model with ViT-B/16's patches and tokenizer whose computations are replaced."""
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": INPUT_SIDE}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(64, vision, text).eval()
    return ready_made.ReadyMadeLeGrad(model, tokenizer=open_clip.SimpleTokenizer(), layers=1)


@contextlib.contextmanager
def device_is_skipped() -> Iterator[None]:
    """Replace what runs on the device beside the image tower, and the copies to it and back."""

    def refined(pixels: torch.Tensor, grids: torch.Tensor, *_: object) -> torch.Tensor:
        return ready_made.ready_made_maps(len(grids), *pixels.shape[1:3])

    with (
        mock.patch("legrad.text._encode", ready_made.ready_made_rows),
        mock.patch("pipeline.annotate.engine.sent", ready_made.stacked),
        mock.patch("pipeline.annotate.maps.refined_maps", refined),
        mock.patch("pipeline.annotate.maps.in_one_trip", ready_made.as_they_are),
    ):
        yield


def one_round(annotator: ShardAnnotator, shards: Path) -> dict[str, float]:
    """Annotate all shards once, and return the rate and the CPU time of a sample."""
    sources = storage.list_shards(f"{shards}/*.tar")
    cpu_s, own_cpu_s = cpu_s_of(os.getpid()), time.process_time()
    reports = []
    wall_s = work_through(
        sources, lambda source: reports.append(annotator.annotate(source)), annotator.wait_for_room
    )
    own_cpu_s = time.process_time() - own_cpu_s
    cpu_s = cpu_s_of(os.getpid()) - cpu_s
    samples = sum(report.counts.annotated for report in reports)
    if samples != sum(report.counts.samples_in for report in reports):
        raise RuntimeError(f"{samples} samples annotated; the others failed, so the figures mean nothing")
    return {
        "samples_per_s": samples / wall_s,
        "cpu_ms_per_sample": 1000 * cpu_s / samples,
        "device_process_cpu_ms_per_sample": 1000 * own_cpu_s / samples,
    }


def floor_ms(images: Sequence[bytes], prompts: int, width: int, height: int) -> float:
    """Return the CPU time of decoding, resizing, upsampling and encoding by the libraries above, a sample."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    contents = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
    heatmap = ready_made.ready_made_maps(1, INPUT_SIDE, INPUT_SIDE)[0].float().numpy()
    upsampled = cv2.resize(heatmap, (width, height), interpolation=cv2.INTER_LINEAR)
    encodable = np.asfortranarray((upsampled > 0.5)[:, :, None].astype(np.uint8))

    def work() -> None:
        for content in contents:
            pixels = torchvision.io.decode_jpeg(content)
            functional.resize(pixels, [INPUT_SIDE, INPUT_SIDE], InterpolationMode.BICUBIC, antialias=True)
            for _ in range(prompts):
                cv2.resize(heatmap, (width, height), interpolation=cv2.INTER_LINEAR)
                coco.encode(encodable)

    work()
    return 1000 * statistics.median(cpu_s_of_call(work) for _ in range(5)) / len(contents)


def cpu_s_of_call(work: Callable[[], object]) -> float:
    """Return the CPU time that a call takes on this thread."""
    started_s = time.thread_time()
    work()
    return time.thread_time() - started_s


if __name__ == "__main__":
    main()
