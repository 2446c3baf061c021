"""Milliseconds an image by what it is asked for, and captions/s searched for the mention of 600 classes.

    python tests/bench/prompts_cost.py [--rounds 5] [--images 128] [--threads 2] [--write]

The device step alone, on decoded images of the demo in memory: encode, similarities, maps; texts are embedded
in the warm-up. Recipes alternate; medians of wall time, and of processor time, which other work hardly
changes. The search runs on one core, over made-up captions with one to three names of ImageNet classes in
each. Prints one JSON row a recipe.
"""

import random
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from demo_inputs import PUBLISHED_SETS, demo_files, demo_job
from open_clip import IMAGENET_CLASSNAMES
from published import figure_parser, recording

import legrad
from pipeline import storage
from pipeline.annotate.engine import Engine
from pipeline.annotate.model import load_explainer
from pipeline.annotate.sample_states import PreparedSample
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
    """Measure each recipe, and the search for mentions."""
    parser = figure_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with recording(__file__, arguments, data=demo_files(*PUBLISHED_SETS)) as record:
        for row in recipe_rows(arguments.rounds, arguments.images):
            record("recipes", row)
        record("search", {"classes": SEARCHED_CLASSES, "captions_per_s": captions_per_s()})


def recipe_rows(rounds: int, images: int) -> Iterator[dict[str, Any]]:
    """Yield the medians of each recipe; recipes alternate, after a warm-up of each."""
    config = demo_job(PUBLISHED_SETS)
    explainer = load_explainer(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    raw = raw_samples(config, images)
    batch_size = config.run.batch_size if config.run.batch_size != "auto" else 32
    engines, samples = {}, {}
    for recipe, settings in RECIPES.items():
        prompts = PromptsConfig.model_validate(settings)
        engines[recipe] = Engine(
            explainer, prompts.max_per_sample, batch_size, companions=companions_of(prompts)
        )
        samples[recipe] = prepared(config.model_copy(update={"prompts": prompts}), explainer, raw)
    steps: dict[str, list[tuple[float, float, int]]] = {recipe: [] for recipe in RECIPES}
    for _ in range(rounds + 1):
        for recipe, found in steps.items():
            found.append(step_s(engines[recipe], samples[recipe], batch_size))
    for recipe, found in steps.items():
        wall_s, cpu_s, maps = map(statistics.median, zip(*found[1:], strict=True))
        yield {
            "recipe": recipe,
            "wall_ms_an_image": 1000 * wall_s / len(raw),
            "cpu_ms_an_image": 1000 * cpu_s / len(raw),
            "maps_an_image": maps / len(raw),
        }


if __name__ == "__main__":
    main()
