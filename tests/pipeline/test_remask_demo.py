"""Masks from stored maps over the whole demo: every rule, combination and refinement."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch

from pipeline.annotate import engine
from pipeline.annotate.annotator_parts import parts_with_model
from pipeline.annotate.chunk_rows import add_chunk, rows_of_chunk
from pipeline.annotate.grid_steps import grid_steps_of
from pipeline.annotate.maps import refinement_of, sample_maps
from pipeline.annotate.model import load_explainer
from pipeline.annotate.rows import SampleRows, annotation_rows, sample_rows
from pipeline.annotate.stored_maps import parts_from_maps
from pipeline.config.load import load_config
from pipeline.config.masks import MasksConfig
from pipeline.demo.assets import demo_shard_paths
from pipeline.output.writer import ShardWriter
from pipeline.run.job import prepare_job
from pipeline.run.remask import prepare_remask
from tests.helpers.processes import REPOSITORY
from tests.helpers.remasking import assert_same_masks

SETS = ("heldout", "newartist")
DEMO = REPOSITORY / "pipeline" / "demo" / "demo.yaml"
RULES = ("fixed", "otsu", "quantile", "band")
VARIANTS = tuple(product(("independent", "argmax"), ("none", "pamr", "par"), (0.6, 0.0)))
BATCH = 8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@dataclass
class Batch:
    """What the device step of a batch was given, and the samples that it returned."""

    step: tuple[tuple[Any, ...], dict[str, Any]]
    samples: list[tuple[str, Any]]


class Attempt:
    """Counts nothing."""

    def counted(self, samples, _stream):
        return samples


def explained_once(job, explainer):
    """Explain the samples of a job by its model, and write its maps; returns the batches."""
    steps, batches = [], []

    def recorded(*arguments, **options):
        steps.append((arguments, options))
        return sample_maps(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "sample_maps", recorded)
        parts = parts_with_model(job.config, explainer)
        for shard in job.shards:
            with ShardWriter(shard, {**job.metadata, "attempt": "a"}, with_maps=True) as writer:
                for ready in prepared(parts, shard):
                    samples = parts.maps.explain(ready)
                    rows = [sample_rows(sample, job.config) for sample in samples]
                    add_chunk(writer, [rows_of_chunk(rows)])
                    batches.append(Batch(steps[-1], [(shard.canonical_url, each) for each in samples]))
                writer.publish(job.folder.url)
    return batches


def prepared(parts, shard):
    """The samples of a shard that have prompts, a batch at a time."""
    items = list(parts.read(shard, Attempt()))
    for start in range(0, len(items), BATCH):
        found = parts.work.prepare(items[start : start + BATCH])
        if ready := [sample for sample in found if not isinstance(sample, SampleRows)]:
            yield ready


def by_model(batches, config, patch_size):
    """The samples with the maps that a run by other masks would make; their relevance is the same."""
    samples = []
    for batch in batches:
        (grids, chosen, texts, before), options = batch.step
        steps = grid_steps_of(config.masks, config.contrast_share, stores_maps=True)
        settings = replace(
            before,
            grid_steps=replace(steps, centre=before.grid_steps.centre),
            refinement=refinement_of(config.masks, patch_size),
        )
        maps = sample_maps(grids, chosen, texts, settings, **options)
        own = zip(batch.samples, maps, strict=True)
        samples += [(url, replace(sample, maps=each)) for (url, sample), each in own]
    return samples


def from_maps(job):
    """The samples with the maps that are made from stored ones."""
    parts = parts_from_maps(job.config, job.stamp.maps_hash, torch.device("cpu"), None)
    return [
        (shard.canonical_url, sample)
        for shard in job.shards
        for ready in prepared(parts, shard)
        for sample in parts.maps.explain(ready)
    ]


def rows_of(samples, config, rule):
    masks = MasksConfig(**{**config.masks.model_dump(), "rule": rule})
    config = config.model_copy(update={"masks": masks})
    return {
        (url, row["sample_index"], row["prompt_index"]): {**row, "shard": url}
        for url, sample in samples
        for row in annotation_rows(sample, config)
    }


@pytest.fixture(scope="module", params=SETS)
def stored(request, tmp_path_factory):
    """A set of the demo whose maps are stored: the job, the model, and its batches."""
    shards = [str(path) for path in demo_shard_paths(request.param)]
    out = tmp_path_factory.mktemp(request.param) / "out"
    job = prepare_job(load_config(DEMO, [f"input.shards=[{', '.join(shards)}]", f"output.dir={out}"]))
    explainer = load_explainer(job.config.model, "cpu")
    return job, explainer, explained_once(job, explainer)


@pytest.mark.parametrize(("combine", "refine", "contrast"), VARIANTS)
def test_every_row_of_the_demo_has_the_mask_of_a_direct_run(stored, combine, refine, contrast, tmp_path):
    job, explainer, batches = stored
    masks = {"combine": combine, "refine": refine, "contrast": contrast}
    overrides = [f"masks.{key}={value}" for key, value in masks.items()]
    again = prepare_remask(job.folder.url, str(tmp_path / "new"), overrides)
    config = job.config.model_copy(update={"masks": job.config.masks.model_copy(update=masks)})
    assert again.config.masks == config.masks
    direct, restored = by_model(batches, config, explainer.patch_size), from_maps(again)
    for rule in RULES:
        expected = rows_of(direct, config, rule)
        assert len(expected) > 250  # the smaller set has 287
        assert_same_masks(rows_of(restored, again.config, rule), expected)
