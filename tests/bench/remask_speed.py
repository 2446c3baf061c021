"""How much faster masks are made from stored maps than by the model: samples/s of one worker for each.

    python tests/bench/remask_speed.py [--model ViT-B-16 | demo] [--samples 32] [--side 512] [--write]

The worker's own annotator, with its sample processes, annotates one shard of the demo's scenes with their two
captions, enlarged to `side` pixels; then masks of the same shard are made from the maps that it stored. Both
publish into folders. After one warm-up of each, rounds alternate; medians. ViT-B-16 has seeded weights.
Prints one JSON row without and one with refinement.
"""

import argparse
import io
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from demo_inputs import demo_files
from PIL import Image
from published import figure_parser, recording

from pipeline.annotate.model import DEMO
from pipeline.config.load import parse_config
from pipeline.config.schema import JobConfig
from pipeline.demo import assets
from pipeline.run.job import Job, prepare_job
from pipeline.run.remask import prepare_remask
from pipeline.run.worker import Annotator, build_annotator

REFINEMENTS = ("none", "par")


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = figure_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-16", help="demo, or an open_clip name, with seeded weights")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--side", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def model_section(name: str, folder: Path) -> dict[str, Any]:
    """Return the section `model`, after seeded weights were written where there are no others."""
    if name == DEMO:
        return {"name": assets.DEMO_MODEL_NAME, "pretrained": DEMO, "precision": "fp32"}
    torch.manual_seed(0)
    weights = folder / "seeded.pt"
    torch.save(open_clip.create_model(name).state_dict(), weights)
    return {"name": name, "pretrained": str(weights), "precision": "fp32"}


def written_shard(path: Path, samples: int, side: int) -> Path:
    """Write a shard of the demo's scenes, enlarged, with their captions; scenes recur where there are few."""
    with tarfile.open(assets.demo_shard_paths("heldout")[0]) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    keys = sorted(name.removesuffix(".jpg") for name in members if name.endswith(".jpg"))
    with tarfile.open(path, "w") as sink:
        for index in range(samples):
            key = keys[index % len(keys)]
            _add(sink, f"{index:05d}.jpg", _enlarged(members[f"{key}.jpg"], side))
            _add(sink, f"{index:05d}.json", members[f"{key}.json"])
    return path


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _enlarged(data: bytes, side: int) -> bytes:
    sink = io.BytesIO()
    image = Image.open(io.BytesIO(data)).resize((side, side), Image.Resampling.BICUBIC)
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def job_config(shard: Path, out: Path, model: dict[str, Any], refine: str) -> JobConfig:
    return parse_config(
        {
            "input": {"shards": str(shard), "image": "jpg", "caption": "json:captions"},
            "model": model,
            "prompts": {"source": "captions", "background": "default"},
            "masks": {"refine": refine},
            "output": {"dir": str(out)},
            "run": {"gpus_per_worker": 0},
        }
    )


def opened(job: Job, cpus: int) -> Annotator:
    return build_annotator(job.config, job.metadata, cpus, "cpu")


def seconds(annotator: Annotator, job: Job) -> float:
    started_s = time.perf_counter()
    for shard in job.shards:
        annotator.annotate(shard)
    return time.perf_counter() - started_s


def rows(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rate of both ways, for each refinement."""
    model = model_section(arguments.model, folder)
    shard = written_shard(folder / "scenes.tar", arguments.samples, arguments.side)
    for refine in REFINEMENTS:
        out = folder / f"out-{refine}"
        direct = prepare_job(job_config(shard, out, model, refine))
        by_model = opened(direct, arguments.cpus)
        seconds(by_model, direct)
        again = prepare_remask(str(out), str(folder / f"new-{refine}"), ["masks.value=0.45"])
        from_maps = opened(again, arguments.cpus)
        ways: dict[str, Callable[[], float]] = {
            "annotate": lambda one=by_model, job=direct: seconds(one, job),
            "remask": lambda one=from_maps, job=again: seconds(one, job),
        }
        ways["remask"]()
        times = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, run in ways.items():
                times[name].append(run())
        by_model.close()
        from_maps.close()
        median_s = {name: statistics.median(each) for name, each in times.items()}
        yield {
            "refine": refine,
            **{f"{name}_samples_per_s": arguments.samples / each for name, each in median_s.items()},
            "ratio": median_s["annotate"] / median_s["remask"],
        }


def main() -> None:
    """Measure both ways."""
    arguments = options()
    with (
        TemporaryDirectory() as folder,
        recording(
            __file__,
            arguments,
            data=demo_files("heldout"),
            omitted="Ray, the start of a worker, loading the model, listing shards",
        ) as record,
    ):
        for row in rows(arguments, Path(folder)):
            record("rates", row)


if __name__ == "__main__":
    main()
