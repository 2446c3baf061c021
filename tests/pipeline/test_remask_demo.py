"""Masks from stored maps over the whole demo: every rule, combination and refinement."""

from itertools import product

import pytest
import torch

from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.annotator_parts import parts_with_model
from pipeline.annotate.model import load_explainer
from pipeline.annotate.rows import SampleRows, annotation_rows
from pipeline.annotate.stored_maps import parts_from_maps
from pipeline.config.load import load_config
from pipeline.config.masks import MasksConfig
from pipeline.demo.assets import demo_shard_paths
from pipeline.run.job import prepare_job
from pipeline.run.remask import prepare_remask
from tests.helpers.processes import REPOSITORY
from tests.helpers.remasking import assert_same_masks

SETS = ("heldout", "newartist")
DEMO = REPOSITORY / "pipeline" / "demo" / "demo.yaml"
RULES = ("fixed", "otsu", "quantile", "band")
COMBINATIONS = tuple(product(("independent", "argmax"), ("none", "pamr", "par"), (None, 0)))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=SETS)
def stored(request, tmp_path_factory):
    """The configuration of a set of the demo, the model, and OUT with its maps."""
    shards = [str(path) for path in demo_shard_paths(request.param)]
    out = tmp_path_factory.mktemp(request.param) / "out"
    overrides = [f"input.shards=[{', '.join(shards)}]", f"output.dir={out}", "masks.refine=none"]
    job = prepare_job(load_config(DEMO, overrides))
    explainer = load_explainer(job.config.model, "cpu")
    annotator = ShardAnnotator(job.config, explainer, decode_threads=2, metadata=job.metadata)
    for shard in job.todo:
        annotator.annotate(shard)
    annotator.close()
    return job, explainer


@pytest.mark.parametrize(("combine", "refine", "contrast"), COMBINATIONS)
def test_every_row_of_the_demo_has_the_mask_of_a_direct_run(stored, combine, refine, contrast, tmp_path):
    job, explainer = stored
    masks = {"combine": combine, "refine": refine}
    masks |= {} if contrast is None else {"contrast": contrast}
    overrides = [f"masks.{key}={value}" for key, value in masks.items()]
    again = prepare_remask(job.folder.url, str(tmp_path / "new"), overrides)
    config = job.config.model_copy(update={"masks": job.config.masks.model_copy(update=masks)})
    by_model = explained(parts_with_model(config, explainer), job.shards)
    from_maps = explained(
        parts_from_maps(again.config, again.stamp.maps_hash, torch.device("cpu"), None), again.shards
    )
    for rule in RULES:
        expected, found = (
            rows_of(samples, with_rule(made, rule))
            for samples, made in ((by_model, config), (from_maps, again.config))
        )
        assert len(expected) > 100
        assert_same_masks(found, expected)


def with_rule(config, rule):
    masks = MasksConfig(**{**config.masks.model_dump(), "rule": rule})
    return config.model_copy(update={"masks": masks})


def explained(parts, shards):
    """The samples of shards with their maps; rules for cutting do not change these."""
    samples = []
    for shard in shards:
        items = list(parts.read(shard, Attempt()))
        for start in range(0, len(items), 8):
            ready = [
                sample
                for sample in parts.work.prepare(items[start : start + 8])
                if not isinstance(sample, SampleRows)
            ]
            samples += [
                (shard.canonical_url, sample) for sample in (parts.maps.explain(ready) if ready else ())
            ]
    return samples


class Attempt:
    """Counts nothing."""

    def counted(self, samples, _stream):
        return samples


def rows_of(samples, config):
    return {
        (url, row["sample_index"], row["prompt_index"]): {**row, "shard": url}
        for url, sample in samples
        for row in annotation_rows(sample, config)
    }
