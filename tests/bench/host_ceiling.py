"""Samples/s of one worker whose device takes no time: model, text tower and refinement are left out.

    python tests/bench/host_ceiling.py [--side 500x375] [--prompts 1] [--cores 2] [--processes 2]

Everything else is real, as a worker runs it: tar, JPEG, captions and CLIP's tokenizer, batches put together
in memory that is used again (as page-locked memory is), masks from refined maps of 224 x 224 in half
precision, RLE, Parquet on the local disk, the next shard begun when there is room. Features, text rows,
relevance grids and refined maps are ready-made; copies to and from the device are left out as well. Images
are smooth random pictures, JPEG of quality 90; every caption has 13 random words. One worker on `--cores`
cores, with `--processes` sample processes (0: threads of its own).

The floor is what pixels and masks alone need, measured in the same run on one thread: torchvision's
decode_jpeg and its antialiased bicubic resize on uint8 to 224 x 224, and for each prompt OpenCV's bilinear
resize of one float map to the image and pycocotools' encoding of one uint8 mask.

CPU time is that of all processes, and that of the process with the device alone. Rounds after a warm-up;
medians. Prints one JSON row.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import open_clip
import ready_made
import torch
import torchvision
from environment import environment
from PIL import Image
from pycocotools import mask as coco
from shards_in_flight import work_through
from torchvision.transforms.v2 import InterpolationMode, functional

from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.processes import SampleProcesses
from pipeline.config.load import parse_config

INPUT_SIDE = 224
WORDS = (
    "a",
    "red",
    "dog",
    "cat",
    "house",
    "tree",
    "river",
    "boy",
    "girl",
    "under",
    "green",
    "sky",
    "wide",
    "street",
)
IMAGES = 64


def jpeg(seed: int, width: int, height: int) -> bytes:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def write_shards(folder: Path, arguments: argparse.Namespace, images: Sequence[bytes]) -> None:
    generator = np.random.default_rng(0)
    for shard in range(arguments.shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(arguments.samples):
                captions = [" ".join(generator.choice(WORDS, 13)) for _ in range(arguments.prompts)]
                add(tar, f"{number:06d}.jpg", images[number % len(images)])
                add(tar, f"{number:06d}.json", json.dumps({"captions": captions}).encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def floor_ms(images: Sequence[bytes], prompts: int, width: int, height: int) -> float:
    """What decoding, resizing, upsampling and encoding take by the libraries named above, ms a sample."""
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

    return 1000 * median_of(lambda: timed(work, time.thread_time)) / len(contents)


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started_s = clock()
    work()
    return clock() - started_s


def median_of(measure: Callable[[], float], rounds: int = 5) -> float:
    measure()
    return statistics.median(measure() for _ in range(rounds))


def cpu_s_of(pid: int) -> float:
    """CPU time of a process and of its live descendants."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task").glob("*/children")
        below = [int(child) for path in children for child in path.read_text().split()]
    except OSError:
        return 0.0
    own_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own_s + sum(map(cpu_s_of, below))


@contextlib.contextmanager
def device_takes_no_time() -> Iterator[None]:
    def refined(pixels: torch.Tensor, grids: torch.Tensor, *_: object) -> torch.Tensor:
        return ready_made.ready_made_maps(len(grids), *pixels.shape[1:3])

    with (
        mock.patch("legrad.text._encode", ready_made.ready_made_rows),
        mock.patch("pipeline.annotate.engine.sent", ready_made.stacked),
        mock.patch("pipeline.annotate.maps.refined_maps", refined),
        mock.patch("pipeline.annotate.maps.in_one_trip", ready_made.as_they_are),
    ):
        yield


def explainer() -> ready_made.ReadyMadeLeGrad:
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": INPUT_SIDE}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(64, vision, text).eval()
    return ready_made.ReadyMadeLeGrad(model, tokenizer=open_clip.SimpleTokenizer(), layers=1)


class Worker:
    def __init__(self, arguments: argparse.Namespace, shards: Path, out: Path) -> None:
        self.config = parse_config(
            {
                "input": {
                    "shards": f"{shards}/*.tar",
                    "caption": "json:captions",
                    "resize": arguments.resize,
                },
                "model": {"name": "ViT-B-16", "pretrained": "openai"},
                "prompts": {"source": "captions"},
                "masks": {"refine": "par"},
                "output": {"dir": str(out)},
                "run": {"batch_size": arguments.batch_size},
            }
        )
        self.sources = storage.list_shards(self.config.input.shards)
        self.samples = arguments.shards * arguments.samples
        self.annotator = ShardAnnotator(
            self.config,
            explainer(),
            decode_threads=arguments.processes or arguments.cores,
            metadata={},
            batches_at_once=2,
            processes=SampleProcesses(arguments.processes, 2**30) if arguments.processes else None,
        )

    def round(self) -> dict[str, float]:
        cpu_s, own_cpu_s = cpu_s_of(os.getpid()), time.process_time()
        wall_s = work_through(self.sources, self.annotator.annotate, self.annotator.wait_for_room)
        counts = self.annotator.live_counts()
        assert not counts.samples_in
        return {
            "samples_per_s": self.samples / wall_s,
            "cpu_ms_per_sample": 1000 * (cpu_s_of(os.getpid()) - cpu_s) / self.samples,
            "device_process_cpu_ms_per_sample": 1000 * (time.process_time() - own_cpu_s) / self.samples,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", default="500x375", help="WIDTHxHEIGHT of the images")
    parser.add_argument("--prompts", type=int, default=1, help="captions of a sample")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--processes", type=int, help="sample processes; default: as many as cores")
    parser.add_argument("--resize", default="fast", help="input.resize")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=500, help="of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.processes is None:
        arguments.processes = arguments.cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    width, height = map(int, arguments.side.split("x"))
    images = [jpeg(seed, width, height) for seed in range(IMAGES)]
    with tempfile.TemporaryDirectory() as folder, device_takes_no_time():
        shards, out = Path(folder, "shards"), Path(folder, "out")
        shards.mkdir()
        write_shards(shards, arguments, images)
        worker = Worker(arguments, shards, out)
        rounds = [worker.round() for _ in range(arguments.rounds + 1)][1:]
        worker.annotator.close()
    row = {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}
    floor = round(floor_ms(images, arguments.prompts, width, height), 3)
    print(
        json.dumps(
            {
                "benchmark": "host_ceiling",
                **environment(),
                "settings": vars(arguments),
                **row,
                "floor_ms_per_sample": floor,
                "ratio": round(row["cpu_ms_per_sample"] / floor, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
