"""Every kind of text tower and tokenizer that open_clip configures, against the model one text at a time."""

import json
import pickle
from copy import deepcopy
from pathlib import Path

import open_clip
import pytest
import torch

import legrad
from legrad.text_cache import TextEmbedder
from legrad.tokens import RowTokenizer, picklable_tokenizer
from tests.helpers.local_hub import (
    VOCABULARY,
    WIDTH,
    save_random_weights,
    save_text_model_like,
    tokenizer_like,
)
from tests.helpers.token_rows import token_ids, truncated

SIZES = {"width", "heads", "layers", "mlp_ratio", "vocab_size", "context_length"}
VISION = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8}
TEXTS = [
    "a dog",
    "",
    "A photo of TWO dogs, &amp; a cat!!!",
    "ein Hündchen 犬 猫",
    "dog cat " * 100,
    "a dog",
    "  wide   spaces\n",
    "a very long text, " * 9,
]


def _kind(config: dict) -> str:
    """All that distinguishes one text tower from another except sizes; hub names without variants of size."""
    text = {key: value for key, value in config["text_cfg"].items() if key not in SIZES}
    for key in ("hf_model_name", "hf_tokenizer_name"):
        for architecture in ("SigLIP2", "SigLIP", "mt5", "nllb", "xlm-roberta"):
            if architecture in text.get(key, ""):
                text[key] = architecture
                break
    text["custom"] = bool(config.get("custom_text"))
    text["coca"] = "multimodal_cfg" in config
    return json.dumps(text, sort_keys=True)


def _one_model_of_each_kind() -> list[str]:
    names = {_kind(open_clip.get_model_config(name)): name for name in reversed(open_clip.list_models())}
    return sorted(names.values())


def _in_small(name: str, folder: Path) -> Path:
    """Write the configuration of that name with small sizes, and what it names on the hub, into a folder."""
    config = deepcopy(open_clip.get_model_config(name))
    config |= {"embed_dim": 24, "vision_cfg": dict(VISION)}
    text = config["text_cfg"]
    if "hf_model_name" in text:
        save_text_model_like(text["hf_model_name"], folder / "text_model")
        text["hf_model_name"] = str(folder / "text_model")
    else:
        text |= {"heads": 2, "layers": 2}
        text["width"] = 24 if text.get("proj_type") == "none" else WIDTH
    if "hf_tokenizer_name" in text:
        tokenizer_like(text["hf_tokenizer_name"]).save_pretrained(folder)
        text["vocab_size"] = VOCABULARY
    else:
        text["vocab_size"] = 49408
    if "multimodal_cfg" in config:
        config["vision_cfg"]["output_tokens"] = True
        config["multimodal_cfg"] |= {"width": WIDTH, "heads": 2, "layers": 1}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder


@pytest.fixture(scope="module", params=_one_model_of_each_kind())
def explainer(request, tmp_path_factory) -> legrad.LeGrad:
    folder = _in_small(request.param, tmp_path_factory.mktemp("model"))
    save_random_weights(folder)
    made = legrad.LeGrad.from_open_clip(f"local-dir:{folder}", device="cpu")
    made.configured_context = open_clip.get_model_config(request.param)["text_cfg"].get("context_length", 77)
    return made


def test_rows_are_the_models_own_of_each_text_alone(explainer):
    with torch.no_grad():
        alone = [explainer.model.encode_text(explainer.tokenizer([text]), normalize=True) for text in TEXTS]
    embedder = TextEmbedder(explainer, batch_size=3)
    torch.testing.assert_close(embedder.embed(TEXTS).unit_rows, torch.cat(alone), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(explainer.embed_text(TEXTS), torch.cat(alone), rtol=1e-5, atol=2e-6)


def test_a_copy_of_the_tokenizer_needs_no_files(explainer):
    copied = deepcopy(explainer.tokenizer)
    assert torch.equal(copied(TEXTS), explainer.tokenizer(TEXTS))
    assert torch.equal(pickle.loads(pickle.dumps(copied))(TEXTS), copied(TEXTS))


def test_another_process_makes_the_same_tokens(explainer):
    made = picklable_tokenizer(explainer.tokenizer)
    assert pickle.loads(pickle.dumps(made))(TEXTS) == made(TEXTS) == RowTokenizer(explainer.tokenizer)(TEXTS)


def test_the_tokenizer_has_the_configured_context(explainer):
    assert explainer.tokenizer.context_length == explainer.configured_context


def test_texts_of_which_tokens_are_lost_are_flagged(explainer):
    tokenizer = explainer.tokenizer
    # around the limit, one token at a time, whatever the number of marks
    texts = [*TEXTS, *("x " * count for count in range(tokenizer.context_length + 3))]
    whole = tokenizer(texts, context_length=2000)
    cut = tokenizer(texts)
    expected = [
        len(_content(tokenizer, row)) > len(_content(tokenizer, cut_row))
        for row, cut_row in zip(whole, cut, strict=True)
    ]
    assert len(set(expected)) == 2
    assert truncated(tokenizer, texts) == expected
    assert torch.equal(token_ids(tokenizer, texts), cut)
    assert list(TextEmbedder(explainer).embed(texts).truncated) == expected


def _content(tokenizer, row) -> list[int]:
    special = tokenizer.tokenizer.all_special_ids if hasattr(tokenizer, "tokenizer") else [49406, 49407, 0]
    return [token_id for token_id in row.tolist() if token_id not in special]
