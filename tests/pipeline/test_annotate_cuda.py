"""The shard annotator and its device step on CUDA: the same rows as on the CPU, in steps that wait rarely."""

import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch

from legrad.masks.refine import Refinement
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.engine import Engine
from pipeline.annotate.model import load_explainer
from pipeline.annotate.trial import TrialSamples
from pipeline.config.schema import ModelConfig
from pipeline.demo import assets
from pipeline.shards.images import WHOLE_IMAGE
from tests.helpers.corpus import demo_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def annotate_demo_shard(out, device, **model):
    shards = assets.demo_shard_paths("heldout")[:1]
    config = demo_job(
        shards,
        out,
        input={"caption": "json:captions"},
        prompts={"source": "captions"},
        model={"layers": 4, **model},
        run={"batch_size": 24},
    )
    explainer = load_explainer(config.model, device)
    annotator = ShardAnnotator(config, explainer, decode_threads=4, metadata={})
    report = annotator.annotate(storage.list_shards(config.input.shards)[0])
    annotator.close()
    assert report.counts.failed == 0
    return ds.dataset(out / "annotations", format="parquet").to_table().to_pylist()


@pytest.mark.parametrize(
    ("precision", "similarity_error", "area_share"), [("fp32", 1e-3, 0.01), ("bf16", 0.02, 0.1)]
)
def test_masks_made_on_cuda_are_those_made_on_the_cpu(tmp_path, precision, similarity_error, area_share):
    on_cpu = annotate_demo_shard(tmp_path / "cpu", "cpu")
    on_cuda = annotate_demo_shard(tmp_path / "cuda", "cuda", precision=precision)
    assert [(row["key"], row["prompt"]) for row in on_cuda] == [(row["key"], row["prompt"]) for row in on_cpu]
    differing_areas = []
    for left, right in zip(on_cpu, on_cuda, strict=True):
        assert left["similarity"] == pytest.approx(right["similarity"], abs=similarity_error)
        pixels = left["image_height"] * left["image_width"]
        differing_areas.append(abs(left["area"] - right["area"]) / pixels)
    assert sum(differing_areas) / len(differing_areas) < area_share


@pytest.fixture
def explainer():
    return load_explainer(ModelConfig(name=assets.DEMO_MODEL_NAME, pretrained="demo"), "cuda")


def test_batches_on_streams_of_their_own_give_the_same_as_one_after_the_other(explainer):
    trial = TrialSamples(explainer.transform, WHOLE_IMAGE, 2)
    noise = np.random.default_rng(0)
    batches = [
        [
            replace(sample, canvases=(noise.integers(0, 256, (96, 96, 3), dtype=np.uint8),))
            for sample in trial.batch(32)
        ]
        for _ in range(12)
    ]
    one = [Engine(explainer, 32, 32, refinement=Refinement()).explain(batch) for batch in batches]
    engine = Engine(explainer, 32, 32, batches_at_once=2, refinement=Refinement())
    with ThreadPoolExecutor(2) as threads:
        two = list(threads.map(engine.explain, batches))
    for expected, received in zip(one, two, strict=True):
        for left, right in zip(expected, received, strict=True):
            similarities = [[prompt.similarity for prompt in each.prompts] for each in (left, right)]
            assert similarities[0] == pytest.approx(similarities[1], abs=1e-5)


def test_a_step_waits_for_the_device_at_most_ten_times_and_its_clock_counts_the_device(explainer):
    trial = TrialSamples(explainer.transform, WHOLE_IMAGE, 1)
    engine = Engine(explainer, 32, 64, refinement=Refinement())
    engine.warm_up(trial.batch(64))
    engine.clock.take_busy_s()
    batch, started_s = trial.batch(64), time.perf_counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.explain(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) <= 10
    assert 0 < engine.clock.take_busy_s() <= time.perf_counter() - started_s


def test_single_precision_embeds_patches_as_precisely_as_the_cpu(explainer):
    on_cpu = load_explainer(ModelConfig(name=assets.DEMO_MODEL_NAME, pretrained="demo"), "cpu")
    images = torch.randn(8, 3, 96, 96)
    expected = on_cpu.encode(images).image_features
    received = explainer.encode(images.cuda()).image_features.cpu()
    # TF32 would differ by a thousandth
    assert (received - expected).abs().max() < 1e-5
