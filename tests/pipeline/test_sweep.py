"""The sweep of mask settings and baselines: its file, its baselines' masks, and the whole on a tiny VOC."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import legrad
from legrad.quality.metrics import Estimate
from pipeline.annotate.model import load_explainer
from pipeline.config.load import parse_config
from pipeline.datasets.voc import open_voc
from pipeline.datasets.writing import write_shards
from pipeline.demo.assets import DEMO_MODEL_NAME
from pipeline.errors import UserError
from pipeline.evaluation.baseline_masks import BaselineExplainer, write_baseline_masks
from pipeline.evaluation.mask_scores import collect_written_masks
from pipeline.evaluation.sweep import VariantScores, as_markdown, read_sweep
from pipeline.output.folder import OutputFolder
from pipeline.shards.ground_truth import list_truth_shards
from tests.helpers.dataset_trees import write_voc
from tests.helpers.processes import REPOSITORY
from tests.helpers.tiny_models import EMBED_DIM, tiny_clip, tiny_images, unit_texts

DEMO = {
    "input": {"shards": "-", "image": "jpg", "caption": "json:captions"},
    "model": {"name": DEMO_MODEL_NAME, "pretrained": "demo", "precision": "fp32"},
    "prompts": {"source": "captions"},
    "masks": {"refine": "none"},
    "output": {"dir": "-"},
    "run": {"decode_threads": 1, "gpus_per_worker": 0},
}
SWEEP = {
    "models": ["demo.yaml"],
    "common": ["model.layers=1"],
    "variants": {"default": [], "keys": ["model.affinity=keys"]},
    "baselines": {"NACLIP": [], "MaskCLIP-cut-0.6": ["masks.value=0.6"]},
}


def write_sweep(folder, **changes):
    (folder / "demo.yaml").write_text(json.dumps(DEMO))
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(SWEEP | changes))
    return path


@pytest.fixture
def shards(tmp_path):
    """Three images of VOC in shards of two."""
    write_voc(tmp_path / "voc", ["2007_000001", "2007_000002", "2007_000003"])
    write_shards(open_voc(tmp_path / "voc"), str(tmp_path / "shards"))
    return list_truth_shards(str(tmp_path / "shards" / "*.tar"))


def test_a_sweep_names_each_variant_of_each_model_and_where_its_masks_go(tmp_path):
    found = read_sweep(write_sweep(tmp_path), ["a.tar", "b.tar"], "out")
    assert [(each.model, each.name, each.baseline) for each in found] == [
        ("demo", "default", None),
        ("demo", "keys", None),
        ("demo", "NACLIP", "NACLIP"),
        ("demo", "MaskCLIP-cut-0.6", "MaskCLIP"),
    ]
    assert [each.config.model.affinity for each in found] == ["none", "keys", "none", "none"]
    assert {each.config.model.layers for each in found} == {1}
    assert found[3].config.masks.value == 0.6
    assert found[1].config.input.shards == ["a.tar", "b.tar"]
    assert found[1].config.output.dir.endswith("out/demo/keys")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": {}}, "variant: Extra inputs are not permitted"),
        ({"variants": {}}, "variants: .*at least 1"),
        ({"variants": {"../default": []}}, "variants.*pattern"),
        (
            {"baselines": {"GEM": []}},
            "baselines.GEM: expected a name that begins with MaskCLIP, SCLIP, NACLIP",
        ),
        ({"common": ["masks.vale=0.4"]}, "masks.vale.*masks.value"),
    ],
)
def test_a_wrong_sweep_is_refused_with_what_was_expected(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_sweep(write_sweep(tmp_path, **changes), ["a.tar"], "out")


def test_the_explainer_of_a_baseline_returns_its_cosines_for_any_form_of_prompts():
    plain = legrad.LeGrad(tiny_clip())
    explainer, images, texts = BaselineExplainer(plain, "NACLIP"), tiny_images(2), unit_texts(3)
    trace, rows = explainer.encode(images), torch.tensor([1, 0, 1])
    expected = legrad.baseline(plain, "naclip", images, texts, rows)
    torch.testing.assert_close(explainer.relevance(trace, texts, rows), expected)
    assert explainer.relevance(images, texts).shape == (2, 3, 3, 5)
    torch.testing.assert_close(explainer.relevance(images, texts)[1, 0], expected[0])
    assert explainer.similarity(trace, texts).shape == (2, 3)
    assert explainer.embed_dim == EMBED_DIM
    with pytest.raises(UserError, match="'LeGrad': expected one of MaskCLIP, SCLIP, NACLIP"):
        BaselineExplainer(plain, "LeGrad")


def test_masks_of_a_baseline_are_those_of_its_map_and_finished_shards_are_skipped(tmp_path, shards):
    config = parse_config(DEMO | {"output": {"dir": str(tmp_path / "out")}})
    done = []
    job_hash = write_baseline_masks(config, shards, "NACLIP", on_shard=done.append)
    written = collect_written_masks(
        OutputFolder(config.output.dir), shards, config.input, "captions", job_hash
    )
    assert written.damaged_files == ()
    assert len(written.scenes) == 3
    assert sum(len(scene.ious) for scene in written.scenes) == 6
    assert len(done) == len(shards)
    assert write_baseline_masks(config, shards, "NACLIP", on_shard=done.append) == job_hash
    assert len(done) == len(shards)
    # another baseline is no part of these masks
    assert write_baseline_masks(config, shards, "MaskCLIP", on_shard=done.append) != job_hash
    assert len(done) == 2 * len(shards)
    assert load_explainer(config.model, "cpu").tower.family == "clip"


def test_the_table_shows_percent_with_half_the_interval_and_what_is_undefined():
    half = {"value": 0.5, "low": 0.4, "high": 0.62, "images": 1449}
    estimate = Estimate(**half)
    scores = VariantScores("vit", "default", 1449, estimate, estimate, None, estimate, None)
    lines = as_markdown([scores]).splitlines()
    assert lines[2] == "| vit | default | 50.0 ±11.0 | - | 50.0 ±11.0 | - | 50.0 ±11.0 |"
    assert "1,449 scenes" in lines[-1]


@pytest.mark.slow
def test_one_command_converts_voc_annotates_every_variant_and_prints_the_table(tmp_path):
    write_voc(tmp_path / "voc", ["2007_000001", "2007_000002"])
    sweep, out = write_sweep(tmp_path), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "pipeline.cli.sweep",
        str(sweep),
        "--voc",
        str(tmp_path / "voc"),
        "--out",
    ]

    def run():
        return subprocess.run(
            [*command, str(out)], cwd=REPOSITORY, check=False, capture_output=True, text=True, timeout=280
        )

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    table = (out / "sweep.md").read_text()
    assert table.strip() in first.stdout
    assert [line.split(" | ")[1] for line in table.splitlines()[2:6]] == list(
        SWEEP["variants"] | SWEEP["baselines"]
    )
    scores = json.loads((out / "sweep.json").read_text())
    assert [each["scenes"] for each in scores] == [2] * 4
    assert [each["difference"] is None for each in scores] == [True, False, False, False]
    assert np.isfinite([each["mean_iou"]["value"] for each in scores]).all()
    assert (out / "demo" / "keys" / "_SUCCESS").exists()
    assert not (out / "demo" / "NACLIP" / "job.json").exists()

    again = run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("nothing to do: all 1 shard(s) were annotated before") == 2
    assert (out / "sweep.md").read_text() == table
