"""Error messages for models that could not be made."""

from urllib.error import URLError

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import legrad
from legrad.loading import MAX_CAUSE_LENGTH, load_failure

UNREACHABLE = (
    r"not in this machine's cache and the Hugging Face hub cannot be reached; run `legrad models --fetch"
)


@pytest.fixture
def _offline(monkeypatch, tmp_path):
    """No connection, and nothing downloaded earlier."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    ("name", "pretrained", "advised"),
    [
        ("ViT-B-32", "openai", "ViT-B-32 openai`"),
        ("roberta-ViT-B-32", None, "roberta-ViT-B-32 TAG`"),
        ("hf-hub:nobody/nothing", None, "hf-hub:nobody/nothing null`"),
    ],
)
def test_without_a_connection_the_error_names_the_command_that_fetches_the_files(name, pretrained, advised):
    with pytest.raises(legrad.ModelLoadError, match=f"{UNREACHABLE} {advised}") as caught:
        legrad.LeGrad.from_open_clip(name, pretrained, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cause", [URLError("no route"), LocalEntryNotFoundError("not cached")])
def test_what_open_clip_wraps_is_looked_through(cause):
    try:
        try:
            raise cause
        except Exception as error:
            raise RuntimeError(f"Failed to download weights for tag 'x': {error}")  # noqa: B904
    except RuntimeError as wrapped:
        assert "cannot be reached" in load_failure("ViT-B-16", "x", wrapped)


def test_the_extra_is_named_only_where_transformers_is_missing(monkeypatch):
    error = RuntimeError("Please `pip install transformers` to use pre-trained HuggingFace models")
    assert "pip install 'legrad-pipeline[hf]'" not in load_failure("roberta-ViT-B-32", None, error)
    monkeypatch.setattr("legrad.loading.find_spec", lambda name: None)
    for missing in (error, ImportError("No module named 'transformers'")):
        assert "pip install 'legrad-pipeline[hf]'" in load_failure("roberta-ViT-B-32", None, missing)


def test_a_long_cause_is_one_line_cut_between_words():
    message = load_failure("ViT-B-16", "x", ValueError("several  words\n" * 100))
    assert message.endswith("several words ...")
    assert "\n" not in message
    assert len(message) < MAX_CAUSE_LENGTH + 100


def test_an_error_without_words_is_named():
    assert load_failure("ViT-B-16", "x", KeyError()).endswith("'x': KeyError")
