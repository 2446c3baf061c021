"""Milliseconds an image by what it is asked for, and captions/s searched for the mention of 600 classes.

    python tests/bench/prompts_cost.py [--rounds 5] [--images 128] [--threads 2]

The device step alone, on decoded images of the demo in memory: encode, similarities, maps; texts are embedded
in the warm-up. Recipes alternate; medians of wall time, and of processor time, which other work hardly
changes. The search runs on one core, over made-up captions with one to three names of ImageNet classes in
each. Prints one JSON row.
"""

import argparse
import json
import random
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
from environment import environment
from open_clip import IMAGENET_CLASSNAMES

import legrad
from pipeline import storage
from pipeline.annotate.engine import Engine
from pipeline.annotate.model import load_explainer
from pipeline.annotate.sample_states import PreparedSample
from pipeline.cli.demo import demo_config
from pipeline.config.classes import class_entries
from pipeline.config.schema import JobConfig, PromptsConfig
from pipeline.demo import assets
from pipeline.prompts.mentions import MentionFinder
from pipeline.prompts.sample_prompts import SamplePrompts, companions_of
from pipeline.shards.fields import find_field
from pipeline.shards.images import decode_image
from pipeline.shards.samples import RawSample, read_samples

CLASSES = {"source": "classes", "classes": str(assets.demo_classes_path())}
RECIPES = {
    "captions": {"source": "captions"},
    "captions, 7 templates": {"source": "captions", "templates": "simple-imagenet"},
    "classes mentioned": {**CLASSES, "mentioned_in": "json:caption"},
    "64 classes, 4 with maps": {**CLASSES, "max_per_sample": 4},
    "64 classes, 32 with maps": {**CLASSES, "max_per_sample": 32},
    "captions, 4 backgrounds": {"source": "captions", "background": "default"},
    "captions, neutral": {"source": "captions", "neutral": "a photo of a"},
}
FILLER = ("a photo of", "the", "in", "with", "on", "two", "small", "red", "near", "beside", "standing")
SEARCHED = 20_000
SEARCHED_CLASSES = 600


def raw_samples(config: JobConfig, number: int) -> list[RawSample]:
    found: list[RawSample] = []
    for shard in storage.list_shards(config.input.shards):
        with storage.open_shard(shard) as stream:
            items = read_samples(stream, max_member_bytes=config.input.max_member_bytes)
            found += islice((item for item in items if isinstance(item, RawSample)), number - len(found))
    return found


def prepared(config: JobConfig, explainer: legrad.LeGrad, samples: list[RawSample]) -> list[PreparedSample]:
    sample_prompts = SamplePrompts(config)
    found = []
    for sample in samples:
        content = find_field(sample.fields, config.input.image)
        limit = config.input.max_image_pixels
        image = decode_image(content, explainer.transform, max_image_pixels=limit)
        size = (image.image_height, image.image_width)
        prompts = sample_prompts.of(sample.fields).prompts
        found.append(PreparedSample(sample.index, sample.key, *size, image.canvases, prompts))
    return found


def step_s(engine: Engine, samples: list[PreparedSample], batch_size: int) -> tuple[float, float, int]:
    """Seconds, seconds of the processor, and maps of prompts."""
    started_s, started_processor_s, maps = time.perf_counter(), time.process_time(), 0
    for start in range(0, len(samples), batch_size):
        explained = engine.explain(samples[start : start + batch_size])
        maps += sum(len(sample.prompts) for sample in explained)
    return time.perf_counter() - started_s, time.process_time() - started_processor_s, maps


def per_image_ms(seconds: dict[str, list[float]], images: int) -> dict[str, float]:
    return {recipe: round(statistics.median(found) / images * 1000, 2) for recipe, found in seconds.items()}


def captions_per_s() -> float:
    names = list(dict.fromkeys(name.lower() for name in IMAGENET_CLASSNAMES))[:SEARCHED_CLASSES]
    finder = MentionFinder(class_entries(names))
    choose = random.Random(0)
    captions = []
    for _ in range(SEARCHED):
        words = choose.choices(FILLER, k=choose.randint(6, 14))
        for _ in range(choose.randint(1, 3)):
            words.insert(choose.randrange(len(words)), choose.choice(names))
        captions.append(" ".join(words))
    seconds = []
    for _ in range(3):
        started_s = time.perf_counter()
        for caption in captions:
            finder.mentioned(caption)
        seconds.append(time.perf_counter() - started_s)
    return SEARCHED / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = demo_config(Path("unused"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    explainer = load_explainer(config.model, device)
    raw = raw_samples(config, options.images)
    batch_size = config.run.batch_size if config.run.batch_size != "auto" else 32
    engines, samples = {}, {}
    for recipe, settings in RECIPES.items():
        prompts = PromptsConfig.model_validate(settings)
        engines[recipe] = Engine(
            explainer, prompts.max_per_sample, batch_size, companions=companions_of(prompts)
        )
        samples[recipe] = prepared(config.model_copy(update={"prompts": prompts}), explainer, raw)
    seconds: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    processor_s: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    maps = {}
    for round_number in range(options.rounds + 1):
        for recipe in RECIPES:
            elapsed_s, spent_s, maps[recipe] = step_s(engines[recipe], samples[recipe], batch_size)
            if round_number:
                seconds[recipe].append(elapsed_s)
                processor_s[recipe].append(spent_s)
    print(
        json.dumps(
            {
                "benchmark": "prompts_cost",
                **environment(),
                "device": device,
                "threads": options.threads,
                "model": config.model.model_dump(),
                "batch_size": batch_size,
                "images": len(raw),
                "rounds": options.rounds,
                "ms_per_image": per_image_ms(seconds, len(raw)),
                "processor_ms_per_image": per_image_ms(processor_s, len(raw)),
                "prompt_maps_per_image": {
                    recipe: round(found / len(raw), 2) for recipe, found in maps.items()
                },
                "captions_searched_per_s": round(captions_per_s()),
            }
        )
    )


if __name__ == "__main__":
    main()
