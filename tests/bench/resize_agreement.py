"""What fast decoding and resizing change against the exact way, and what they cost.

    python tests/bench/resize_agreement.py [--write]

Annotates the demo's two sets with the demo's configuration under `input.resize` exact and fast, and compares
masks and heat maps; then `newartist` enlarged to 1024 x 1024 without refinement, so that every JPEG is
reduced while it is decoded. Then compares levels of colour and times at several sizes, on enlarged pictures
with noise. Prints one JSON row each.
"""

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from demo_inputs import demo_files
from PIL import Image
from published import figure_parser, recording

from legrad.images import ImageTransform, Resize
from legrad.masks.rle import decode_rle
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.model import load_explainer
from pipeline.config.load import load_config
from pipeline.demo import assets
from pipeline.output.stored_grids import stored_grid
from pipeline.shards.images import decode_image

TRANSFORM = ImageTransform(224, 224, (0.5,) * 3, (0.5,) * 3, patch_size=16)
SIZES = ((64, 48), (500, 375), (375, 500), (1600, 1200), (4000, 3000))
ROUNDS = 9
NOISE_LEVELS = 6.0


def main() -> None:
    """Measure masks and heat maps, then levels and times."""
    arguments = figure_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    with recording(__file__, arguments, data=demo_files("heldout", "newartist")) as record:
        for row in masks_rows():
            record("masks", row)
        for row in pixel_rows():
            record("pixels", row)


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
    one, two = (
        stored_grid(each["heatmap"], each["heatmap_height"], each["heatmap_width"]).ravel()
        for each in (row, other)
    )
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
                "file_kb": np.mean([len(data) for data in files]) / 1000,
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


if __name__ == "__main__":
    main()
