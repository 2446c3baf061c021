"""Score the maps that a job cuts its masks from, caught between the device step and the masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from legrad.heatmaps import heatmap_columns
from legrad.quality.metrics import Estimate, average_precision, bootstrap_mean, pointing_hits
from pipeline.annotate.engine import Engine
from pipeline.annotate.sample_states import ExplainedSample
from pipeline.shards.ground_truth import Scene

Caught = dict[str, ExplainedSample]


@contextmanager
def caught_maps() -> Iterator[Caught]:
    """Keep what the engines of this process explain while the body runs, by sample key."""
    found: Caught = {}
    explain = Engine.explain

    def explain_and_keep(engine: Engine, samples: Any) -> list[ExplainedSample]:
        explained = explain(engine, samples)
        found.update({sample.key: sample for sample in explained})
        return explained

    with mock.patch.object(Engine, "explain", explain_and_keep):
        yield found


def cut_map_scores(caught: Mapping[str, ExplainedSample], scenes: Iterable[Scene]) -> dict[str, Estimate]:
    """Return pointing and average precision of the maps of visible objects, at the size of the images.

    Args:
        caught: samples whose prompts are the captions of their scenes' objects, in order.
        scenes: with label maps.
    """
    found = [(*scored, number) for number, scene in enumerate(scenes) for scored in _scores(caught, scene)]
    pointing, precision, scene_of_map = map(np.array, zip(*found, strict=True))
    return {
        "map_pointing": bootstrap_mean(pointing, scene_of_map),
        "map_average_precision": bootstrap_mean(precision, scene_of_map),
    }


def _scores(caught: Mapping[str, ExplainedSample], scene: Scene) -> Iterator[tuple[float, float]]:
    sample = caught[scene.key]
    maps, ordinals = sample.maps, [prompt.index for prompt in sample.prompts]
    for index in scene.visible_objects():
        own = maps.cut_maps[maps.map_of_prompt[ordinals.index(index)]].astype(np.float32)
        columns = heatmap_columns(own, sample.image_height, sample.image_width, maps.normalisation)
        heatmap, truth = np.ascontiguousarray(columns.T), scene.object_mask(index)
        hit = pointing_hits(heatmap[None], truth[None], scene.valid[None])[0]
        yield float(hit), float(average_precision(heatmap, truth, scene.valid))
