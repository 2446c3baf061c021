"""Embedding texts as unit rows."""

import open_clip
import pytest
import torch
from torch import nn

import legrad
from legrad.text import CPU_BATCH_SIZE
from tests.helpers.tiny_models import EMBED_DIM, TEXT, tiny_clip
from tests.helpers.token_rows import truncated

TOKENIZER = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])


def _explainer() -> legrad.LeGrad:
    return legrad.LeGrad(tiny_clip(vocab_size=49408), tokenizer=TOKENIZER)


def test_texts_become_the_models_own_unit_rows_in_order():
    explainer = _explainer()
    texts = [f"a photo of {i} dogs" for i in range(3 * CPU_BATCH_SIZE + 3)]
    expected = explainer.model.encode_text(TOKENIZER(texts), normalize=True)
    received = explainer.embed_text(texts)
    torch.testing.assert_close(received, expected.detach())
    assert not received.requires_grad


def test_no_texts_give_no_rows():
    assert _explainer().embed_text([]).shape == (0, EMBED_DIM)


def test_rows_of_a_half_precision_model_have_unit_length_in_float32():
    explainer = legrad.LeGrad(tiny_clip(vocab_size=49408).to(torch.bfloat16), tokenizer=TOKENIZER)
    rows = explainer.embed_text(["a dog", "a cat"])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2))


def test_without_a_tokenizer_texts_are_refused_with_the_way_out():
    with pytest.raises(legrad.TokenizerError, match=r"open_clip\.get_tokenizer"):
        legrad.LeGrad(tiny_clip()).embed_text(["a dog"])


def test_dropout_that_would_make_embeddings_random_is_refused_and_named():
    explainer = _explainer()
    explainer.model.transformer.resblocks[0].mlp.add_module("drop", nn.Dropout(0.1).eval())
    assert explainer.embed_text(["a dog"]).shape == (1, EMBED_DIM)
    explainer.model.train()
    with pytest.raises(legrad.InputError, match=r"transformer.resblocks.0.mlp.drop .* call model.eval\(\)"):
        explainer.embed_text(["a dog"])


def test_only_texts_beyond_the_context_count_as_truncated():
    # 14 words and two marks fill the context of 16.
    assert truncated(TOKENIZER, ["dog " * 14, "dog " * 15, "", "a dog"]) == [False, True, False, False]


def test_autocast_does_not_act():
    explainer = _explainer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        received = explainer.embed_text(["a dog", "a cat"])
    assert torch.equal(received, explainer.embed_text(["a dog", "a cat"]))


def test_one_text_in_place_of_a_list_is_not_read_letter_by_letter():
    with pytest.raises(legrad.InputError, match="expected a list of texts, received the text 'a dog'"):
        _explainer().embed_text("a dog")
