"""AP of instances: perfect ones, merged ones, what does not count, and the command from end to end."""

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.evaluation.mask_scores import WrittenMasks, score_written_masks
from pipeline.evaluation.rendering import render_evaluation
from pipeline.evaluation.result import EvaluationResult
from pipeline.evaluation.scene_masks import score_scene
from pipeline.shards.ground_truth import Scene, scene_of
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample
from tests.helpers.ground_truth_shards import label_map, png, scene_fields
from tests.pipeline.test_scene_masks import rle, row

# two dogs that touch, a car, and pixels that do not count
INSTANCES = label_map({1: (2, 10, 2, 12), 2: (2, 10, 12, 20), 3: (12, 20, 20, 30), 255: (20, 24, 0, 40)})
LABELS = label_map({7: (2, 10, 2, 20), 9: (12, 20, 20, 30), 255: (20, 24, 0, 40)})
FIRST, SECOND, CAR = (number == INSTANCES for number in (1, 2, 3))


def instance(mask: np.ndarray, score: float = 0.9) -> dict[str, Any]:
    return {"area": int(mask.sum()), "bbox_xywh": [0.0] * 4, "score": score, "mask": rle(mask)}


def scores_of(*rows: dict[str, Any], source: str = "captions") -> dict[str, Any]:
    scene = Scene("key", 0, b"", ("dogs", "a car"), (7, 9), LABELS, instance_map=INSTANCES)
    written = WrittenMasks((score_scene(scene, rows, source),), 0, 0, ())
    return {scores.kind: scores for scores in score_written_masks(written).instances}


def with_instances(index: int, *masks: np.ndarray) -> dict[str, Any]:
    return row(index, np.logical_or.reduce(masks), instances=[instance(mask) for mask in masks])


def test_perfect_instances_have_an_average_precision_of_one():
    found = scores_of(with_instances(0, FIRST, SECOND), with_instances(1, CAR))
    assert found["instances"].average_precision.value == pytest.approx(1)
    assert found["instances"].average_precision_50.value == pytest.approx(1)
    assert (found["instances"].truth, found["instances"].found) == (3, 3)


def test_instances_that_are_merged_have_a_lower_one_and_so_have_connected_parts():
    merged = scores_of(with_instances(0, FIRST | SECOND), with_instances(1, CAR))
    assert merged["instances"].average_precision.value < 0.9
    assert merged["connected parts"].average_precision.value < 0.9


def test_without_the_column_only_connected_parts_are_scored():
    (kind,) = scores_of(row(0, FIRST | SECOND), row(1, CAR))
    assert kind == "connected parts"


def test_parts_that_do_not_touch_are_instances_of_a_mask_without_the_column():
    apart = FIRST & (np.arange(40) < 11)
    found = scores_of(row(0, apart | SECOND), row(1, CAR))
    assert found["connected parts"].found == 3
    assert found["connected parts"].average_precision_50.value == pytest.approx(1)


def test_pixels_that_do_not_count_change_nothing():
    ignored = INSTANCES == 255
    found = scores_of(with_instances(0, FIRST | ignored, SECOND), with_instances(1, CAR))
    assert found["instances"].average_precision.value == pytest.approx(1)
    alone = scores_of(with_instances(0, FIRST, SECOND, ignored), with_instances(1, CAR))
    assert alone["instances"].found == 3


def test_rejected_rows_have_no_instance():
    rejected = row(1, None, instances=None)
    found = scores_of(with_instances(0, FIRST, SECOND), rejected)
    assert found["instances"].found == 2
    assert found["instances"].average_precision.value == pytest.approx(0.5)


def test_a_job_without_any_result_has_an_average_precision_of_zero():
    assert scores_of()["connected parts"].average_precision.value == 0


def test_all_objects_are_one_class_where_the_prompt_is_the_whole_caption():
    found = scores_of(with_instances(0, FIRST, SECOND, CAR), source="caption")
    assert found["instances"].average_precision.value == pytest.approx(1)


def test_without_instances_in_the_truth_nothing_is_scored():
    scene = Scene("key", 0, b"", ("dogs",), (7,), LABELS)
    written = WrittenMasks((score_scene(scene, [row(0, FIRST)], "captions"),), 0, 0, ())
    assert score_written_masks(written).instances == ()


def test_the_command_prints_both_kinds_with_their_average_precision():
    scene = Scene("key", 0, b"", ("dogs", "a car"), (7, 9), LABELS, instance_map=INSTANCES)
    rows = [with_instances(0, FIRST, SECOND), with_instances(1, CAR)]
    written = score_written_masks(WrittenMasks((score_scene(scene, rows, "captions"),), 0, 0, ()))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_evaluation(EvaluationResult("a model", 1, 2, {}, (), written=written)))
    text = console.export_text()
    assert "Instances: 3 in the ground truth" in text
    kinds = ("instances", "connected parts")
    assert [name for line in text.splitlines() if (name := line.strip().partition("  ")[0]) in kinds] == [
        *kinds
    ]


def raw(instances: bytes) -> RawSample:
    fields = scene_fields(LABELS, ["dogs", "a car"], [7, 9])
    return RawSample(0, "a", {**fields, "inst.png": instances})


def test_the_instance_map_of_a_sample_is_read():
    scene = scene_of(raw(png(INSTANCES)), "png")
    assert np.array_equal(scene.instance_map, INSTANCES)


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        (png(INSTANCES[:-1]), "inst.png: expected 8 bits and the size of seg.png"),
        (png(INSTANCES.astype(np.uint16)), "inst.png: expected 8 bits"),
        (b"nothing", "inst.png"),
    ],
)
def test_an_instance_map_of_another_size_or_kind_is_no_ground_truth(instances, message):
    error = scene_of(raw(instances), "png")
    assert isinstance(error, SampleError)
    assert error.kind == "bad_ground_truth"
    assert message in error.message
