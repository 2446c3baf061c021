"""Samples/s of the shard annotator beside the bare engine on the same images in memory; left out: Ray.

    python tests/bench/annotate_throughput.py [--rounds 5] [--write]

The engine: decoded images in memory, text embedding included, relevance grids of one view out; one batch at
a time, with all cores. The annotator, as a worker builds it: tar, decoding, all that the demo's configuration
asks of the device (two views, background texts, refinement), masks, RLE, Parquet, published on the local
disk, the next shard begun when there is room. Rounds alternate after one warm-up of each; medians. Prints one
JSON row.
"""

import os
import statistics
import tempfile
import time

import torch
from demo_inputs import PUBLISHED_SETS, demo_files, demo_job
from published import figure_parser, recording
from shards_in_flight import work_through

import legrad
from pipeline import storage
from pipeline.annotate.batch_size import CPU_BATCH_SIZE
from pipeline.annotate.engine import Engine
from pipeline.annotate.model import load_explainer
from pipeline.annotate.sample_states import PreparedSample
from pipeline.config.schema import JobConfig
from pipeline.prompts.sample_prompts import Prompt
from pipeline.run.worker import build_annotator
from pipeline.shards.captions import read_captions
from pipeline.shards.fields import find_field
from pipeline.shards.images import decode_image
from pipeline.shards.samples import RawSample, read_samples


def samples_in_memory(config: JobConfig, explainer: legrad.LeGrad) -> list[PreparedSample]:
    samples = []
    for shard in storage.list_shards(config.input.shards):
        with storage.open_shard(shard) as stream:
            for item in read_samples(stream, max_member_bytes=config.input.max_member_bytes):
                assert isinstance(item, RawSample)
                captions = read_captions(item.fields, config.input.caption, several=True)
                image = decode_image(
                    find_field(item.fields, config.input.image),
                    explainer.transform,
                    max_image_pixels=config.input.max_image_pixels,
                    resize=config.input.resize,
                )
                prompts = tuple(Prompt(i, text) for i, text in enumerate(captions) if isinstance(text, str))
                size = (image.image_height, image.image_width)
                samples.append(PreparedSample(item.index, item.key, *size, image.canvases, prompts))
    return samples


def engine_seconds(
    config: JobConfig, explainer: legrad.LeGrad, samples: list[PreparedSample], cores: int
) -> float:
    torch.set_num_threads(cores)
    # what `auto` is on a CPU
    size = CPU_BATCH_SIZE if config.run.batch_size == "auto" else config.run.batch_size
    engine = Engine(explainer, config.prompts.max_per_sample, size)
    started_s = time.perf_counter()
    for start in range(0, len(samples), size):
        engine.explain(samples[start : start + size])
    return time.perf_counter() - started_s


def annotator_seconds(config: JobConfig, cores: int, device: str) -> float:
    with tempfile.TemporaryDirectory() as out:
        here = config.model_copy(update={"output": config.output.model_copy(update={"dir": out})})
        annotator = build_annotator(here, {}, cores, device)
        elapsed_s = work_through(
            storage.list_shards(config.input.shards), annotator.annotate, annotator.wait_for_room
        )
        annotator.close()
    return elapsed_s


def main() -> None:
    """Measure both in turn."""
    parser = figure_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = demo_job(PUBLISHED_SETS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0))
    explainer = load_explainer(config.model, device)
    samples = samples_in_memory(config, explainer)
    timings = []
    with recording(__file__, arguments, data=demo_files(*PUBLISHED_SETS)) as record:
        for _ in range(arguments.rounds + 1):
            engine_s = engine_seconds(config, explainer, samples, cores)
            timings.append((engine_s, annotator_seconds(config, cores, device)))
        engine_s, annotator_s = map(statistics.median, zip(*timings[1:], strict=True))
        row = {
            "samples": len(samples),
            "prompts": sum(len(sample.prompts) for sample in samples),
            "engine_samples_per_s": len(samples) / engine_s,
            "annotator_samples_per_s": len(samples) / annotator_s,
            "annotator_over_engine": engine_s / annotator_s,
        }
        record("rates", row)


if __name__ == "__main__":
    main()
