"""What a sample may say of its ground truth, and what it may not."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.shards.ground_truth import PointLabel, Scene, scene_of
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample
from tests.helpers.ground_truth_shards import label_map, png, scene_fields
from tests.helpers.pictures import grey_png_without_its_last_row

LABELS = label_map({1: (2, 9, 2, 9), 2: (12, 20, 20, 30), 255: (0, 2, 0, 40)})
FIELDS = scene_fields(LABELS, ["a dog", "a car", "a tree"], [1, 2, 3])
POINT = {"x": 0.5, "y": 0.25, "class_id": 7, "label": "yes"}


def read(fields: dict[str, bytes]) -> Scene | SampleError:
    return scene_of(RawSample(0, "scene", fields), "png")


def with_points(points: Any) -> dict[str, bytes]:
    document = {**json.loads(FIELDS["json"]), "points": points}
    return {**FIELDS, "json": json.dumps(document).encode()}


def sixteen_bits(labels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(labels.astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_map_of_eight_bits_ignores_255():
    scene = read(FIELDS)
    assert (scene.ignored_label, scene.visible_classes().tolist()) == (255, [1, 2])
    assert scene.visible_objects() == [0, 1]
    np.testing.assert_array_equal(scene.valid, LABELS != 255)
    np.testing.assert_array_equal(scene.foreground(), (LABELS == 1) | (LABELS == 2))


def test_a_map_of_sixteen_bits_has_classes_above_255_and_ignores_65535():
    labels = LABELS.astype(np.uint16)
    labels[LABELS == 255] = 65535
    labels[LABELS == 2] = 919
    labels[22:, :5] = 255
    fields = scene_fields(LABELS, ["a dog", "a car"], [1, 919])
    scene = read({**fields, "seg.png": sixteen_bits(labels)})
    assert scene.visible_classes().tolist() == [1, 255, 919]
    np.testing.assert_array_equal(scene.valid, labels != 65535)
    np.testing.assert_array_equal(scene.object_mask(1), LABELS == 2)


def test_points_alone_are_a_ground_truth_without_pixels():
    said = [POINT, {**POINT, "class_id": 1}, {**POINT, "class_id": 2, "label": "no"}]
    fields = with_points(said)
    del fields["seg.png"]
    scene = read(fields)
    assert scene.label_map is None
    assert scene.points[0] == PointLabel(0.5, 0.25, 7, True)
    assert (scene.pointed_objects(), scene.visible_objects()) == ([0], [])
    with pytest.raises(ValueError, match="only point labels"):
        _ = scene.labels


def test_a_point_is_looked_up_by_its_share_of_either_side():
    pixels = np.arange(12).reshape(3, 4)
    places = [(0.0, 0.0, 0), (0.3, 0.0, 1), (0.74, 0.5, 6), (1.0, 1.0, 11)]
    for x, y, expected in places:
        assert PointLabel(x, y, 1, True).value_in(pixels) == expected


@pytest.mark.parametrize(
    "points",
    [
        "everywhere",
        [1],
        [{**POINT, "x": 1.01}],
        [{**POINT, "y": float("nan")}],
        [{**POINT, "y": True}],
        [{**POINT, "class_id": 0}],
        [{**POINT, "class_id": 10**30}],
        [{**POINT, "label": "unsure"}],
        [{"x": 0.5, "y": 0.5, "label": "yes"}],
    ],
)
def test_points_of_another_form_are_no_ground_truth(points):
    found = read(with_points(points))
    assert (found.stage, found.kind) == ("read", "bad_ground_truth")
    assert "points" in found.message


@pytest.mark.parametrize(
    "class_ids",
    [[0, 1, 2], [1, 2, -3], [1, 2, 2**31], [1, 2, 2.9], [1, 2, True], [1, 2, "3"], "123", {"1": 1}, None, 3],
)
def test_class_ids_that_no_column_holds_are_no_ground_truth(class_ids):
    document = {"captions": ["a", "b", "c"], "class_ids": class_ids}
    found = read({**FIELDS, "json": json.dumps(document).encode()})
    assert found.kind == "bad_ground_truth"


def test_a_map_that_lacks_rows_is_no_ground_truth_although_its_checksums_are_right():
    labels = np.random.default_rng(0).integers(0, 3, LABELS.shape).astype(np.uint8)
    found = read({**FIELDS, "seg.png": grey_png_without_its_last_row(labels)})
    assert (found.kind, "before its last row" in found.message) == ("bad_ground_truth", True)


def test_a_coloured_map_is_no_ground_truth():
    found = read({**FIELDS, "seg.png": png(np.zeros((4, 5, 3), dtype=np.uint8))})
    assert (found.kind, "8 or 16 bits" in found.message) == ("bad_ground_truth", True)


@pytest.mark.parametrize("document", [b"[]", b"{", b"[" * 100_000, b"\xff"])
def test_a_json_field_that_is_no_object_is_no_ground_truth(document):
    assert read({**FIELDS, "json": document}).kind == "bad_ground_truth"


@pytest.mark.parametrize(
    "captions",
    [
        "abc",
        ["a", "b", None],
        ["a", "b", ["c"]],
        ["a", "b", "\ud83d"],
        ["a", "b", ""],
        ["a", "b", "\u263a" * 16_385],
        ["a", "b", "c" * 401],
        ["a", "b", "\u0301\u0323" * 100_000],
        ["a"] * 1025,
    ],
)
def test_captions_that_annotation_refuses_are_no_ground_truth_either(captions):
    document = {"captions": captions, "class_ids": [1] * len(captions)}
    fields = scene_fields(label_map({1: (0, 4, 0, 4)}), ["a"], [1]) | {"json": json.dumps(document).encode()}
    found = scene_of(RawSample(0, "a", fields), "png")
    assert isinstance(found, SampleError)
    assert (found.kind, len(found.message) < 400) == ("bad_ground_truth", True)


def test_a_point_of_class_true_is_none():
    document = {"points": [{"x": 0.5, "y": 0.5, "class_id": True, "label": "yes"}]}
    found = scene_of(RawSample(0, "a", {"json": json.dumps(document).encode()}), "png")
    assert isinstance(found, SampleError)
    assert "received {'x': 0.5, 'y': 0.5, 'class_id': True" in found.message
