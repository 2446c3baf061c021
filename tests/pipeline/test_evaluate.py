"""The evaluation on tiny shards, held against figures worked out separately."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.filters import threshold_otsu
from sklearn.metrics import average_precision_score, roc_auc_score

import legrad
from legrad.masks.rle import encode_rle
from pipeline.cli import main as cli
from pipeline.config.schema import InputConfig
from pipeline.console import PrintableConsole
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import (
    EvaluationOptions,
    evaluate_output,
    evaluate_shards,
)
from pipeline.evaluation.rendering import plot_evaluation, render_evaluation
from pipeline.evaluation.result import EvaluationResult
from pipeline.output.folder import LAYOUT
from pipeline.output.schema import ANNOTATION_SCHEMA, ERROR_SCHEMA, METADATA_KEY
from pipeline.shards.ground_truth import Scene, read_scenes
from pipeline.storage import list_shards
from tests.helpers.ground_truth_shards import (
    LAYERS,
    MODEL_NAME,
    job_document,
    label_map,
    save_tiny_model,
    scene_fields,
    two_object_shard,
    write_shard,
)

CLASSES = ["dog", "car", "tree"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def explainer(weights) -> legrad.LeGrad:
    return legrad.LeGrad.from_open_clip(MODEL_NAME, str(weights), layers=2, device="cpu")


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return two_object_shard(tmp_path_factory.mktemp("shards") / "scenes-000.tar")


def scenes_of(path: Path) -> list[Scene]:
    (source,) = list_shards(str(path))
    return [scene for scene in read_scenes(source, InputConfig(shards=str(path))) if isinstance(scene, Scene)]


def figures_by_hand(explainer: legrad.LeGrad, shard: Path) -> dict[str, float]:
    """LeGrad's figures with one image and one prompt at a time and plain definitions."""
    hits, ious, precisions, preferences = [], [], [], []
    for scene in scenes_of(shard):
        images = explainer.preprocess([Image.open(io.BytesIO(scene.image))], resize="fast")
        valid = scene.label_map != 255
        maps = []
        for caption, class_id in zip(scene.captions, scene.class_ids, strict=True):
            grid = explainer.relevance(images, explainer.embed_text([caption]))
            heat = F.interpolate(grid, size=scene.label_map.shape, mode="bilinear")[0, 0].numpy()
            heat = (heat - heat.min()) / (heat.max() - heat.min())
            truth = scene.label_map == class_id
            hits.append(truth[np.unravel_index(np.where(valid, heat, -1).argmax(), heat.shape)])
            ious.append(((heat > 0.5) & truth & valid).sum() / (((heat > 0.5) | truth) & valid).sum())
            precisions.append(average_precision_score(truth[valid], heat[valid]))
            maps.append(heat)
        if len(maps) == 2:
            own, other = (scene.label_map == class_id for class_id in scene.class_ids)
            preferences += [
                maps[0][own].mean() > maps[0][other].mean(),
                maps[1][other].mean() > maps[1][own].mean(),
            ]
    return {
        "pointing": float(np.mean(hits)),
        "iou_at_half": float(np.mean(ious)),
        "average_precision": float(np.mean(precisions)),
        "own_object": float(np.mean(preferences)),
    }


def test_the_maps_of_legrad_have_the_figures_of_plain_definitions(explainer, shard):
    result = evaluate_shards(explainer, [shard])
    scores = {scores.method: scores for scores in result.maps}["LeGrad, last 2"]
    for name, expected in figures_by_hand(explainer, shard).items():
        # Pixels whose values differ only by rounding may swap ranks, hence not tighter.
        assert getattr(scores, name).value == pytest.approx(expected, abs=2e-4), name


def class_iou_by_hand(explainer: legrad.LeGrad, shard: Path) -> dict[int, float]:
    """IoU of each class over the set, pixel by pixel: Otsu's cut, and of several maps the hottest."""
    both: Counter[int] = Counter()
    either: Counter[int] = Counter()
    for scene in scenes_of(shard):
        images = explainer.preprocess([Image.open(io.BytesIO(scene.image))], resize="fast")
        heat = []
        for caption in scene.captions:
            grid = explainer.relevance(images, explainer.embed_text([caption]))
            pixels = F.interpolate(grid, size=scene.label_map.shape, mode="bilinear")[0, 0].numpy()
            pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
            heat.append(np.where(pixels > threshold_otsu(pixels, nbins=256), pixels, 0))
        hottest = np.array([0, *scene.class_ids])[np.argmax([np.zeros_like(heat[0]), *heat], axis=0)]
        for predicted, true in zip(hottest.ravel(), scene.label_map.ravel(), strict=True):
            if true != 255:
                both[predicted] += predicted == true
                either[predicted] += 1
                either[true] += predicted != true
    return {class_id: both[class_id] / either[class_id] for class_id in either if class_id}


def test_mean_iou_of_the_maps_is_that_of_their_pixels_pooled_by_class(explainer, shard):
    scores = {scores.method: scores for scores in evaluate_shards(explainer, [shard]).maps}["LeGrad, last 2"]
    expected = np.mean(list(class_iou_by_hand(explainer, shard).values()))
    assert scores.mean_iou.value == pytest.approx(expected, abs=0.01)


def point_shard(path: Path) -> Path:
    """Two scenes whose truth is points alone; in the second no point says yes to the car."""
    samples = {}
    for number, answers in enumerate(({"1": "yes", "2": "yes"}, {"1": "yes", "2": "no"})):
        fields = scene_fields(label_map({}), ["a dog", "a car"], [1, 2], seed=number)
        points = [
            {"x": x / 10, "y": y / 10, "class_id": int(c), "label": answers[c] if (x + y) % 2 else "no"}
            for c in answers
            for x in range(0, 10, 3)
            for y in range(0, 10, 3)
        ]
        document = {**json.loads(fields["json"]), "points": points}
        samples[f"scene{number}"] = {"png": fields["png"], "json": json.dumps(document).encode()}
    return write_shard(path, samples)


def test_scenes_of_points_are_scored_by_points_alone(explainer, tmp_path):
    path = point_shard(tmp_path / "points.tar")
    result = evaluate_shards(explainer, [path])
    assert (result.scenes, result.pairs) == (2, 3)
    assert result.omitted == {"objects without a visible pixel or point": 1}
    scores = {scores.method: scores for scores in result.maps}["LeGrad, last 2"]
    assert (scores.pointing, scores.iou_best, scores.mean_iou, scores.iou_curve) == (None, None, None, ())
    found, union = Counter(), Counter()
    for scene in scenes_of(path):
        images = explainer.preprocess([Image.open(io.BytesIO(scene.image))], resize="fast")
        for index in scene.pointed_objects():
            grid = explainer.relevance(images, explainer.embed_text([scene.captions[index]]))
            heat = F.interpolate(grid, size=(24, 40), mode="bilinear")[0, 0].numpy()
            heat = (heat - heat.min()) / (heat.max() - heat.min())
            for point in scene.points:
                if point.class_id == scene.class_ids[index]:
                    said = heat[int(point.y * 24), int(point.x * 40)] > 0.5
                    found[point.class_id] += said and point.is_object
                    union[point.class_id] += said or point.is_object
    expected = np.mean([found[class_id] / union[class_id] for class_id in union])
    assert scores.point_mean_iou_at_half.value == pytest.approx(expected)


@pytest.fixture(scope="module")
def perturbed(explainer, shard) -> EvaluationResult:
    return evaluate_shards(explainer, [shard], CLASSES, EvaluationOptions(layers=(2,), perturbed_scenes=2))


def test_hiding_patches_starts_at_the_models_own_cosine_and_showing_them_at_the_blurred_images(
    explainer, shard, perturbed
):
    result = perturbed
    assert result.perturbed_scenes == 2
    cosines = []
    for scene in scenes_of(shard)[:2]:
        with torch.no_grad():
            image = explainer.preprocess([Image.open(io.BytesIO(scene.image))], resize="fast")
            features = explainer.model.encode_image(image, normalize=True)
        cosines += (explainer.embed_text(scene.captions) @ features[0]).tolist()
    for scores in result.perturbation:
        by_test = {(curve.test, curve.order): curve for curve in scores.curves}
        assert len(by_test) == 4
        for curve in by_test.values():
            assert (len(curve.cosine), len(curve.accuracy)) == (10, 10)
            area = (np.sum(curve.cosine) - (curve.cosine[0] + curve.cosine[-1]) / 2) / 9
            assert curve.cosine_area.value == pytest.approx(area)
        for order in ("positive", "negative"):
            assert by_test["deletion", order].cosine[0] == pytest.approx(np.mean(cosines), abs=1e-6)
            assert by_test["insertion", order].cosine[0] == result.perturbation[0].curves[2].cosine[0]


def test_nothing_is_perturbed_unless_asked_for(explainer, shard):
    assert evaluate_shards(explainer, [shard]).perturbation == ()


def test_every_method_is_scored_on_every_prompt_and_the_configured_one_is_marked(explainer, shard):
    result = evaluate_shards(explainer, [shard], options=EvaluationOptions(configured_layers=2))
    assert [scores.method for scores in result.maps] == [
        "LeGrad, last 1",
        "LeGrad, last 2",
        f"LeGrad, all {LAYERS}",
        "LeGrad, last 2, keys",
        "GradCAM, last block",
        "patch-text similarity",
        "MaskCLIP",
        "SCLIP",
        "NACLIP",
        "mean-query attention",
        "CLS attention",
        "attention rollout",
        "centre prior",
        "random",
    ]
    assert [scores.method for scores in result.maps if scores.configured] == ["LeGrad, last 2"]
    assert (result.scenes, result.pairs, result.omitted) == (5, 8, {})


def test_a_job_with_affinity_is_marked_at_maps_that_are_those_of_its_explainer(explainer, shard):
    spread = legrad.LeGrad(explainer.model, tokenizer=explainer.tokenizer, layers=2, affinity="keys")
    options = EvaluationOptions(configured_layers=2, configured_affinity="keys")
    result = evaluate_shards(spread, [shard], options=options)
    (configured,) = [scores for scores in result.maps if scores.configured]
    assert configured.method == "LeGrad, last 2, keys"
    for name, expected in figures_by_hand(spread, shard).items():
        assert getattr(configured, name).value == pytest.approx(expected, abs=2e-4), name


def test_maps_that_ignore_the_prompt_prefer_their_object_half_of_the_time(explainer, shard):
    by_method = {scores.method: scores for scores in evaluate_shards(explainer, [shard]).maps}
    for method in ("mean-query attention", "CLS attention", "centre prior"):
        assert by_method[method].own_object.value == 0.5


def test_the_best_threshold_is_never_worse_than_a_half(explainer, shard):
    for scores in evaluate_shards(explainer, [shard]).maps:
        assert scores.iou_best.value >= scores.iou_at_half.value
        assert scores.best_threshold in (np.arange(1, 20) / 20)


def test_the_same_seed_gives_the_same_result_and_another_one_other_noise(explainer, shard):
    first, again = (evaluate_shards(explainer, [shard], CLASSES) for _ in range(2))
    assert first == again
    other = evaluate_shards(explainer, [shard], CLASSES, EvaluationOptions(seed=1))
    assert other.maps[-1].average_precision.value != first.maps[-1].average_precision.value


def test_recognition_ranks_the_classes_by_the_models_own_cosine(explainer, shard):
    recognition = evaluate_shards(explainer, [shard], CLASSES).recognition
    scores, present = [], []
    texts = explainer.embed_text([f"a photo of a {name}" for name in CLASSES])
    for scene in scenes_of(shard):
        with torch.no_grad():
            image = explainer.preprocess([Image.open(io.BytesIO(scene.image))], resize="fast")
            scores.append((explainer.model.encode_image(image, normalize=True) @ texts.T)[0].numpy())
        present.append([class_id in scene.class_ids for class_id in (1, 2, 3)])
    scores, present = np.array(scores), np.array(present)
    assert recognition.top1.value == pytest.approx(present[np.arange(5), scores.argmax(1)].mean())
    assert recognition.auroc.value == pytest.approx(roc_auc_score(present.ravel(), scores.ravel()), abs=1e-6)
    expected = np.mean([average_precision_score(present[:, c], scores[:, c]) for c in (0, 1)])
    assert recognition.mean_average_precision.value == pytest.approx(expected)


def test_a_class_id_beyond_the_class_list_is_a_user_error(explainer, shard):
    with pytest.raises(UserError, match="class id 2, but the class list has 1 lines"):
        evaluate_shards(explainer, [shard], ["dog"])


def test_what_cannot_be_scored_is_counted_by_reason(explainer, tmp_path):
    good = scene_fields(label_map({1: (2, 9, 2, 9)}), ["a dog"], [1])
    unaligned = json.dumps({"captions": ["a dog", "a car"], "class_ids": [1]}).encode()
    path = write_shard(
        tmp_path / "odd.tar",
        {
            "good": good,
            "no-truth": {"png": good["png"], "json": good["json"]},
            "unaligned": {**good, "json": unaligned},
            "not-json": {**good, "json": b"{"},
            "colour-truth": {**good, "seg.png": good["png"]},
            "broken-truth": {**good, "seg.png": b"nothing"},
            "broken-image": {**good, "png": good["png"][:60]},
            "empty": scene_fields(label_map({}), ["a dog"], [1]),
            "half-hidden": scene_fields(label_map({1: (2, 9, 2, 9)}), ["a dog", "a car"], [1, 2]),
        },
    )
    result = evaluate_shards(explainer, [path])
    assert (result.scenes, result.pairs) == (2, 2)
    decode_failures = {kind: n for kind, n in result.omitted.items() if kind.startswith("samples: decode/")}
    assert sum(decode_failures.values()) == 1
    assert {kind: n for kind, n in result.omitted.items() if kind not in decode_failures} == {
        "samples: read/no_ground_truth": 1,
        "samples: read/bad_ground_truth": 4,
        "scenes without a visible object": 1,
        "objects without a visible pixel or point": 2,
    }


def test_shards_without_any_ground_truth_are_a_user_error(explainer, tmp_path):
    fields = scene_fields(label_map({1: (2, 9, 2, 9)}), ["a dog"], [1])
    path = write_shard(tmp_path / "plain.tar", {"a": {"png": fields["png"]}})
    with pytest.raises(UserError, match=r"no scene with ground truth.*no_ground_truth"):
        evaluate_shards(explainer, [path])


def annotation(key: str, index: int, prompt: int, mask: np.ndarray | None, **columns: Any) -> dict[str, Any]:
    rle = None if mask is None else encode_rle(torch.from_numpy(mask[None]))[0]
    found = {"key": key, "sample_index": index, "prompt_index": prompt, "status": "ok", "mask": rle}
    found |= {"prompt": "a dog", "image_height": 24, "image_width": 40}
    return {**found, "similarity": 0.3, **columns}


def evaluated(weights: Path, out: str, *arguments: Any) -> EvaluationResult:
    return evaluate_output(out, *arguments, model_name=MODEL_NAME, pretrained=str(weights))


def write_output(
    out: Path, weights: Path, rows_by_name: Mapping[str, list[dict[str, Any]]], **prompts: Any
) -> str:
    job = job_document(out, weights, **prompts)
    (out / "annotations").mkdir(parents=True)
    (out / "errors").mkdir()
    (out / "job.json").write_text(json.dumps(job))
    for name, rows in rows_by_name.items():
        footer = json.dumps(footer_document(len(rows), job["config_hash"])).encode()
        for folder, schema, written in (
            ("annotations", ANNOTATION_SCHEMA, rows),
            ("errors", ERROR_SCHEMA, []),
        ):
            columns = [{column: row.get(column) for column in schema.names} for row in written]
            table = pa.Table.from_pylist(columns, schema=schema.with_metadata({METADATA_KEY: footer}))
            pq.write_table(table, out / folder / f"{name}.parquet")
    return str(out)


def footer_document(rows: int, config_hash: str) -> dict[str, Any]:
    names = ("annotated", "empty", "failed", "error_rows", "dropped_prompts")
    return {
        **dict.fromkeys(names, 0),
        "rows": rows,
        "errors_by_kind": {},
        "layout": LAYOUT,
        "attempt": "a",
        "config_hash": config_hash,
        "shard": "x",
        "state": "done",
        "content_digest": "x",
        "input": {"size": None, "mtime_ns": None, "etag": None},
    }


LABELS = label_map({1: (2, 10, 2, 12), 2: (12, 20, 20, 30), 255: (0, 24, 0, 4)})
DOG, CAR = LABELS == 1, LABELS == 2


@pytest.fixture
def truth_shard(tmp_path) -> Path:
    fields = scene_fields(LABELS, ["a dog", "a car"], [1, 2])
    return write_shard(
        tmp_path / "truth.tar", {"first": fields, "second": fields, "third": {"png": fields["png"]}}
    )


def shard_id(path: Path) -> str:
    return list_shards(str(path))[0].shard_id


def test_written_masks_are_joined_and_every_other_row_is_accounted_for(weights, truth_shard, tmp_path):
    half_dog = DOG.copy()
    half_dog[6:] = False
    wild = np.zeros_like(DOG)
    wild[:, :4] = True  # on ignored pixels alone
    rows = [
        annotation("first", 0, 0, DOG | wild),
        annotation("first", 0, 1, None, status="rejected_peak"),
        annotation("first", 0, 2, CAR),
        annotation("second", 1, 0, half_dog),
        annotation("another key", 1, 1, CAR),
        annotation("third", 2, 0, DOG),
        annotation("fourth", 3, 0, DOG),
    ]
    others = [annotation("x", 0, 0, DOG)] * 3
    out = write_output(tmp_path / "out", weights, {shard_id(truth_shard): rows, "elsewhere-12345678": others})
    missing = two_object_shard(tmp_path / "missing.tar")
    written = evaluated(weights, out, [str(truth_shard), str(missing)]).written
    assert written.iou.value == pytest.approx((1.0 + 0.5) / 2)
    assert written.iou.images == 2
    assert (written.rows_scored, written.rows_rejected, written.rows_without_object) == (2, 1, 1)
    assert (written.rows_without_scene, written.rows_of_other_shards, written.objects_without_row) == (
        3,
        3,
        1,
    )
    assert written.shards_without_annotations == (missing.as_uri(),)


def test_a_whole_caption_is_held_against_all_its_objects(weights, truth_shard, tmp_path):
    rows = [annotation("first", 0, 0, DOG | CAR), annotation("second", 1, 0, CAR)]
    out = write_output(tmp_path / "out", weights, {shard_id(truth_shard): rows}, source="caption")
    written = evaluated(weights, out, str(truth_shard)).written
    assert written.iou.value == pytest.approx((1 + CAR.sum() / (DOG | CAR).sum()) / 2)


def test_masks_in_a_smaller_frame_are_enlarged(weights, tmp_path):
    labels = label_map({1: (2, 10, 2, 12)})
    path = write_shard(tmp_path / "truth.tar", {"first": scene_fields(labels, ["a dog"], [1])})
    rows = [annotation("first", 0, 0, (labels == 1)[::2, ::2])]
    out = write_output(tmp_path / "out", weights, {shard_id(path): rows})
    assert evaluated(weights, out, str(path)).written.iou.value == 1.0


def test_a_moved_shard_is_found_by_its_stem_unless_that_is_ambiguous(weights, truth_shard, tmp_path):
    rows = [annotation("first", 0, 0, DOG)]
    moved = write_output(tmp_path / "moved", weights, {"truth-00000000": rows})
    assert evaluated(weights, moved, str(truth_shard)).written.rows_scored == 1
    twice = write_output(tmp_path / "twice", weights, {"truth-00000000": rows, "truth-11111111": rows})
    written = evaluated(weights, twice, str(truth_shard)).written
    assert (written.rows_scored, written.rows_of_other_shards, written.iou) == (0, 2, None)
    assert written.shards_without_annotations == (truth_shard.as_uri(),)


def _mask(size, counts):
    return [{**annotation("first", 0, 0, None), "mask": {"size": size, "counts": counts}}]


@pytest.mark.parametrize(
    ("rows", "spoil"),
    [
        (None, lambda path: path.write_bytes(path.read_bytes()[:-40])),
        (None, lambda path: path.write_bytes(b"")),
        (None, lambda path: path.write_text("<html>not found</html>")),
        (None, lambda path: pq.write_table(pa.table({"key": [1]}), path)),
        (_mask([40_000, 40_000], "0PPPZbe1"), None),
        (_mask([24, 32], "o" * 1000), None),
        (_mask([24, 32], "P3o"), None),
    ],
)
def test_a_damaged_annotations_file_is_named_and_the_others_are_scored(
    weights, truth_shard, tmp_path, rows, spoil
):
    other = write_shard(tmp_path / "other.tar", {"first": scene_fields(LABELS, ["a dog", "a car"], [1, 2])})
    sound = [annotation("first", 0, 0, DOG)]
    names = {shard_id(truth_shard): sound, shard_id(other): sound if rows is None else rows}
    out = write_output(tmp_path / "out", weights, names)
    path = Path(out) / "annotations" / f"{shard_id(other)}.parquet"
    if spoil is not None:
        spoil(path)
    written = evaluated(weights, out, [str(truth_shard), str(other)]).written
    assert written.rows_scored == 1
    (damaged,) = written.damaged_files
    assert path.name in damaged


def test_the_class_list_may_be_a_url(weights, truth_shard, tmp_path, monkeypatch, capsys):
    out = write_output(tmp_path / "out", weights, {})
    words = ["evaluate", out, str(truth_shard), "--classes", "ftp://host/classes.txt"]
    monkeypatch.setattr("sys.argv", ["legrad", *words])
    with pytest.raises(SystemExit):
        cli.main()
    assert "two slashes" not in capsys.readouterr().err


def test_two_shards_of_one_stem_never_share_a_file(weights, truth_shard, tmp_path):
    out = write_output(tmp_path / "out", weights, {"truth-00000000": [annotation("first", 0, 0, DOG)]})
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "truth.tar"
    copy.write_bytes(truth_shard.read_bytes())
    written = evaluated(weights, out, [str(truth_shard), str(copy)]).written
    assert (written.rows_scored, written.rows_of_other_shards) == (0, 1)


def test_the_result_is_written_as_json_and_reported_as_a_table(weights, truth_shard, tmp_path):
    out = write_output(tmp_path / "out", weights, {shard_id(truth_shard): [annotation("first", 0, 0, DOG)]})
    classes = tmp_path / "classes.txt"
    classes.write_text("dog\ncar\n")
    result = evaluated(weights, out, str(truth_shard), classes)
    assert result.recognition.auroc is None, "every class of the list is in every scene"
    document = json.loads((Path(out) / "evaluation.json").read_text())
    assert document["written"]["rows_scored"] == 1
    assert document["maps"][0]["pointing"]["value"] == result.maps[0].pointing.value
    console = PrintableConsole(width=80, record=True, file=io.StringIO())
    console.print(render_evaluation(result))
    text = console.export_text()
    with Image.open(Path(out) / "evaluation.png") as picture:
        assert (picture.format, min(picture.size) > 300) == ("PNG", True)
    for scores in result.maps:
        line = next(line for line in text.splitlines() if scores.method in line)
        for figure in (scores.pointing, scores.iou_at_half, scores.iou_otsu, scores.average_precision):
            assert f"{figure.value:.3f}"[-4:] in line
    assert "…" not in text
    assert "LeGrad, last 2 *" in text
    assert "1 rows scored" in text
    assert "R@n" in text
    assert f"{result.written.mean_iou.value:.3f}"[-4:] in next(
        line for line in text.splitlines() if line.strip().startswith("mIoU ")
    )


def rendered(result: EvaluationResult) -> str:
    console = PrintableConsole(width=80, record=True, file=io.StringIO())
    console.print(render_evaluation(result))
    text = console.export_text()
    assert "…" not in text
    return text


def test_hidden_patches_are_listed_and_drawn_with_a_class_list_and_without(perturbed):
    curves = [
        tuple(replace(curve, accuracy=(), accuracy_area=None) for curve in scores.curves)
        for scores in perturbed.perturbation
    ]
    without_classes = replace(
        perturbed,
        perturbation=tuple(
            replace(scores, curves=own) for scores, own in zip(perturbed.perturbation, curves, strict=True)
        ),
    )
    assert "Accuracy under perturbation" in rendered(perturbed)
    assert "Accuracy under perturbation" not in rendered(without_classes)
    assert "Cosine under perturbation" in rendered(without_classes)
    with_panels, bare = (
        Image.open(io.BytesIO(plot_evaluation(result))).size
        for result in (without_classes, replace(perturbed, perturbation=()))
    )
    assert with_panels[1] > bare[1]


def test_points_are_listed_and_drawn(explainer, tmp_path):
    result = evaluate_shards(explainer, [point_shard(tmp_path / "points.tar")])
    text = rendered(result)
    assert "Labelled points" in text
    assert "pointing" not in text
    assert Image.open(io.BytesIO(plot_evaluation(result))).format == "PNG"


def test_a_model_that_a_folder_names_by_path_is_loaded_only_where_it_is_repeated(
    weights, truth_shard, tmp_path, monkeypatch
):
    out = write_output(tmp_path / "out", weights, {})
    monkeypatch.setattr("pipeline.evaluation.evaluate.load_explainer", lambda *_, **__: pytest.fail("loaded"))
    message = rf"names a model by a path.* --model {MODEL_NAME} --pretrained {weights}"
    with pytest.raises(UserError, match=message):
        evaluate_output(out, str(truth_shard))


@pytest.mark.parametrize("name", ["local-dir:/evil", "hf-hub:evil/model"])
def test_an_address_that_a_folder_names_is_loaded_only_where_it_is_repeated(
    weights, truth_shard, tmp_path, monkeypatch, name
):
    out = write_output(tmp_path / "out", weights, {})
    document = json.loads((Path(out) / "job.json").read_text())
    document["config"]["model"] |= {"name": name, "pretrained": None}
    (Path(out) / "job.json").write_text(json.dumps(document))
    loaded = []
    monkeypatch.setattr(
        "pipeline.evaluation.evaluate.load_explainer", lambda model, *_, **__: loaded.append(model.name)
    )
    with pytest.raises(UserError, match=f"If you trust it: --model {name}$"):
        evaluate_output(out, str(truth_shard))
    with pytest.raises(UserError, match="must be null"):
        evaluate_output(out, str(truth_shard), pretrained="openai")
    assert loaded == []
    with contextlib.suppress(AttributeError):  # of the model that is none
        evaluate_output(out, str(truth_shard), model_name=name)
    assert loaded == [name]


def test_weights_may_have_moved_but_not_changed(weights, truth_shard, tmp_path):
    out = write_output(tmp_path / "out", weights, {shard_id(truth_shard): [annotation("first", 0, 0, DOG)]})
    moved = tmp_path / "moved.pt"
    moved.write_bytes(weights.read_bytes())
    assert evaluated(moved, out, str(truth_shard)).written.rows_scored == 1
    state = torch.load(moved, weights_only=True)
    state["visual.proj"][0, 0] += 1
    torch.save(state, moved)
    with pytest.raises(UserError, match="have the digest"):
        evaluated(moved, out, str(truth_shard))


def test_a_folder_without_a_job_is_a_user_error(truth_shard, tmp_path):
    with pytest.raises(UserError, match=r"job\.json"):
        evaluate_output(str(tmp_path), str(truth_shard))


def test_a_missing_shard_or_class_list_is_a_user_error(weights, truth_shard, tmp_path):
    out = write_output(tmp_path / "out", weights, {})
    with pytest.raises(UserError, match=r"gone\.tar"):
        evaluated(weights, out, str(tmp_path / "gone.tar"))
    with pytest.raises(UserError, match=r"gone\.txt"):
        evaluated(weights, out, str(truth_shard), tmp_path / "gone.txt")


def test_classes_whose_ids_have_gaps_are_a_user_error(weights, truth_shard, tmp_path):
    out = write_output(tmp_path / "out", weights, {})
    classes = tmp_path / "classes.yaml"
    classes.write_text("- {name: dog, id: 1}\n- {name: car, id: 3}\n")
    with pytest.raises(UserError, match=r"classes\.yaml: .*without gaps, found \[1, 3\]"):
        evaluated(weights, out, str(truth_shard), classes)
