"""A loaded model has exactly the weights that are named, for every kind of name."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file, save_file

import legrad
from legrad.loading import load_model, model_digest
from tests.helpers.hub_server import hub_for_client
from tests.helpers.local_hub import VOCABULARY, save_random_weights, save_text_model_like, tokenizer_like
from tests.helpers.tiny_models import EMBED_DIM, TEXT, VISION, fill, tiny_images, unit_texts

CONFIG = {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": TEXT | {"vocab_size": 49408}}
WEIGHTS = "open_clip_model.safetensors"
REPOSITORY = "hf-hub:org/tiny"


def write_model(folder: Path, *, hf_tokenizer: str | None = None, seed: int = 0, **config) -> Path:
    """Write a tiny model as a repository of open_clip's has it; with a tokenizer if one is named."""
    folder.mkdir(parents=True, exist_ok=True)
    model_config = json.loads(json.dumps(CONFIG | config))
    if hf_tokenizer is not None:
        tokenizer_like("xlm-roberta").save_pretrained(folder)
        model_config["text_cfg"] |= {"hf_tokenizer_name": hf_tokenizer, "vocab_size": VOCABULARY}
    document = {"model_cfg": model_config, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3]}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    save_random_weights(folder, seed)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model that brings its weights and a tokenizer of Hugging Face."""
    return write_model(tmp_path / "model", hf_tokenizer="org/tiny")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with org/tiny on it, and an empty cache on this machine."""
    write_model(tmp_path / "hub" / "org" / "tiny", hf_tokenizer="org/tiny")
    (tmp_path / "hub" / "org" / "bare").mkdir()
    with hub_for_client(tmp_path, monkeypatch) as server:
        yield server


def go_offline(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def map_of(model: torch.nn.Module) -> torch.Tensor:
    return legrad.LeGrad(model).relevance(tiny_images(), unit_texts(2))


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def beside(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(folder / WEIGHTS, folder / name)
    return without(folder, WEIGHTS)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: without(folder, WEIGHTS), "has no weights; expected open_clip_model"),
    "several weights": (
        lambda folder: beside(folder, "a.safetensors", "b.bin"),
        r"several checkpoints \(a.safetensors, b.bin\); name one open_clip_model",
    ),
    "no configuration": (lambda folder: without(folder, "open_clip_config.json"), "no open_clip_config.json"),
    "no tokenizer": (lambda folder: without(folder, "tokenizer.json"), "no vocabulary of a tokenizer"),
    "no folder": (shutil.rmtree, "is no folder on this machine"),
    "not JSON": (lambda folder: (folder / "open_clip_config.json").write_text("{"), "is not valid JSON"),
    "deep JSON": (
        lambda folder: (folder / "open_clip_config.json").write_text("[" * 10**6),
        "not valid JSON",
    ),
    "a list": (lambda folder: (folder / "open_clip_config.json").write_text("[]"), "expected a JSON object"),
    "of transformers": (lambda folder: (folder / "open_clip_config.json").write_text("{}"), "no model_cfg"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_all_that_a_model_is_made_of_gives_no_model(folder, kind):
    damage, message = FOLDERS[kind]
    damage(folder)
    for attempt in (load_model, model_digest):
        with pytest.raises(legrad.ModelLoadError, match=message) as caught:
            attempt(f"local-dir:{folder}", None)
        assert "\n" not in str(caught.value)


def test_what_a_hub_has_is_loaded_and_known_by_one_digest_before_its_weights_are_fetched(hub, tmp_path):
    digest = model_digest(REPOSITORY, None)
    assert not any("GET" in line and WEIGHTS in line for line in hub.asked)
    loaded = load_model(REPOSITORY, None, expected_digest=digest, device="cpu")
    assert isinstance(loaded.tokenizer, HFTokenizer)
    assert loaded.model.visual.preprocess_cfg["mean"] == [0.5, 0.4, 0.3]
    expected = load_file(tmp_path / "hub" / "org" / "tiny" / WEIGHTS)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())


def test_what_was_fetched_needs_no_connection_and_has_the_same_digest(hub, monkeypatch):
    digest = model_digest(REPOSITORY, None)
    load_model(REPOSITORY, None, device="cpu")
    go_offline(monkeypatch)
    hub.asked.clear()
    assert model_digest(REPOSITORY, None) == digest
    load_model(REPOSITORY, None, expected_digest=digest, device="cpu")
    assert hub.asked == []


def test_weights_that_the_hub_refuses_are_an_error_and_never_random(hub):
    hub.refused.add(WEIGHTS)
    shutil.copy(
        hub.root / "org" / "tiny" / WEIGHTS, hub.root / "org" / "tiny" / "open_clip_pytorch_model.bin"
    )
    with pytest.raises(legrad.ModelLoadError, match="does not give them now: 429") as caught:
        load_model(REPOSITORY, None, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:org/bare", "no open_clip_config.json, so it is not a model of open_clip"),
        ("hf-hub:org/nothing", "has no such repository"),
    ],
)
def test_a_repository_without_a_model_is_refused_in_one_line(hub, name, message):
    with pytest.raises(legrad.ModelLoadError, match=message) as caught:
        load_model(name, None, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_repository_without_weights_gives_no_model(hub):
    without(hub.root / "org" / "tiny", WEIGHTS)
    for attempt in (load_model, model_digest):
        with pytest.raises(legrad.ModelLoadError, match="lacks a file"):
            attempt(REPOSITORY, None)


def test_a_tokenizer_is_looked_for_before_the_weights(hub, monkeypatch):
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", with_text(hf_tokenizer_name="org/elsewhere"))
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"tag": {"hf_hub": "org/tiny/"}})
    go_offline(monkeypatch)
    message = "tokenizer, org/elsewhere, is missing; .* run `legrad models --fetch tiny tag`"
    with pytest.raises(legrad.ModelLoadError, match=message):
        load_model("tiny", "tag", device="cpu")
    assert not any(WEIGHTS in line for line in hub.asked)


def with_text(**text) -> dict:
    return CONFIG | {"text_cfg": CONFIG["text_cfg"] | text}


def test_a_slash_in_a_name_gives_the_tokenizer_of_the_model(folder, monkeypatch):
    config = with_text(hf_tokenizer_name=str(folder), vocab_size=VOCABULARY)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-B-32", config)
    for name in ("tiny-B/32", "tiny-B-32"):
        loaded = load_model(name, str(folder / WEIGHTS), device="cpu")
        assert isinstance(loaded.tokenizer, HFTokenizer)


def test_a_tag_is_not_hidden_by_a_file_of_its_name(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    Path("tag").write_bytes(b"no weights")
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", with_text(vocab_size=VOCABULARY))
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"tag": {"hf_hub": "org/tiny/"}})
    assert map_of(load_model("tiny", "tag", device="cpu").model).isfinite().all()


@pytest.mark.parametrize("name", ["local-dir:{}", "hf-hub:org/tiny"])
def test_weights_named_twice_are_refused(name, folder):
    for attempt in (load_model, model_digest):
        with pytest.raises(legrad.ModelLoadError, match="brings its own weights"):
            attempt(name.format(folder), "openai")


def changed_weights(folder: Path) -> None:
    save_random_weights(folder, seed=1)


def changed_config(folder: Path) -> None:
    path = folder / "open_clip_config.json"
    path.write_text(path.read_text().replace('"embed_dim"', '"quick_gelu": true, "embed_dim"'))


def changed_preprocessing(folder: Path) -> None:
    text = (folder / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(text.replace("0.4", "0.45"))


def changed_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"a"', '"\\u0416"', 1))


def changed_tokenizer_options(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": True}))


def changed_text_model(folder: Path) -> None:
    path = folder / "text_model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 1e-3}))


CHANGES = [
    changed_weights,
    changed_config,
    changed_preprocessing,
    changed_tokenizer,
    changed_tokenizer_options,
    changed_text_model,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_byte_that_decides_what_a_model_computes_is_in_its_digest(tmp_path, change):
    folder = tmp_path / "model"
    save_text_model_like("xlm-roberta", folder / "text_model")
    write_model(
        folder,
        hf_tokenizer="any",
        text_cfg={
            "hf_model_name": str(folder / "text_model"),
            "hf_proj_type": "linear",
            "context_length": 16,
        },
    )
    before = model_digest(f"local-dir:{folder}", None)
    assert before.startswith("sha256:")
    change(folder)
    assert model_digest(f"local-dir:{folder}", None) != before
    with pytest.raises(legrad.ModelLoadError, match=r"have the digest sha256:.*the job's have sha256:"):
        load_model(f"local-dir:{folder}", None, expected_digest=before, device="cpu")


def test_a_folder_that_only_moved_keeps_its_digest(folder, tmp_path):
    before = model_digest(f"local-dir:{folder}", None)
    moved = folder.rename(tmp_path / "moved")
    (moved / "README.md").write_text("decides nothing")
    assert model_digest(f"local-dir:{moved}", None) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["visual.proj", "ln_final.bias", "logit_scale"])
def test_weights_that_are_not_finite_are_found_at_once(folder, value, tensor):
    state = load_file(folder / WEIGHTS)
    state[tensor].view(-1)[-1] = value
    save_file(state, folder / WEIGHTS)
    with pytest.raises(legrad.ModelLoadError, match=f"not finite.*{tensor} holds NaN or infinity"):
        load_model(f"local-dir:{folder}", None, device="cpu")


def test_weights_too_large_for_the_precision_are_found_at_once(folder):
    state = load_file(folder / WEIGHTS)
    state["visual.proj"][0, 0] = 1e6
    save_file(state, folder / WEIGHTS)
    load_model(f"local-dir:{folder}", None, device="cpu")
    with pytest.raises(legrad.ModelLoadError, match="at precision fp16"):
        load_model(f"local-dir:{folder}", None, device="cpu", precision="fp16")


@pytest.mark.parametrize("missing", ["visual.proj", "token_embedding.weight", "logit_scale"])
def test_a_checkpoint_that_holds_weights_in_part_is_refused(folder, missing):
    state = load_file(folder / WEIGHTS)
    del state[missing]
    save_file(state, folder / WEIGHTS)
    with pytest.raises(legrad.ModelLoadError, match=f"Missing key.*{missing}"):
        load_model(f"local-dir:{folder}", None, device="cpu")


def test_weights_that_a_reader_of_checkpoints_leaves_out_are_found(folder, monkeypatch):
    monkeypatch.setattr(open_clip, "load_checkpoint", lambda model, path, **options: {})
    with pytest.raises(legrad.ModelLoadError, match="not finite, or the checkpoint lacks some"):
        load_model(f"local-dir:{folder}", None, device="cpu")


def test_a_file_follows_the_preprocessing_on_which_all_tags_of_its_name_agree(tmp_path, monkeypatch):
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", CONFIG)
    weights = tmp_path / "weights.safetensors"
    save_file(fill(open_clip.create_model("tiny")).state_dict(), weights)
    siglip, clip = {"mean": (0.5, 0.5, 0.5)}, {"mean": (0.4, 0.4, 0.4)}
    for tags, mean in (
        ({"a": siglip, "b": siglip}, (0.5, 0.5, 0.5)),
        ({"a": siglip, "b": clip}, open_clip.OPENAI_DATASET_MEAN),
        ({}, open_clip.OPENAI_DATASET_MEAN),
    ):
        monkeypatch.setitem(pretrained._PRETRAINED, "tiny", tags)
        made = legrad.LeGrad.from_open_clip("tiny", str(weights), device="cpu")
        assert made.transform.mean == tuple(mean)


def test_loading_logs_nothing_and_restores_the_configuration_of_logging(folder, caplog):
    filters, level = list(logging.getLogger().filters), logging.getLogger("huggingface_hub").level
    with caplog.at_level(logging.WARNING):
        load_model(f"local-dir:{folder}", None, device="cpu")
    assert caplog.messages == []
    assert list(logging.getLogger().filters) == filters
    assert logging.getLogger("huggingface_hub").level == level
