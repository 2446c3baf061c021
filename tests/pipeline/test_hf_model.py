"""Jobs and commands with a model of Hugging Face transformers: `model.name: hf:FOLDER`."""

import tarfile
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from pipeline.annotate.model import check_model_files, load_explainer, resolved, weights_digest
from pipeline.config.schema import ModelConfig
from pipeline.demo import assets
from pipeline.errors import UserError
from pipeline.shards.samples import read_samples
from tests.helpers.corpus import sample, write_shard
from tests.helpers.hf_models import clip_processor, save_hf_folder, tiny_hf_clip
from tests.helpers.remasking import annotated, assert_same_masks, remasked, rows_in, scenes_job
from tests.helpers.tiny_models import PATCH

SCENES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIPModel as `save_pretrained` writes it."""
    transformers_logging.disable_progress_bar()
    yield save_hf_folder(tmp_path_factory.mktemp("model"), tiny_hf_clip(), clip_processor())
    transformers_logging.enable_progress_bar()


@pytest.fixture
def shard(tmp_path):
    """The first scenes of a shard of the demo."""
    with Path(assets.demo_shard_paths("heldout")[0]).open("rb") as tar:
        found = zip(range(SCENES), read_samples(tar, max_member_bytes=1 << 24), strict=False)
        scenes = [scene.fields for _, scene in found]
    samples = [
        sample(f"scene{number}", jpg=scene["jpg"], json=scene["json"], txt=None)
        for number, scene in enumerate(scenes)
    ]
    return write_shard(tmp_path / "scenes.tar", samples)


def test_a_job_annotates_a_shard_and_masks_are_made_again_from_its_maps_without_the_model(
    folder, shard, tmp_path, monkeypatch
):
    model = {"name": f"hf:{folder}", "pretrained": None}
    out = tmp_path / "out"
    config = scenes_job([shard], out, model=model, output={"heatmap": True})
    annotated(load_explainer(config.model, "cpu"), config)
    rows = rows_in(out)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert {(row["heatmap_height"], row["heatmap_width"]) for row in rows.values()} == {(4, 4)}
    assert len({key for _, key, _ in rows}) == SCENES
    monkeypatch.setattr("legrad.hf_loading.made", lambda *_: pytest.fail("the model was loaded"))
    remasked(out, tmp_path / "new")
    assert_same_masks(rows_in(tmp_path / "new"), rows)


def test_files_with_another_digest_than_the_jobs_are_refused(folder):
    model = ModelConfig(name=f"hf:{folder}", precision="fp32")
    explainer = load_explainer(model, "cpu", expected_digest=weights_digest(model))
    assert explainer.patch_size == PATCH
    with pytest.raises(UserError, match="the job's have sha256:0"):
        load_explainer(model, "cpu", expected_digest="sha256:0")


def test_a_folder_that_is_named_from_here_is_found_from_elsewhere(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    named = resolved(ModelConfig(name=f"hf:./{folder.name}"))
    assert named.name == f"hf:{folder}"
    assert resolved(ModelConfig(name="hf:org/model")).name == "hf:org/model"
    monkeypatch.chdir("/")
    check_model_files(named)


def test_a_folder_that_is_missing_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"model\.name hf:.*is no folder on this machine"):
        check_model_files(ModelConfig(name=f"hf:{tmp_path}/none"))


def test_one_image_is_explained_from_the_command_line(folder, legrad, tmp_path):
    with tarfile.open(assets.demo_shard_paths("heldout")[0]) as tar:
        (tmp_path / "scene.jpg").write_bytes(tar.extractfile("heldout-00000.jpg").read())
    out = tmp_path / "out"
    code, printed, _ = legrad(
        "explain", tmp_path / "scene.jpg", "a banana", "--model", f"hf:{folder}", "--out", out
    )
    assert code == 0
    assert "a banana" in printed
    assert (out / "00-a-banana.png").is_file()
