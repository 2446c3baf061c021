"""CPU cores that one GPU needs, from what a sample costs a core on its way in and out.

    python tests/bench/cores_per_gpu.py [--side 500x375] [--prompts 1 4 16] [--gpu-samples-per-s 1000 5000]

CPU seconds of one thread (not wall time, so that other work on the machine matters little): reading the tar,
decoding and resizing to the model's input, masks (upsampling, Otsu's cut, RLE) at the image's own size and at
a longest side of 256, rows into Parquet. Images are smooth random pictures stored as JPEG of quality 90.
Cores = samples/s of the GPU x CPU seconds a sample. Medians over rounds after a warm-up. One JSON row.
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from environment import environment
from PIL import Image

from legrad.images import ImageTransform
from legrad.masks.grids import grid_to_masks
from legrad.masks.thresholds import MaskRule
from pipeline.output.label_map import mask_frame
from pipeline.output.writer import ShardWriter
from pipeline.shards.images import DecodedImage, decode_image
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage import ShardSource

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
IMAGES = 64
GRID = 14


def jpeg(seed: int, width: int, height: int) -> bytes:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def cpu_seconds(work: Callable[[], object], samples: int, rounds: int) -> float:
    taken = []
    for _ in range(rounds + 1):
        started_s = time.thread_time()
        work()
        taken.append((time.thread_time() - started_s) / samples)
    return statistics.median(taken[1:])


def read(tar: bytes) -> list[RawSample]:
    items = read_samples(io.BytesIO(tar), max_member_bytes=64 << 20)
    return [item for item in items if isinstance(item, RawSample)]


def tar_of(contents: list[bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number, content in enumerate(contents):
            for field, data in {"jpg": content, "txt": b"a dog beside a car"}.items():
                info = tarfile.TarInfo(f"{number:06d}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def masks_of(image: DecodedImage, grids: torch.Tensor, max_side: int | None) -> list[dict]:
    height, width = mask_frame(image.image_height, image.image_width, max_side)
    masks = grid_to_masks(grids, height, width, MaskRule("otsu", 0.5))
    return [
        {
            "key": "k",
            "sample_index": 0,
            "prompt_index": index,
            "prompt": "a dog",
            "status": "ok",
            "area": int(masks.areas[index]),
            "bbox_xywh": masks.bboxes_xywh[index].tolist(),
            "mask": masks.rles[index],
        }
        for index in range(len(grids))
    ]


def write(rows: list[list[dict]], folder: Path) -> None:
    with ShardWriter(ShardSource("bench", "bench", "bench", None), {}) as writer:
        for of_sample in rows:
            writer.add_sample(of_sample, [])
        writer.publish(str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", default="500x375", help="WIDTHxHEIGHT of the images")
    parser.add_argument("--input-side", type=int, default=224, help="of the model's input")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--gpu-samples-per-s", type=float, nargs="+", default=[1000, 2500, 5000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    width, height = map(int, arguments.side.split("x"))
    contents = [jpeg(seed, width, height) for seed in range(IMAGES)]
    transform = ImageTransform(arguments.input_side, arguments.input_side, MEAN, STD)
    tar = tar_of(contents)

    def decode_all() -> list[DecodedImage]:
        return [decode_image(content, transform, max_image_pixels=10**8) for content in contents]

    def timed(work: Callable[[], object]) -> float:
        return cpu_seconds(work, IMAGES, arguments.rounds)

    images = decode_all()
    costs = {"read_s": timed(lambda: read(tar)), "decode_and_resize_s": timed(decode_all)}
    by_prompts = {}
    for prompts in arguments.prompts:
        grids = torch.rand(IMAGES, prompts, GRID, GRID)
        for frame, max_side in {"original": None, "side_256": 256}.items():

            def mask_all(grids: torch.Tensor = grids, max_side: int | None = max_side) -> list[list[dict]]:
                return [masks_of(image, of, max_side) for image, of in zip(images, grids, strict=True)]

            rows = mask_all()
            with tempfile.TemporaryDirectory() as folder:
                write_s = timed(lambda rows=rows, folder=folder: write(rows, Path(folder)))
            masks_s = timed(mask_all)
            sample_s = sum(costs.values()) + masks_s + write_s
            by_prompts[f"{prompts} prompts, masks {frame}"] = {
                "masks_and_rle_s": masks_s,
                "write_s": write_s,
                "sample_s": sample_s,
                "cores": {f"{rate:g}/s": round(rate * sample_s, 1) for rate in arguments.gpu_samples_per_s},
            }
    row = {"benchmark": "cores_per_gpu", **environment(), "settings": vars(arguments), **costs}
    print(json.dumps({**row, "jpeg_bytes": statistics.mean(map(len, contents)), "by_prompts": by_prompts}))


if __name__ == "__main__":
    main()
