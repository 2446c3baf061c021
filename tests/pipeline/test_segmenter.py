"""Training on pseudo-masks: two trainings that differ in labels alone, scores, scenes without sprites."""

import json
import subprocess
import sys
from dataclasses import replace
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score
from torchvision import tv_tensors

from pipeline.config.load import load_config
from pipeline.demo import assets
from pipeline.demo.making import segmenter_scenes
from pipeline.demo.making.segmenter import INPUT_SIDE, PixelScores, make_segmenter
from pipeline.demo.making.segmenter_profile import ErrorProfile, error_profile
from pipeline.demo.making.segmenter_scenes import scene_split
from pipeline.demo.making.segmenter_scores import WINDOWED_SIDE, predict, score
from pipeline.demo.making.segmenter_views import ViewTransform
from pipeline.demo.making.train_segmenter import CONFIG, heldout_keys, pixel_loss, training_keys


def random_label_maps(seed, labels=(0, 1, 2, 3)):
    rng = np.random.default_rng(seed)
    return {f"scene {index}": rng.choice(labels, (12, 15)).astype(np.uint8) for index in range(5)}


def test_scores_are_the_mean_jaccard_index_of_all_pixels_that_count():
    truth, predicted = random_label_maps(0, (0, 1, 2, 3, 255)), random_label_maps(1)
    pixels = [np.concatenate([maps[key].ravel() for key in truth]) for maps in (truth, predicted)]
    counted = pixels[0] != 255
    expected = jaccard_score(pixels[0][counted], pixels[1][counted], average=None)
    found = score(predicted, truth)
    assert found.with_background.value == pytest.approx(expected.mean())
    assert found.classes_only.value == pytest.approx(expected[1:].mean())


def test_a_scene_without_prediction_is_all_background_and_so_is_what_a_prediction_leaves_open():
    truth = random_label_maps(0)
    blank = {key: np.zeros_like(labels) for key, labels in truth.items()}
    left_open = {key: np.full_like(labels, 255) for key, labels in truth.items()}
    assert score({}, truth).with_background == score(blank, truth).with_background
    assert score(left_open, truth).with_background == score(blank, truth).with_background


def test_the_twins_start_from_the_same_weights_and_another_seed_from_others():
    first, second, other = (make_segmenter(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "decoder.stem.0.0.weight"
    assert not torch.equal(first[name], other[name])
    assert torch.equal(first["tower.class_embedding"], other["tower.class_embedding"])


def test_a_segmenter_scores_outlines_and_classes_and_all_of_its_decoder_learns():
    segmenter = make_segmenter(1)
    scores = segmenter(torch.rand(2, 3, INPUT_SIDE, INPUT_SIDE))
    assert scores.foreground.shape == (2, 1, INPUT_SIDE // 2, INPUT_SIDE // 2)
    assert scores.classes.shape == (2, 64, 12, 12)
    pixel_loss(scores, torch.randint(0, 65, (2, INPUT_SIDE, INPUT_SIDE), dtype=torch.uint8), 1.0).backward()
    learns = {name for name, value in segmenter.named_parameters() if value.grad is not None}
    assert learns == {name for name, _ in segmenter.named_parameters() if name.startswith("decoder.")}


def perfect_scores(labels, sureness=20.0):
    """Scores whose outlines and classes are those of label maps with one label for each 8 x 8 pixels."""
    foreground = torch.where(labels[:, None, ::2, ::2] > 0, sureness, -sureness)
    classes = torch.nn.functional.one_hot(labels[:, ::8, ::8].long().clamp(max=64), 65)[..., 1:]
    return PixelScores(foreground, sureness * classes.permute(0, 3, 1, 2).float())


def coarse_labels(labels=(0, 7, 64)):
    half = torch.full((1, INPUT_SIDE, INPUT_SIDE // 2), labels[0], dtype=torch.uint8)
    return torch.cat([half, torch.full_like(half, labels[1])], dim=2)


def test_the_loss_is_small_where_outlines_and_classes_are_right_and_large_where_either_is_wrong():
    labels, other_class = coarse_labels((0, 7)), coarse_labels((0, 8))
    assert pixel_loss(perfect_scores(labels), labels, 1.0) < 1e-3
    assert pixel_loss(perfect_scores(other_class), labels, 1.0) > 1
    assert pixel_loss(perfect_scores(other_class), labels, 0.0) < 1e-3
    assert pixel_loss(perfect_scores(coarse_labels((7, 0))), labels, 0.0) > 1


def test_nothing_is_learnt_from_ignored_pixels():
    right, wrong = perfect_scores(coarse_labels((0, 7))), perfect_scores(coarse_labels((0, 8)))
    half_ignored, all_ignored = coarse_labels((0, 255)), coarse_labels((255, 255))
    assert pixel_loss(right, half_ignored, 1.0) == pixel_loss(wrong, half_ignored, 1.0)
    assert pixel_loss(wrong, all_ignored, 1.0) == 0


class Painter(torch.nn.Module):
    """A segmenter that sees class 7 in dark pixels, a little less of class 9, background in bright ones."""

    texts = torch.zeros(64, 1)

    def forward(self, images):
        classes = torch.zeros(len(images), 64, 12, 12)
        classes[:, 6], classes[:, 8] = 2.0, 1.0
        return PixelScores(-images[:, :1, ::2, ::2], classes)


def test_known_classes_change_the_classes_of_a_prediction_but_not_its_outlines():
    image = torch.ones(3, WINDOWED_SIDE, WINDOWED_SIDE)
    image[:, :, : WINDOWED_SIDE // 4] = -1
    truth = {"a": np.zeros((INPUT_SIDE, 2 * INPUT_SIDE), np.uint8)}
    samples = [{"image": tv_tensors.Image(image), "key": "a"}]
    found, known = (labels["a"] for labels in predict(Painter(), samples, truth, {"a": [9, 30]}))
    assert found.shape == truth["a"].shape
    assert set(np.unique(found)) == {0, 7}
    assert set(np.unique(known)) == {0, 9}
    np.testing.assert_array_equal(found > 0, known > 0)
    assert (found > 0).mean() == pytest.approx(0.25, abs=0.02)


def test_without_sprites_a_part_of_the_shipped_scenes_is_trained_on_and_the_rest_is_held_out(
    monkeypatch, tmp_path
):
    def no_art(*arguments):
        raise RuntimeError("npm is needed")

    monkeypatch.setattr(segmenter_scenes, "load_art", no_art)
    split = scene_split(3000, tmp_path, tmp_path, seed=1)
    assert not set(split.train) & set(split.heldout)
    assert {*split.train, *split.heldout} == {
        path for name in assets.SHARD_SETS for path in assets.demo_shard_paths(name)
    }
    assert "npm is needed" in split.origin


def test_masks_are_made_of_the_classes_that_captions_mention_for_training_and_comparison(tmp_path):
    train, heldout = tmp_path / "a.tar", tmp_path / "b.tar"
    split = segmenter_scenes.SceneSplit((train,), (heldout,), "here")
    for keys, shard, rule in ((training_keys, train, "band"), (heldout_keys, heldout, "fixed")):
        config = load_config(CONFIG, keys(split, tmp_path))
        assert (config.input.shards, config.masks.rule) == ([str(shard)], rule)
        assert (config.prompts.source, config.prompts.mentioned_in) == ("classes", "json:caption")


def square(label, side=60, start=20, stop=40):
    labels = np.zeros((side, side), np.uint8)
    labels[start:stop, start:stop] = label
    return labels


def test_a_profile_tells_errors_at_outlines_from_those_inside_objects_and_outside():
    truth = {"a": square(7)}
    none = ErrorProfile(
        at_outlines=0,
        missed=0,
        confused=0,
        invented=0,
        small_iou=pytest.approx(np.nan, nan_ok=True),
        large_iou=1,
    )
    assert error_profile(truth, truth) == none
    assert error_profile({}, truth) == replace(none, at_outlines=ANY, missed=1, large_iou=0)
    assert error_profile({"a": square(8)}, truth) == replace(none, at_outlines=ANY, confused=1, large_iou=0)
    larger = error_profile({"a": square(7, start=18, stop=42)}, truth)
    assert larger == replace(none, at_outlines=ANY, large_iou=pytest.approx(20**2 / 24**2))
    assert 0 < larger.at_outlines < 0.5
    everywhere = error_profile({"a": np.full((60, 60), 7, np.uint8)}, truth)
    assert everywhere == replace(none, at_outlines=ANY, invented=1, large_iou=pytest.approx(1 / 9))


def test_small_objects_are_scored_apart_and_ignored_pixels_not_at_all():
    truth = {"a": square(7, start=20, stop=24), "b": square(7), "c": square(255)}
    found = {"a": square(0), "b": square(7), "c": square(9)}
    profile = error_profile(found, truth)
    assert (profile.small_iou, profile.large_iou, profile.confused) == (0, 1, 0)


def a_scene(height=40, width=60):
    labels = np.zeros((height, width), np.uint8)
    labels[height // 4 : height // 2, : width // 2] = 200
    return {
        "image": tv_tensors.Image(torch.randint(0, 256, (3, height, width), dtype=torch.uint8)),
        "label_map": tv_tensors.Mask(torch.from_numpy(labels)),
        "key": "a",
    }


def test_a_view_has_the_size_of_the_input_and_the_same_part_of_both_label_maps():
    scene = a_scene()
    view = ViewTransform({"a": np.asarray(scene["label_map"]) // 2}, smallest_crop=0.3)(scene)
    assert view["image"].shape == (3, INPUT_SIDE, INPUT_SIDE)
    assert view["image"].dtype == torch.float32
    assert view["label_map"].shape == (INPUT_SIDE, INPUT_SIDE)
    assert set(view["label_map"].unique().tolist()) <= {0, 200}
    assert torch.equal(view["label_map"] // 2, view["pseudo_masks"])


def test_all_of_a_scene_without_pseudo_masks_is_ignored():
    view = ViewTransform({}, smallest_crop=1.0)(a_scene())
    assert set(view["pseudo_masks"].unique().tolist()) == {255}
    assert set(view["label_map"].unique().tolist()) == {0, 200}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_training_runs_from_scenes_to_scores(tmp_path):
    command = [sys.executable, "-m", "pipeline.demo.making.train_segmenter", "--scale", "0.02"]
    places = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    done = subprocess.run([*command, *places], check=False, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["miou"]) == 5
    assert result["miou"]["pseudo-masks, classes known"]["classes_only"]["value"] > 0.3
    assert "supervised twin" in done.stdout
    weights = load_file(tmp_path / "out" / "student.safetensors")
    make_segmenter(1).load_state_dict(weights)
