"""Files that are no checkpoint, or not of this model, are refused in one line with the way out."""

import argparse
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import save_file

import legrad
from legrad.loading import load_model, model_digest
from legrad.weights.hub_files import file_sha256
from tests.helpers.tiny_models import EMBED_DIM, TEXT, VISION, fill

CONFIG = {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": TEXT | {"vocab_size": 49408}}


@pytest.fixture(autouse=True)
def _tiny_models_by_name(monkeypatch):
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", CONFIG)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-quickgelu", CONFIG | {"quick_gelu": True})


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return fill(open_clip.create_model("tiny")).state_dict()


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


SAVED = {
    "under model": (lambda state: {"model": state, "epoch": 3}, "has its weights under 'model'.*state_dict"),
    "compiled": (lambda state: prefixed(state, "_orig_mod."), r"begins with '_orig_mod\.'.*removeprefix"),
    "wrapped": (lambda state: prefixed(state, "model."), r"begins with 'model\.'.*removeprefix"),
    "wrapped twice": (lambda state: prefixed(state, "module._orig_mod."), r"begins with '_orig_mod\.'"),
    "with arguments": (
        lambda state: {"state_dict": state, "args": argparse.Namespace(lr=1)},
        r"holds argparse\.Namespace beside its weights, and code in it is never run.*only its state_dict",
    ),
    "no dictionary": (lambda state: list(state.values()), "holds list; expected weights by name"),
    "nothing": (lambda state: {}, "holds no weights"),
    "nothing inside": (lambda state: {"state_dict": {}}, "holds no weights"),
    "of OpenAI's form": (
        lambda state: state | {"input_resolution": torch.tensor(224)},
        "in OpenAI's own format.*the tag openai.*model tiny-quickgelu instead of tiny",
    ),
    "one tower": (
        lambda state: {key: value for key, value in state.items() if key.startswith("visual.")},
        "Missing key",
    ),
    "quantised": (
        lambda state: {key: value.to(torch.int8) for key, value in state.items()},
        r"holds integers \(torch\.int8\).*quantised",
    ),
    "numbers": (lambda state: dict.fromkeys(state, 1.0), "could not make 'tiny'"),
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kind", SAVED)
def test_weights_saved_in_another_layout_are_refused_with_the_way_out(tmp_path, state, kind, old_format):
    change, message = SAVED[kind]
    path = tmp_path / "weights.pt"
    torch.save(change(state), path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(legrad.ModelLoadError, match=message) as caught:
        load_model("tiny", str(path), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"state_dict": prefixed(state, "module.")}]
)
def test_what_open_clip_itself_saves_is_read(tmp_path, state, wrap):
    torch.save(wrap(state), tmp_path / "epoch_1.pt")
    made = load_model("tiny", str(tmp_path / "epoch_1.pt"), device="cpu").model
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


def cut_off(path: Path, state) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])


def torchscript(path: Path, state) -> None:
    with pytest.warns(Warning):
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)


FILES = {
    "empty": ("w.pt", lambda path, state: path.write_bytes(b""), "is empty: download it again"),
    "empty safetensors": ("w.safetensors", lambda path, state: path.write_bytes(b""), "is empty"),
    "a pointer": (
        "w.safetensors",
        lambda path, state: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        "pointer of Git LFS.*git lfs pull",
    ),
    "a web page": ("w.pt", lambda path, state: path.write_text("\n<!DOCTYPE html><p>404"), "is a web page"),
    "text": ("w.pt", lambda path, state: path.write_text("not weights"), "is damaged, or no checkpoint"),
    "text as safetensors": (
        "w.safetensors",
        lambda path, state: path.write_text("not weights at all"),
        "no sound safetensors file",
    ),
    "cut off": ("w.pt", cut_off, "damaged or truncated: download it again"),
    "torch as safetensors": (
        "w.safetensors",
        lambda path, state: torch.save(state, path),
        "no sound safetensors",
    ),
    "safetensors as torch": (
        "w.pt",
        lambda path, state: save_file(state, path),
        r"has the content of a safetensors file: rename it to \*\.safetensors",
    ),
    "TorchScript": (
        "w.pt",
        torchscript,
        "TorchScript archive, which contains code and is never run.*the tag openai",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_without_weights_are_refused_before_anything_is_loaded(tmp_path, state, kind):
    name, write, message = FILES[kind]
    write(tmp_path / name, state)
    for attempt in (load_model, model_digest):
        with pytest.raises(legrad.ModelLoadError, match=message) as caught:
            attempt("tiny", str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_the_error_for_a_missing_file_lists_the_tags_of_the_model(monkeypatch):
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"openai": {}, "laion": {}})
    for attempt in (load_model, model_digest):
        with pytest.raises(
            legrad.ModelLoadError, match=r"neither a file.* nor a tag of tiny, .*openai, laion"
        ):
            attempt("tiny", "opnai")


def like_openai(state):
    """Linear layers rounded to half precision, embeddings and norms not."""
    return {
        key: value.half().float() if ".mlp." in key or "in_proj" in key else value
        for key, value in state.items()
    }


def test_openais_weights_in_a_file_do_not_run_with_plain_gelu(tmp_path, state):
    path = tmp_path / "ViT-B-32.safetensors"
    save_file(like_openai(state), path)
    message = "as in OpenAI's weights.*model tiny-quickgelu instead of tiny.*local-dir"
    for attempt in (load_model, model_digest):
        with pytest.raises(legrad.ModelLoadError, match=message):
            attempt("tiny", str(path))
    load_model("tiny-quickgelu", str(path), device="cpu")


def test_weights_that_are_not_finite_are_not_taken_for_openais(tmp_path, state):
    weights = {key: value.half() for key, value in state.items()}
    weights["token_embedding.weight"][3] = float("nan")
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(legrad.ModelLoadError, match=r"not finite.*token_embedding\.weight holds NaN"):
        load_model("tiny", str(tmp_path / "w.safetensors"), device="cpu")


def test_integers_in_a_safetensors_file_are_no_weights(tmp_path, state):
    save_file({key: value.to(torch.int8) for key, value in state.items()}, tmp_path / "w.safetensors")
    for attempt in (load_model, model_digest):
        with pytest.raises(legrad.ModelLoadError, match=r"holds integers \(I8\)"):
            attempt("tiny", str(tmp_path / "w.safetensors"))


def test_files_of_big_vision_are_refused_for_towers_that_do_not_come_from_it(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(legrad.ModelLoadError, match="big_vision, which open_clip reads for SigLIP"):
        load_model("tiny", str(tmp_path / "w.npz"), device="cpu")


def test_weights_that_only_look_like_openais_run_from_a_folder_with_a_configuration(tmp_path, state):
    save_file(like_openai(state), tmp_path / "open_clip_model.safetensors")
    document = {"model_cfg": CONFIG | {"quick_gelu": False}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
    load_model(f"local-dir:{tmp_path}", None, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_that_are_all_of_one_precision_run_as_they_are_named(tmp_path, state, dtype):
    save_file({key: value.to(dtype) for key, value in state.items()}, tmp_path / "w.safetensors")
    load_model("tiny", str(tmp_path / "w.safetensors"), device="cpu")


@pytest.mark.parametrize(("name", "quick_gelu"), [("tiny", True), ("tiny-quickgelu", False)])
@pytest.mark.parametrize("known_by", ["address", "cache"])
def test_a_tags_file_never_runs_with_another_activation_than_the_tag(
    tmp_path, state, monkeypatch, name, quick_gelu, known_by
):
    path = tmp_path / "models--org--tiny" / "w.safetensors"
    path.parent.mkdir()
    save_file(state, path)
    places = {
        "address": {"url": f"https://openaipublic.azureedge.net/clip/models/{file_sha256(path)}/x.pt"},
        "cache": {"hf_hub": "org/tiny/"},
    }
    tag = {"quick_gelu": quick_gelu, **places[known_by]}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"some_tag": tag})
    with pytest.raises(legrad.ModelLoadError, match=r"has the weights of the tag some_tag.*some_tag"):
        load_model(name, str(path), device="cpu")
    other = tmp_path / "other.safetensors"
    shutil.copy(path, other)
    if known_by == "cache":
        load_model(name, str(other), device="cpu")
