"""Training on pseudo-masks: two trainings that differ in labels alone, scores, scenes without sprites."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score
from torchvision import tv_tensors

from pipeline.config.load import load_config
from pipeline.demo import assets
from pipeline.demo.making import segmenter_scenes
from pipeline.demo.making.segmenter import INPUT_SIDE, make_segmenter
from pipeline.demo.making.segmenter_scenes import scene_split
from pipeline.demo.making.segmenter_scores import score
from pipeline.demo.making.train_segmenter import CONFIG, Plan, masks_keys, train_transform


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
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert torch.equal(first["tower.class_embedding"], other["tower.class_embedding"])


def test_a_segmenter_scores_every_label_and_learns_in_all_parts_but_the_frozen_ones():
    segmenter = make_segmenter(1)
    scores = segmenter(torch.rand(2, 3, INPUT_SIDE, INPUT_SIDE))
    assert scores.shape == (2, 65, INPUT_SIDE // 2, INPUT_SIDE // 2)
    scores.square().mean().backward()
    without_gradient = {name for name, value in segmenter.named_parameters() if value.grad is None}
    frozen = {name for name, value in segmenter.named_parameters() if not value.requires_grad}
    assert without_gradient == frozen
    assert {name.split(".")[3] for name in frozen if "resblocks" in name} == {"0", "1", "2"}


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
    config = load_config(CONFIG, masks_keys(split, tmp_path))
    assert config.input.shards == [str(train), str(heldout)]
    assert (config.prompts.source, config.prompts.mentioned_in) == ("classes", "json:caption")


def test_training_images_come_at_the_size_of_the_input_with_labels_that_stay_labels():
    labels = torch.randint(0, 2, (40, 60), dtype=torch.uint8) * 200
    sample = {
        "image": tv_tensors.Image(torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)),
        "label_map": tv_tensors.Mask(labels),
        "key": "a",
    }
    found = train_transform(Plan())(sample)
    assert found["image"].shape == (3, INPUT_SIDE, INPUT_SIDE)
    assert found["image"].dtype == torch.float32
    assert found["label_map"].shape == (INPUT_SIDE, INPUT_SIDE)
    assert set(found["label_map"].unique().tolist()) <= {0, 200}
    assert found["key"] == "a"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_training_runs_from_scenes_to_scores(tmp_path):
    command = [sys.executable, "-m", "pipeline.demo.making.train_segmenter", "--scale", "0.02"]
    places = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    done = subprocess.run([*command, *places], check=False, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["miou"]) == 6
    assert result["miou"]["pseudo-masks, classes known"]["classes_only"]["value"] > 0.3
    assert "supervised twin" in done.stdout
    weights = load_file(tmp_path / "out" / "student.safetensors")
    make_segmenter(1).load_state_dict(weights)
