"""What is wrong with a model's name, tag, files or layers is reported before anything starts."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pipeline.annotate.model import check_model, is_built_in, load_explainer, resolved, weights_digest
from pipeline.config.schema import ModelConfig
from pipeline.demo import assets
from pipeline.demo.assets import DEMO_MODEL_NAME
from pipeline.errors import UserError
from pipeline.output.folder import OutputFolder
from pipeline.run.job import prepare_job
from pipeline.run.worker import Worker, build_annotator
from tests.helpers.corpus import demo_job, write_word_shards


def model(name="ViT-B-32", pretrained="openai", **settings):
    return ModelConfig(name=name, pretrained=pretrained, **settings)


def test_models_with_known_tags_checkpoints_and_hub_addresses_pass(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    for good in (
        model(),
        model("ViT-B/32", "laion2b-s34b-b79k", layers=12),
        model(pretrained=str(tmp_path / "weights.pt"), layers="all"),
        model("hf-hub:someone/something", None),
        model(DEMO_MODEL_NAME, "demo"),
    ):
        check_model(good)


@pytest.mark.parametrize(
    ("wrong", "expected_message"),
    [
        (model("ViT-B-33"), "model.name ViT-B-33: .*nearest: ViT-B-32"),
        (
            model("timm:vit_base_patch16_224"),
            "model.name timm:.*: a classifier has no texts .*legrad explain",
        ),
        (model("RN50"), "model.name RN50: .*convolutional.*legrad models"),
        (model(pretrained="opnai"), "model.pretrained: .* for ViT-B-32 one of openai, .*got 'opnai'"),
        (model(layers=13), "model.layers: ViT-B-32 has 12 blocks, got 13"),
    ],
)
def test_a_wrong_name_tag_or_number_of_layers_is_reported_with_what_would_be_right(wrong, expected_message):
    with pytest.raises(UserError, match=expected_message):
        check_model(wrong)


def test_the_demos_architecture_takes_other_weights_from_a_file(tmp_path):
    checkpoint = shutil.copy(assets.demo_weights_path(), tmp_path / "wéights [1] 50%.safetensors")
    check_model(model(DEMO_MODEL_NAME, str(checkpoint)))
    assert load_explainer(model(DEMO_MODEL_NAME, str(checkpoint)), "cpu").tower.family == "clip"


def test_the_affinity_of_the_configuration_is_that_of_the_explainer():
    demo = model(DEMO_MODEL_NAME, "demo", affinity="keys")
    images = torch.zeros(1, 3, *load_explainer(demo, "cpu").tower.native_size)
    kept = [
        load_explainer(each, "cpu").encode(images).unit_keys
        for each in (demo, model(DEMO_MODEL_NAME, "demo"))
    ]
    assert kept[0] is not None
    assert kept[1] is None


def test_a_job_with_a_wrong_model_writes_nothing(tmp_path):
    shards = write_word_shards(tmp_path / "in", ["a"], 1)
    with pytest.raises(UserError, match=r"model\.layers"):
        prepare_job(demo_job(shards, tmp_path / "out", model={"layers": 99}))
    assert not (tmp_path / "out").exists()


def demo_folder(folder: Path) -> Path:
    """The demo's model as a folder that brings its weights."""
    folder.mkdir()
    config = {"model_cfg": json.loads(assets.demo_model_config_path().read_text())}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copy(assets.demo_weights_path(), folder / "open_clip_model.safetensors")
    return folder


def replace_weights(folder: Path, value: float) -> None:
    """Change one weight, and leave the file's size and time as they were."""
    path = folder / "open_clip_model.safetensors"
    state, times = load_file(path), path.stat()
    state["visual.proj"][0, 0] = value
    save_file(state, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "pretrained", "expected_message"),
    [
        ("local-dir:model", "weights.pt", "must be null, because local-dir:model brings its own weights"),
        ("hf-hub:org/model", "openai", "must be null"),
        ("ViT-B-32", None, "required, because ViT-B-32 brings no weights"),
        ("ViT-B-32", "", "a text that is not empty"),
        (DEMO_MODEL_NAME, None, "required"),
    ],
)
def test_weights_are_named_once(name, pretrained, expected_message):
    with pytest.raises(ValidationError, match=expected_message):
        ModelConfig(name=name, pretrained=pretrained)
    if pretrained is None:
        with pytest.raises(ValidationError, match=expected_message):
            ModelConfig(name=name)


def test_a_job_records_the_digest_of_the_weights_that_a_folder_brings(tmp_path):
    folder = demo_folder(tmp_path / "model")
    shards = write_word_shards(tmp_path / "in", ["a"], 1)
    section = {"name": f"local-dir:{folder}", "pretrained": None}
    job = prepare_job(demo_job(shards, tmp_path / "out", model=section))
    before = OutputFolder(str(tmp_path / "out")).job().weights_digest
    assert before == job.stamp.weights_digest == weights_digest(ModelConfig(**section))
    (tmp_path / "out" / "annotations").mkdir()
    (tmp_path / "out" / "annotations" / "a.parquet").write_bytes(b"rows")
    replace_weights(folder, 0.5)
    with pytest.raises(UserError, match="results of another configuration"):
        prepare_job(demo_job(shards, tmp_path / "out", model=section))
    assert OutputFolder(str(tmp_path / "out")).job().weights_digest == before


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_a_job_whose_weights_are_not_there_writes_nothing(tmp_path, damage):
    folder = demo_folder(tmp_path / "model")
    path = folder / "open_clip_model.safetensors"
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1")
    shards = write_word_shards(tmp_path / "in", ["a"], 1)
    section = {"name": f"local-dir:{folder}", "pretrained": None}
    with pytest.raises(UserError, match=r"model\.name local-dir:") as caught:
        prepare_job(demo_job(shards, tmp_path / "out", model=section))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def worker_outcome(config, digest) -> str:
    metadata = {"weights_digest": digest}
    return Worker(config, metadata, cpus=1, device="cpu", factory=build_annotator).load().message


def test_a_worker_with_other_weights_than_the_drivers_annotates_nothing(tmp_path):
    folder = demo_folder(tmp_path / "model")
    section = {"name": f"local-dir:{folder}", "pretrained": None}
    config = demo_job([], tmp_path / "out", model=section)
    digest = weights_digest(config.model)
    threads = torch.get_num_threads()
    assert worker_outcome(config, digest) == ""
    replace_weights(folder, 0.5)
    assert "have the digest sha256:" in worker_outcome(config, digest)
    replace_weights(folder, float("nan"))
    assert "visual.proj holds NaN" in worker_outcome(config, weights_digest(config.model))
    torch.set_num_threads(threads)


def test_a_folder_that_is_named_from_here_is_found_from_elsewhere(tmp_path, monkeypatch):
    demo_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    named = resolved(model("local-dir:model", None))
    monkeypatch.chdir("/")
    assert load_explainer(named, "cpu").embed_dim


def test_a_tag_stays_a_tag_beside_a_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("openai").write_bytes(b"no weights")
    check_model(model())
    assert is_built_in(model())
    assert resolved(model()) == resolved(model("ViT-B/32")) == model()


@pytest.mark.parametrize(
    "named",
    [
        model("hf-hub:org/model", None),
        model("local-dir:model", None),
        model(pretrained="weights.pt"),
        model(pretrained="/tmp/openai"),
        model("ViT-B-33"),
        model("ViT-B-32", "demo"),
    ],
)
def test_addresses_paths_and_unknown_names_are_not_built_in(named):
    assert not is_built_in(named)


def test_the_demo_and_tags_of_open_clip_are_built_in():
    assert is_built_in(model(DEMO_MODEL_NAME, "demo"))
    assert is_built_in(model("ViT-B/32", "laion2b-s34b-b79k"))
