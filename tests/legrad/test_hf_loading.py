"""Loading models of transformers: from folders and a hub, complete, by digest, and without running code."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import legrad
from legrad.loading import check_files, load_model, model_digest, model_facts
from tests.helpers.hf_models import (
    SIDE,
    clip_processor,
    save_hf_folder,
    siglip2_processor,
    siglip_processor,
    tiny_hf_clip,
    tiny_siglip,
    tiny_siglip2,
)
from tests.helpers.hub_server import hub_for_client
from tests.helpers.tiny_models import relative_error, tiny_images, unit_texts

MODELS = {
    "clip": (tiny_hf_clip, clip_processor),
    "siglip": (tiny_siglip, siglip_processor),
    "siglip2": (tiny_siglip2, siglip2_processor),
}
TEXTS = ["a cat", "dogs"]


@pytest.fixture
def quiet_transformers():
    """No progress bars of save_pretrained."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path, quiet_transformers) -> Path:
    """A small CLIPModel as `save_pretrained` writes it."""
    return save_hf_folder(tmp_path / "model", tiny_hf_clip(), clip_processor())


@pytest.fixture
def hub(tmp_path, monkeypatch, quiet_transformers):
    """A hub with org/tiny on it, and an empty cache on this machine."""
    save_hf_folder(tmp_path / "hub" / "org" / "tiny", tiny_hf_clip(), clip_processor())
    with hub_for_client(tmp_path, monkeypatch) as server:
        yield server


def _edited(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_maps_and_texts_of_the_saved_model(name, tmp_path, quiet_transformers, caplog):
    make, processor = MODELS[name]
    save_hf_folder(tmp_path, make(), processor())
    expected = legrad.LeGrad(make(), processor=processor())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        received = legrad.LeGrad.from_hugging_face(str(tmp_path), device="cpu")
    assert caplog.records == []
    images, texts = tiny_images(size=(SIDE, SIDE)), unit_texts(2)
    assert torch.equal(received.relevance(images, texts), expected.relevance(images, texts))
    assert torch.equal(received.embed_text(TEXTS), expected.embed_text(TEXTS))
    assert received.transform == expected.transform
    facts = model_facts(f"hf:{tmp_path}", None)
    assert (facts.transform, facts.normalisation) == (expected.transform, expected.tower.normalisation)
    assert transformers_logging.is_progress_bar_enabled() is False


def test_a_repository_on_the_hub_is_loaded_from_files_that_the_digest_names(hub, tmp_path):
    digest = model_digest("hf:org/tiny", None)
    assert "GET /org/tiny/resolve/main/model.safetensors" not in hub.asked  # the hub knows its SHA-256
    loaded = load_model("hf:org/tiny", None, device="cpu", expected_digest=digest)
    images, texts = tiny_images(size=(SIDE, SIDE)), unit_texts(2)
    received = legrad.LeGrad(loaded.model).relevance(images, texts)
    assert torch.equal(received, legrad.LeGrad(tiny_hf_clip()).relevance(images, texts))
    assert model_digest(f"hf:{tmp_path}/hub/org/tiny", None) == digest
    with pytest.raises(legrad.ModelLoadError, match="the job's have sha256:0"):
        load_model("hf:org/tiny", None, device="cpu", expected_digest="sha256:0")


def test_without_connection_the_cache_is_used_or_named(hub, monkeypatch):
    digest = model_digest("hf:org/tiny", None)
    load_model("hf:org/tiny", None, device="cpu")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert model_digest("hf:org/tiny", None) == digest
    with pytest.raises(legrad.ModelLoadError, match="legrad models --fetch hf:org/other null"):
        check_files("hf:org/other", None)


def test_weights_in_several_files_are_loaded_and_all_in_the_digest(folder):
    digest = model_digest(f"hf:{folder}", None)
    whole = load_model(f"hf:{folder}", None, device="cpu").model.state_dict()
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1-of-2.safetensors": names[:20], "model-2-of-2.safetensors": names[20:]}
    (folder / "model.safetensors").unlink()
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
    places = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    split = load_model(f"hf:{folder}", None, device="cpu").model.state_dict()
    assert all(torch.equal(whole[key], split[key]) for key in whole)
    assert model_digest(f"hf:{folder}", None) != digest
    _edited(folder / "model.safetensors.index.json", weight_map={"a": "../elsewhere.safetensors"})
    with pytest.raises(legrad.ModelLoadError, match="does not name safetensors files of its folder"):
        check_files(f"hf:{folder}", None)


def test_every_file_that_decides_is_in_the_digest(folder):
    digests = {model_digest(f"hf:{folder}", None)}
    _edited(folder / "processor_config.json", processor_class="CLIPProcessor", note=1)
    digests.add(model_digest(f"hf:{folder}", None))
    _edited(folder / "tokenizer_config.json", note=1)
    digests.add(model_digest(f"hf:{folder}", None))
    _edited(folder / "config.json", note=1)
    digests.add(model_digest(f"hf:{folder}", None))
    _change_weights(folder, lambda weights: weights["logit_scale"].add_(1))
    digests.add(model_digest(f"hf:{folder}", None))
    assert len(digests) == 5


def _change_weights(folder: Path, change: Callable) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_positions_that_early_versions_saved_are_not_missed(folder):
    _change_weights(
        folder,
        lambda weights: weights.update(
            {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
            | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        ),
    )
    load_model(f"hf:{folder}", None, device="cpu")


REFUSED = {
    "no folder": (shutil.rmtree, "is no folder on this machine"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no preprocessing": (
        lambda folder: (folder / "processor_config.json").unlink(),
        "neither preprocessor_config.json nor processor_config.json",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "weights in other formats, such as pytorch_model.bin, may hold code and are not loaded",
    ),
    "no vocabulary": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "has no vocabulary of a tokenizer",
    ),
    "code": (
        lambda folder: _edited(folder / "config.json", auto_map={"AutoModel": "x.Y"}),
        "has the key auto_map: code that comes with a model is never run",
    ),
    "code of the processor": (
        lambda folder: _edited(folder / "processor_config.json", auto_map={"AutoProcessor": "x.Y"}),
        "has the key auto_map",
    ),
    "code of the tokenizer": (
        lambda folder: _edited(folder / "tokenizer_config.json", tokenizer_class="OtherTokenizer"),
        "the class or type 'OtherTokenizer'",
    ),
    "other model": (
        lambda folder: _edited(folder / "config.json", model_type="vit"),
        "model_type is 'vit'; expected one of clip, siglip, siglip2",
    ),
    "other processor": (
        lambda folder: _edited(
            folder / "processor_config.json", image_processor={"image_processor_type": "ViTImageProcessor"}
        ),
        "the image processor is 'ViTImageProcessor'; for model_type clip expected CLIP",
    ),
    "missing weights": (
        lambda folder: _change_weights(
            folder, lambda weights: weights.pop("vision_model.encoder.layers.1.mlp.fc1.weight")
        ),
        "its weights lack vision_model.encoder.layers.1.mlp.fc1.weight",
    ),
    "weights beyond its own": (
        lambda folder: _change_weights(
            folder, lambda weights: weights.update({"adapter.weight": torch.ones(2)})
        ),
        "its weights hold, beyond the model's, adapter.weight",
    ),
    "weights of other shapes": (
        lambda folder: _change_weights(
            folder, lambda weights: weights.update({"visual_projection.weight": torch.ones(2, 2)})
        ),
        "its weights have other shapes at visual_projection.weight",
    ),
    "weights that are not finite": (
        lambda folder: _change_weights(
            folder, lambda weights: weights["visual_projection.weight"].fill_(float("nan"))
        ),
        "visual_projection.weight holds NaN or infinity",
    ),
    "damaged weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"damaged" * 9),
        "is no sound safetensors file",
    ),
    "a pointer": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/1"),
        "is a pointer of Git LFS",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_refused_in_one_line(case, folder):
    change, said = REFUSED[case]
    change(folder)
    with pytest.raises(legrad.ModelLoadError) as refusal:
        load_model(f"hf:{folder}", None, device="cpu")
    message = str(refusal.value)
    assert said in message
    assert "\n" not in message
    assert message.startswith("transformers could not make 'hf:")


def test_a_checkpoint_beside_the_name_is_refused(folder):
    with pytest.raises(legrad.ModelLoadError, match="the name brings its own weights"):
        model_digest(f"hf:{folder}", "openai")


def test_a_folder_is_named_relative_to_where_the_command_runs(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert model_digest("hf:./model", None) == model_digest("hf:model", None)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_all_weights_get_the_precision_that_is_asked_for(folder, precision, dtype):
    explainer = legrad.LeGrad.from_hugging_face(f"hf:{folder}", precision=precision, device="cpu")
    assert {parameter.dtype for parameter in explainer.model.parameters()} == {dtype}
    images, texts = tiny_images(size=(SIDE, SIDE)), unit_texts(2)
    expected = legrad.LeGrad(tiny_hf_clip()).relevance(images, texts)
    assert relative_error(explainer.relevance(images.to(dtype), texts), expected) < 0.1
