"""`legrad remask` as a user runs it: on Ray, in parts, resumed; and its exit codes."""

import subprocess
import sys

import pytest

from pipeline.annotate.model import load_explainer
from pipeline.config.schema import ModelConfig
from pipeline.demo.assets import DEMO_MODEL_NAME
from tests.helpers.corpus import captions_json, image_bytes, sample, write_shard
from tests.helpers.remasking import annotated, assert_same_masks, counts_of, remasked, rows_in, scenes_job
from tests.helpers.waiting import PATIENCE_S


@pytest.fixture
def stored(tmp_path):
    """OUT of three shards of two samples; one sample of them is damaged."""
    explainer = load_explainer(
        ModelConfig(name=DEMO_MODEL_NAME, pretrained="demo", precision="fp32"), device="cpu"
    )
    captions = captions_json(["a dog", "a red car"])
    shards = [
        write_shard(
            tmp_path / f"{name}.tar",
            [
                sample(f"{name}{number}", txt=None, json=captions, jpg=image_bytes(seed + number))
                for number in range(2)
            ]
            + ([sample("broken", txt=None, json=captions, jpg=b"no image")] if name == "c" else []),
        )
        for seed, name in enumerate("abc")
    ]
    config = scenes_job(shards, tmp_path / "out", run={"error_budget": 0.5, "cpus_per_worker": 1})
    return annotated(explainer, config)


def legrad(*arguments):
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.returncode, done.stdout + done.stderr


def test_masks_are_made_again_on_ray_in_two_runs_and_refused_in_one_line(stored, tmp_path):
    new = tmp_path / "new"
    code, said = legrad("remask", stored, new, "masks.rule=otsu", "masks.refine=par", "--limit", 1)
    assert (code, "left: " in said) == (3, True), said
    code, said = legrad("remask", stored, new, "masks.rule=otsu", "masks.refine=par")
    assert (code, "1 done before" in said) == (0, True), said
    code, said = legrad("status", new)
    assert (code, "6 annotated, 0 empty, 1 failed" in said) == (0, True), said
    here = remasked(stored, tmp_path / "here", "masks.rule=otsu", "masks.refine=par")
    assert_same_masks(rows_in(new), rows_in(here), least_iou=1)
    assert counts_of(new) == counts_of(here)
    code, said = legrad("remask", stored, tmp_path / "other", "masks.vaule=0.4")
    assert (code, "Traceback" in said) == (1, False), said
    assert "masks.value" in said
    code, said = legrad("annotate", tmp_path / "no.yaml")
    assert code == 1
