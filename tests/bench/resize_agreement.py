"""What fast decoding and resizing change against the exact way, and what they cost.

    python tests/bench/resize_agreement.py [--write]

Annotates the demo's two sets with the demo's configuration under `input.resize` exact and fast, and compares
masks and heat maps; then `newartist` enlarged to 1024 x 1024 without refinement, so that every JPEG is
reduced while it is decoded. Then compares levels of colour and times at several sizes, on enlarged pictures
with noise.
Prints one JSON row each; `--write` also replaces the tables of tests/bench/README.md.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from environment import environment
from PIL import Image
from published import publish, table

from legrad.images import ImageTransform, Resize
from legrad.masks.rle import decode_rle
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.model import load_explainer
from pipeline.config.load import load_config
from pipeline.demo import assets
from pipeline.shards.images import decode_image

TRANSFORM = ImageTransform(224, 224, (0.5,) * 3, (0.5,) * 3, patch_size=16)
SIZES = ((64, 48), (500, 375), (375, 500), (1600, 1200), (4000, 3000))
ROUNDS = 9
NOISE_LEVELS = 6.0
MASK_COLUMNS = (
    *("images", "rows", "other rows", "IoU, mean", "1st percentile", "least"),
    *("heat maps' correlation, mean", "least"),
)
PIXEL_COLUMNS = (
    *("size", "file", "levels of 255, mean", "at most"),
    *("exact, ms of CPU", "fast, ms of CPU"),
)


def main() -> None:
    """Print one JSON row a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables of tests/bench/README.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = {"bench": "resize_agreement", **environment()}
    rows = []
    for row in chain(masks_rows(), pixel_rows()):
        rows.append(row)
        print(json.dumps(head | row), flush=True)
    if options.write:
        publish(Path(__file__).name, tables(rows, head))


def masks_rows() -> Iterator[dict[str, Any]]:
    """Yield how far masks and heat maps differ, for each set."""
    for name in ("heldout", "newartist"):
        yield {"images": name} | masks_agreement(assets.demo_shard_paths(name))
    with tempfile.TemporaryDirectory() as folder:
        enlarged = [enlarged_shard(path, Path(folder)) for path in assets.demo_shard_paths("newartist")]
        reduced = masks_agreement(enlarged, "masks.refine=none")
        yield {"images": "newartist, 1024 x 1024, reduced, not refined"} | reduced


def masks_agreement(shards: list[Path], *changes: str) -> dict[str, Any]:
    """Compare the rows of both ways."""
    exact, fast = (annotated(shards, resize, *changes) for resize in ("exact", "fast"))
    places = exact.keys() & fast.keys()
    ious = [iou(exact[place]["mask"], fast[place]["mask"]) for place in places if exact[place]["mask"]]
    correlations = [correlation(exact[place], fast[place]) for place in places if exact[place]["heatmap"]]
    return {
        "rows": len(places),
        "other_rows": len(exact.keys() ^ fast.keys())
        + sum(exact[place]["status"] != fast[place]["status"] for place in places),
        "iou_mean": round(float(np.mean(ious)), 5),
        "iou_1st_percentile": round(float(np.percentile(ious, 1)), 5),
        "iou_min": round(min(ious), 5),
        "heatmap_correlation_mean": round(float(np.mean(correlations)), 6),
        "heatmap_correlation_min": round(min(correlations), 6),
    }


def annotated(shards: list[Path], resize: Resize, *changes: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the rows of a job by sample key and prompt."""
    with tempfile.TemporaryDirectory() as out:
        listed = f"input.shards={json.dumps([str(path) for path in shards])}"
        settings = [listed, f"input.resize={resize}", f"output.dir={out}", *changes]
        config = load_config(assets.demo_config_path(), settings)
        annotator = ShardAnnotator(
            config, load_explainer(config.model, "cpu"), decode_threads=1, metadata={"config_hash": "h"}
        )
        rows: list[dict[str, Any]] = []
        for shard in storage.list_shards(config.input.shards):
            annotator.annotate(shard)
            rows += pq.read_table(Path(out) / "annotations" / f"{shard.shard_id}.parquet").to_pylist()
        annotator.close()
    return {(row["key"], row["prompt_index"]): row for row in rows}


def iou(rle: dict[str, Any], other: dict[str, Any] | None) -> float:
    """Return the IoU of two masks; 0 where one is missing, 1 where both are empty."""
    if other is None:
        return 0.0
    mask, expected = decode_rle(rle), decode_rle(other)
    union = int((mask | expected).sum())
    return int((mask & expected).sum()) / union if union else 1.0


def correlation(row: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the correlation of two stored heat maps."""
    one, two = (np.frombuffer(each["heatmap"], np.uint8).astype(float) for each in (row, other))
    return float(np.corrcoef(one, two)[0, 1])


def enlarged_shard(path: Path, folder: Path) -> Path:
    """Copy a shard with its images enlarged fourfold and without ground truth."""
    target = folder / path.name
    with tarfile.open(path) as source, tarfile.open(target, "w") as sink:
        for member in source:
            if member.name.endswith(".png"):
                continue
            content = source.extractfile(member).read()
            if member.name.endswith(".jpg"):
                image = Image.open(io.BytesIO(content))
                content = as_jpeg(image.resize((1024, 1024), Image.Resampling.BICUBIC))
            member.size = len(content)
            sink.addfile(member, io.BytesIO(content))
    return target


def pixel_rows() -> Iterator[dict[str, Any]]:
    """Yield how far levels differ and what both ways cost, for each size."""
    with tarfile.open(assets.demo_shard_paths("heldout")[0]) as tar:
        images = [Image.open(tar.extractfile(member)) for member in tar if member.name.endswith(".jpg")][:6]
        for width, height in SIZES:
            files = [as_jpeg(with_noise(image, width, height)) for image in images]
            exact, fast = ([decoded(data, resize) for data in files] for resize in ("exact", "fast"))
            off = np.abs(np.stack(exact).astype(int) - np.stack(fast))
            yield {
                "size": f"{width}x{height}",
                "file_bytes": int(np.mean([len(data) for data in files])),
                "levels_mean": round(float(off.mean()), 4),
                "levels_max": int(off.max()),
                **costs(files),
            }


def costs(files: list[bytes]) -> dict[str, float]:
    """Return the median milliseconds of CPU a sample of each way, in alternating rounds."""
    found: dict[str, list[float]] = {"exact": [], "fast": []}
    for _ in range(ROUNDS):
        for resize, times in found.items():
            times.append(cpu_ms(lambda resize=resize: [decoded(data, resize) for data in files]) / len(files))
    return {f"{resize}_ms": round(median(times), 3) for resize, times in found.items()}


def cpu_ms(work: Callable[[], object]) -> float:
    """Return the CPU time that something takes on this thread."""
    before = time.thread_time()
    work()
    return 1000 * (time.thread_time() - before)


def decoded(data: bytes, resize: Resize) -> np.ndarray:
    """Return an image at the size of the model's input."""
    return decode_image(data, TRANSFORM, max_image_pixels=10**8, resize=resize).pixels


def with_noise(image: Image.Image, width: int, height: int) -> Image.Image:
    """Enlarge a picture and add the noise of a camera, without which a large JPEG would have few bits."""
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    noise = np.random.default_rng(0).normal(0, NOISE_LEVELS, (height, width, 1))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def as_jpeg(image: Image.Image) -> bytes:
    """Encode an image as cameras do."""
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def tables(rows: list[dict[str, Any]], head: dict[str, Any]) -> list[str]:
    """Return the tables of all rows."""
    return [
        f"Commit {head['commit']}, {head['processor']} (load {head['load_1min']}), one thread, "
        f"medians of {ROUNDS} rounds in turn.",
        "",
        *table(MASK_COLUMNS, [mask_cells(row) for row in rows if "images" in row]),
        "",
        *table(PIXEL_COLUMNS, [pixel_cells(row) for row in rows if "size" in row]),
    ]


def mask_cells(row: dict[str, Any]) -> list[object]:
    """Return the cells of a set of images, in the order of MASK_COLUMNS."""
    return [
        row["images"],
        row["rows"],
        row["other_rows"],
        f"{row['iou_mean']:.4f}",
        f"{row['iou_1st_percentile']:.4f}",
        f"{row['iou_min']:.4f}",
        f"{row['heatmap_correlation_mean']:.5f}",
        f"{row['heatmap_correlation_min']:.5f}",
    ]


def pixel_cells(row: dict[str, Any]) -> list[object]:
    """Return the cells of a size, in the order of PIXEL_COLUMNS."""
    return [
        row["size"],
        f"{row['file_bytes'] / 1000:.0f} kB",
        f"{row['levels_mean']:.3f}",
        row["levels_max"],
        f"{row['exact_ms']:.2f}",
        f"{row['fast_ms']:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
