"""A configuration of an untrusted model never runs code."""

import json
import os
from pathlib import Path

import pytest

import legrad
from legrad.loading import load_model, model_digest
from tests.helpers.local_hub import VOCABULARY, save_random_weights, save_text_model_like, tokenizer_like
from tests.helpers.tiny_models import EMBED_DIM, TEXT, VISION

CODE = """
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
Path(r"{trace}").touch()
class EvilTokenizer(PreTrainedTokenizerFast): pass
class EvilConfig(PreTrainedConfig): model_type = "evil"
class EvilModel(PreTrainedModel): config_class = EvilConfig
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model with a text tower and a tokenizer of Hugging Face, and code beside them that leaves a trace."""
    folder = tmp_path / "model"
    save_text_model_like("xlm-roberta", folder / "text_model")
    tokenizer_like("xlm-roberta").save_pretrained(folder)
    text = TEXT | {
        "hf_tokenizer_name": "any",
        "hf_model_name": str(folder / "text_model"),
        "hf_proj_type": "linear",
        "vocab_size": VOCABULARY,
    }
    config = {"model_cfg": {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_random_weights(folder)
    for place in (folder, folder / "text_model"):
        (place / "evil.py").write_text(CODE.format(trace=tmp_path / "was-run"))
    return folder


def set_keys(path: Path, *keys: str, **values) -> None:
    """Set values in a JSON file, below the given keys."""
    document = json.loads(path.read_text()) if path.exists() else {}
    section = document
    for key in keys:
        section = section.setdefault(key, {})
    section.update(values)
    path.write_text(json.dumps(document))


def in_text(folder: Path, **values) -> None:
    set_keys(folder / "open_clip_config.json", "model_cfg", "text_cfg", **values)


def in_options(folder: Path, **values) -> None:
    in_text(folder, tokenizer_kwargs=values)


def in_vision(folder: Path, **values) -> None:
    set_keys(folder / "open_clip_config.json", "model_cfg", "vision_cfg", **values)


def in_tokenizer(folder: Path, **values) -> None:
    set_keys(folder / "tokenizer_config.json", **values)


def in_text_model(folder: Path, **values) -> None:
    set_keys(folder / "text_model" / "config.json", **values)


def with_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def with_device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


TOKENIZER_MAP = {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}}
MODEL_MAP = {"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}}
ATTEMPTS = {
    "trust": lambda folder: (
        in_options(folder, trust_remote_code=True),
        in_tokenizer(folder, **TOKENIZER_MAP),
    ),
    "trust, no map": lambda folder: in_options(folder, trust_remote_code=True),
    "trust elsewhere": lambda folder: in_vision(folder, act_kwargs={"deep": [{"trust_remote_code": True}]}),
    "code from another revision": lambda folder: in_options(folder, code_revision="evil"),
    "a vocabulary elsewhere": lambda folder: in_options(folder, vocab_file="/etc/passwd"),
    "random words": lambda folder: in_text(
        folder, hf_tokenizer_name="", tokenizer_kwargs={"reduction_mask": "random"}
    ),
    "downloads": lambda folder: in_text(
        folder, hf_tokenizer_name="", tokenizer_kwargs={"reduction_mask": "syntax"}
    ),
    "tokenizer with a map": lambda folder: in_tokenizer(folder, **TOKENIZER_MAP),
    "tokenizer of a class with a map": lambda folder: in_tokenizer(
        folder, tokenizer_class="EvilTokenizer", **TOKENIZER_MAP
    ),
    "tokenizer off the list": lambda folder: in_tokenizer(folder, tokenizer_class="BertJapaneseTokenizer"),
    "tokenizer that unpickles": lambda folder: in_tokenizer(folder, tokenizer_class="TransfoXLTokenizer"),
    "configuration of a tokenizer with a map": lambda folder: set_keys(folder / "config.json", **MODEL_MAP),
    "text model with a map": lambda folder: in_text_model(folder, **MODEL_MAP),
    "text model of its own": lambda folder: in_text_model(folder, model_type="evil", **MODEL_MAP),
    "text model of another type": lambda folder: in_text_model(folder, model_type="gpt2"),
    "kernels": lambda folder: in_text_model(folder, attn_implementation="evil/kernels"),
    "kernels in private": lambda folder: in_text_model(folder, _attn_implementation="evil/kernels"),
    "quantization": lambda folder: in_text_model(folder, quantization_config={"quant_method": "gptq"}),
    "vision tower of a hub": lambda folder: in_vision(folder, timm_model_name="hf-hub:evil/vit"),
    "vision tower of a folder": lambda folder: in_vision(folder, timm_model_name="local-dir:/evil"),
    "layers without end": lambda folder: in_vision(folder, layers=10**7),
    "stages without end": lambda folder: in_vision(folder, layers=[3, 10**7, 3, 3]),
    "layers of the text without end": lambda folder: in_text_model(folder, num_hidden_layers=10**7),
    "a pipe as tokenizer": lambda folder: with_pipe(folder / "tokenizer_config.json"),
    "a device as tokenizer": lambda folder: with_device(folder / "tokenizer_config.json"),
    "a pipe as text model": lambda folder: with_pipe(folder / "text_model" / "config.json"),
    "a pipe as weights": lambda folder: with_pipe(folder / "open_clip_model.safetensors"),
}


def test_without_any_of_it_the_model_is_loaded(folder, tmp_path):
    load_model(f"local-dir:{folder}", None, device="cpu")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("kind", ATTEMPTS)
def test_what_would_run_code_is_refused_before_anything_is_made(folder, tmp_path, monkeypatch, kind):
    ATTEMPTS[kind](folder)
    monkeypatch.setattr("open_clip.create_model", lambda *_, **__: pytest.fail("a model was made"))
    monkeypatch.setattr("open_clip.get_tokenizer", lambda *_, **__: pytest.fail("a tokenizer was made"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    attempts = (load_model, model_digest, legrad.LeGrad.from_open_clip)
    for attempt in attempts:
        with pytest.raises(legrad.ModelLoadError) as caught:
            attempt(f"local-dir:{folder}", None)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "was-run").exists()
