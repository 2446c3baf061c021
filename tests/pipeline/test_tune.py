"""Mask settings found on stored maps: scored as the masks of `legrad remask`, and confirmed."""

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from legrad.quality.metrics import Estimate
from pipeline.annotate.model import load_explainer
from pipeline.annotate.stored_maps import facts_of
from pipeline.config.schema import ModelConfig
from pipeline.demo.assets import DEMO_MODEL_NAME, demo_shard_paths
from pipeline.errors import ShardError, UserError
from pipeline.evaluation.mask_scores import collect_written_masks
from pipeline.evaluation.tuning import (
    ShardTask,
    Tuning,
    confirming_half,
    default_trials,
    read_trials,
    score_shard,
    settings_of,
    tune,
)
from pipeline.evaluation.tuning_text import render_tuning, settings_text
from pipeline.output.folder import OutputFolder
from pipeline.output.image_shards import match_annotations
from pipeline.run.remask import stored_job
from pipeline.shards.ground_truth import list_truth_shards
from pipeline.shards.samples import read_samples
from tests.helpers.command_line import run_legrad
from tests.helpers.corpus import captions_json, sample, write_shard
from tests.helpers.remasking import annotated, remasked, scenes_job

SCENES = 24
BAD_CUT = 0.95


@pytest.fixture(scope="module")
def explainer():
    return load_explainer(ModelConfig(name=DEMO_MODEL_NAME, pretrained="demo", precision="fp32"), "cpu")


def write_scenes(path, first, count):
    """Write some scenes of the demo with their ground truth to a shard."""
    with Path(demo_shard_paths("heldout")[0]).open("rb") as tar:
        scenes = list(read_samples(tar, max_member_bytes=1 << 24))[first : first + count]
    samples = [
        sample(
            f"scene{scene.index}",
            **{name: scene.fields[name] for name in ("jpg", "json", "seg.png")},
            txt=None,
        )
        for scene in scenes
    ]
    return write_shard(path, samples)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two shards of scenes with ground truth."""
    folder = tmp_path_factory.mktemp("corpus")
    return [write_scenes(folder / f"scenes-{part}.tar", part * SCENES // 2, SCENES // 2) for part in (0, 1)]


@pytest.fixture(scope="module")
def out(corpus, explainer, tmp_path_factory):
    """OUT of a job whose masks are cut far too high."""
    config = scenes_job(corpus, tmp_path_factory.mktemp("job") / "out", masks={"value": BAD_CUT})
    return annotated(explainer, config)


@pytest.fixture(scope="module")
def tuning(out, corpus):
    trials = {"combine": ["independent", "argmax"], "value": [0.3, 0.4]}
    return tune(stored_job(out), shards_of(corpus), trials, processes=1)


def shards_of(paths):
    return list_truth_shards([str(path) for path in paths])


def test_a_cut_that_is_far_too_high_is_replaced_and_the_gain_confirmed(tuning):
    assert tuning.best["value"] in (0.3, 0.4)
    assert tuning.is_confirmed
    assert tuning.after.value > tuning.before.value + 0.1
    assert tuning.confirmed.value == pytest.approx(tuning.after.value - tuning.before.value)


def test_every_setting_is_scored_once_with_the_jobs_own_first(tuning):
    assert tuning.trials[0].values == {}
    names = [settings_text(trial.values) for trial in tuning.trials]
    assert len(names) == len(set(names))
    assert tuning.best == max(tuning.trials, key=lambda trial: trial.chosen_on.value).values


def test_the_two_parts_are_halves_of_the_scenes(tuning):
    assert tuning.scenes == (SCENES // 2, SCENES // 2)
    assert not tuning.omitted


@pytest.mark.parametrize(
    "values",
    [
        {"value": 0.4, "contrast": 0.3, "refine": "none"},
        {"value": 0.4, "contrast": 0, "refine": "none"},
        {"rule": "otsu", "combine": "independent", "smooth": 1.0, "refine": "none"},
        {"value": 0.4, "refine": "par"},
    ],
    ids=settings_text,
)
def test_scores_are_those_of_the_masks_that_remask_writes(values, out, corpus, tmp_path):
    source, (shard, _) = stored_job(out), shards_of(corpus)
    task = ShardTask(
        source.folder.url,
        source.record.config_hash,
        facts_of(source.folder, source.record),
        shard,
        match_annotations([shard], source.published)[shard.canonical_url],
        (settings_of(source, {}), settings_of(source, values)),
    )
    found = score_shard(task).scenes[1]
    new = OutputFolder(
        remasked(out, tmp_path / "new", *settings_text(values).split(), shards=map(str, corpus))
    )
    config = new.config(new.job())
    written = collect_written_masks(new, [shard], config.input, config.prompts.source, new.job().config_hash)
    assert len(found) == len(written.scenes) == SCENES // 2
    for scene, expected in zip(found, written.scenes, strict=True):
        assert scene.ious == pytest.approx(expected.ious, abs=1e-6)
        assert np.array_equal(scene.overlap.both, expected.overlap.both)
        assert np.array_equal(scene.pixels, expected.pixels)


def test_settings_that_are_no_better_are_not_recommended(out, corpus, capsys, monkeypatch):
    assert run_legrad(monkeypatch, "tune", out, corpus[0], "--try", f"masks.value={BAD_CUT},1") == 0
    assert "keep those of the job" in capsys.readouterr().out


def test_a_gain_on_the_chosen_part_alone_is_not_confirmed():
    better, level = Estimate(0.7, 0.6, 0.8, 10), Estimate(0.0, -0.1, 0.1, 10)
    tuning = Tuning("mean_iou", (), {"value": 0.4}, better, better, level, (10, 10), {})
    assert not tuning.is_confirmed
    console = Console(record=True, width=200)
    console.print(render_tuning(tuning, "out"))
    text = console.export_text()
    assert "not confirmed" in text
    assert "legrad remask" not in text


def test_the_command_prints_settings_that_remask_takes(out, corpus, capsys, monkeypatch, tmp_path):
    assert run_legrad(monkeypatch, "tune", out, corpus[0], "--try", "masks.value=0.4") == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    (command,) = re.findall(r"legrad remask \S+ NEW (masks\.\S+)", printed)
    assert command == "masks.value=0.4"
    assert "masks:   value: 0.4" in printed


WRONG = {
    "no key": (["--try", "value=0.4"], "expected masks.KEY=VALUE"),
    "no value": (["--try", "masks.value="], "expected masks.KEY=VALUE"),
    "unknown key": (["--try", "masks.valeu=0.4"], "unknown key"),
    "invalid value": (["--try", "masks.value=2"], "masks.value"),
    "a key twice": (["--try", "masks.value=0.4", "--try", "masks.value=0.5"], "named twice"),
    "a segmenter": (["--try", "masks.segmenter=facebook/sam-vit-base"], "needs a model"),
    "unknown metric": (["--metric", "miou"], "expected one of mean_iou"),
    "undefined metric": (
        ["--metric", "point_mean_iou", "--try", "masks.value=0.4"],
        "possible here: mean_iou, mean_iou_with_background, iou",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_tried_is_refused_on_one_screen(options, message, out, corpus, capsys, monkeypatch):
    assert run_legrad(monkeypatch, "tune", out, corpus[0], *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_too_little_ground_truth_and_shards_of_another_job_are_refused(out, corpus, explainer, tmp_path):
    source = stored_job(out)
    few = write_scenes(tmp_path / "few.tar", 0, 3)
    with pytest.raises(UserError, match="has no maps of 1 of the 1 shard"):
        tune(source, shards_of([few]), {"value": [0.4]})
    small = annotated(explainer, scenes_job([few], tmp_path / "small"))
    with pytest.raises(UserError, match="3 samples of these shards have ground truth; tune needs 10 or more"):
        tune(stored_job(small), shards_of([few]), {"value": [0.4]})


def test_a_copy_with_its_samples_in_another_order_is_refused(out, tmp_path):
    # its masks would be scored as missing
    copy = write_scenes(tmp_path / "scenes-0.tar", 1, SCENES // 2)
    with pytest.raises(ShardError, match="sample number 0 is scene1, and the job has annotated scene0 there"):
        tune(stored_job(out), shards_of([copy]), {"value": [0.4]})


@pytest.mark.slow
def test_processes_that_share_the_shards_find_the_same(out, corpus, tuning):
    trials = {"combine": ["independent", "argmax"], "value": [0.3, 0.4]}
    assert tune(stored_job(out), shards_of(corpus), trials, processes=2) == tuning


def test_samples_without_ground_truth_are_counted(explainer, tmp_path):
    scenes = write_scenes(tmp_path / "scenes.tar", 0, SCENES)
    with tarfile.open(scenes, "a") as tar:
        for name, data in sample("unlabelled", json=captions_json(["a dog"]), txt=None):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    job = annotated(explainer, scenes_job([scenes], tmp_path / "out"))
    found = tune(stored_job(job), shards_of([scenes]), {"value": [0.4]})
    assert dict(found.omitted) == {"read/no_ground_truth": 1}


def test_the_threshold_that_is_tried_is_that_of_the_jobs_rule(corpus, tmp_path):
    tried = {
        rule: set(default_trials(scenes_job(corpus, tmp_path, masks={"rule": rule})))
        for rule in ("fixed", "otsu", "quantile")
    }
    assert tried["fixed"] - tried["otsu"] == {"value"}
    assert tried["quantile"] - tried["otsu"] == {"quantile"}


@given(st.permutations([f"scene{number}" for number in range(9)]))
def test_a_sample_is_in_the_same_half_whatever_the_order_of_shards(keys):
    halves = dict(zip(keys, confirming_half(keys), strict=True))
    ordered = sorted(keys)
    assert halves == dict(zip(ordered, confirming_half(ordered), strict=True))
    assert sum(halves.values()) == 4


def test_values_are_read_as_in_a_configuration():
    trials = read_trials(
        ["masks.value=0.3, 0.4", "masks.combine=argmax,independent", "masks.min_peak=null,0.001"]
    )
    assert trials == {"value": [0.3, 0.4], "combine": ["argmax", "independent"], "min_peak": [None, 0.001]}
