"""Embedding texts with a cache."""

import functools
import threading
from collections import Counter

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import legrad
from legrad import text_cache as text_embedder
from legrad.text_cache import TextEmbedder
from legrad.tokens import RowTokenizer
from tests.helpers.tiny_models import EMBED_DIM, TEXT, tiny_clip

TOKENIZER = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])


class CountingTokenizer:
    """Remembers every text that it was asked to tokenise."""

    def __init__(self):
        self.context_length = TOKENIZER.context_length
        self.encode = TOKENIZER.encode
        self.seen = []

    def __call__(self, texts):
        self.seen += texts
        return TOKENIZER(texts)


def _explainer() -> legrad.LeGrad:
    return legrad.LeGrad(tiny_clip(vocab_size=49408), tokenizer=CountingTokenizer())


EXPLAINER = _explainer()
TEXTS = ["a dog", "dog " * 15, "", "a cat on a mat", "dog " * 14]


@functools.cache
def _row(text):
    """One text alone, by the model itself, untouched by batches and caches."""
    return EXPLAINER.model.encode_text(TOKENIZER([text]), normalize=True).detach()


def _expected(texts):
    return torch.cat([_row(text) for text in texts])


def test_rows_and_flags_are_those_of_each_text_alone_in_order():
    received = TextEmbedder(EXPLAINER).embed(TEXTS)
    torch.testing.assert_close(received.unit_rows, _expected(TEXTS))
    assert received.truncated == (False, True, False, False, False)


def test_a_text_that_comes_again_is_tokenised_and_embedded_once():
    explainer = _explainer()
    embedder = TextEmbedder(explainer)
    first = embedder.embed(["a dog", "dog " * 15, "a dog"])
    again = embedder.embed(["a cat", "dog " * 15, "a dog"])
    assert explainer.tokenizer.seen == ["a dog", "dog " * 15, "a cat"]
    torch.testing.assert_close(first.unit_rows[0], first.unit_rows[2], rtol=0, atol=0)
    torch.testing.assert_close(again.unit_rows[1:], first.unit_rows[[1, 0]], rtol=0, atol=0)
    assert again.truncated == (False, True, False)


def test_tokens_that_come_with_the_texts_are_used_and_the_others_are_made():
    explainer = _explainer()
    tokens = RowTokenizer(TOKENIZER)(TEXTS[:2])
    received = TextEmbedder(explainer).embed(TEXTS, tokens)
    assert explainer.tokenizer.seen == TEXTS[2:]
    torch.testing.assert_close(received.unit_rows, _expected(TEXTS))
    assert received.truncated == (False, True, False, False, False)


class CountedOperations(TorchDispatchMode):
    """Counts the operations that a device would run, and those that would wait for it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _operations(embedder, texts, tokens):
    with CountedOperations() as counted:
        embedder.embed(texts, tokens)
    return counted.counts


def test_many_texts_are_stored_by_one_write_and_read_by_one_read():
    embedder = TextEmbedder(EXPLAINER, batch_size=64)
    few, many = [f"a dog {number}" for number in range(3)], [f"a cat {number}" for number in range(64)]
    tokens = RowTokenizer(TOKENIZER)([*few, *many])
    embedder.embed(["a first text, which the text tower is checked with"])
    by_batch = [_operations(embedder, texts, tokens) for texts in (few, many)]
    assert by_batch[0] == by_batch[1]
    assert by_batch[1]["index_copy_"] == by_batch[1]["index_select"] == 1
    again = _operations(embedder, [*many, *few, "a dog 1"], tokens)
    assert again["index_copy_"] == 0 and again["index_select"] == 1
    assert again.total() <= 5


def test_the_mask_of_the_text_tower_is_read_again_only_where_it_has_changed():
    explainer = _explainer()
    embedder = TextEmbedder(explainer)
    counts = []
    for number in range(5):
        if number == 2:
            explainer.model.attn_mask.add_(0)  # changed in place, as far as can be known
        if number == 4:
            explainer.model.attn_mask = explainer.model.attn_mask.clone()
        counts.append(_operations(embedder, [f"a dog {number}"], {})["isneginf"])
    assert counts == [1, 0, 1, 0, 1]


def test_a_mask_that_stops_being_causal_is_noticed():
    explainer = _explainer()
    embedder = TextEmbedder(explainer)
    embedder.embed(["a dog"])
    explainer.model.attn_mask.zero_()
    expected = explainer.model.encode_text(TOKENIZER(["a cat"]), normalize=True).detach()
    torch.testing.assert_close(embedder.embed(["a cat"]).unit_rows, expected)


def test_rows_stay_what_they_are_while_the_store_grows(monkeypatch):
    monkeypatch.setattr(text_embedder, "FEWEST_ROWS", 2)
    embedder = TextEmbedder(EXPLAINER)
    for number in range(1, 6):
        received = embedder.embed(TEXTS[:number])
        torch.testing.assert_close(received.unit_rows, _expected(TEXTS[:number]))
    # what was returned is a copy
    torch.testing.assert_close(embedder.embed(TEXTS[::-1]).unit_rows, _expected(TEXTS[::-1]))


@pytest.mark.parametrize("failing", ["embed_by_length", "uploaded"])
def test_a_batch_that_the_device_has_no_memory_for_leaves_no_trace(failing, monkeypatch):
    monkeypatch.setattr(text_embedder, "TEXTS_AT_ONCE", 2)
    embedder = TextEmbedder(EXPLAINER)
    embedder.embed(TEXTS[:1])
    used, calls = embedder.cached_bytes, []
    function = getattr(text_embedder, failing)

    def fails_at_second(*args):
        calls.append(args)
        if len(calls) == (2 if failing == "embed_by_length" else 1):
            raise torch.OutOfMemoryError
        return function(*args)

    with monkeypatch.context() as patched:
        patched.setattr(text_embedder, failing, fails_at_second)
        with pytest.raises(torch.OutOfMemoryError):
            embedder.embed(TEXTS)
    assert embedder.cached_bytes == used
    torch.testing.assert_close(embedder.embed(TEXTS).unit_rows, _expected(TEXTS))


def test_what_was_used_last_is_kept_when_the_memory_is_full():
    explainer = _explainer()
    one_text = TextEmbedder(explainer)
    one_text.embed(["a dog"])
    embedder = TextEmbedder(explainer, max_cache_bytes=2 * one_text.cached_bytes)
    for text in ("a dog", "a cat", "a dog", "a cow"):
        embedder.embed([text])
    explainer.tokenizer.seen.clear()
    embedder.embed(["a dog", "a cow"])
    assert explainer.tokenizer.seen == []
    embedder.embed(["a cat"])
    assert explainer.tokenizer.seen == ["a cat"]


@settings(max_examples=30, deadline=None)
@given(
    batches=st.lists(st.lists(st.sampled_from(TEXTS), max_size=6), max_size=4),
    max_cache_bytes=st.integers(0, 5000),
    batch_size=st.integers(1, 4),
)
def test_neither_a_full_memory_nor_the_batches_change_what_comes_out(batches, max_cache_bytes, batch_size):
    embedder = TextEmbedder(EXPLAINER, max_cache_bytes=max_cache_bytes, batch_size=batch_size)
    for texts in batches:
        received = embedder.embed(texts)
        assert received.unit_rows.shape == (len(texts), EMBED_DIM)
        if texts:
            torch.testing.assert_close(received.unit_rows, _expected(texts))
        assert received.truncated == tuple(text == TEXTS[1] for text in texts)
        assert embedder.cached_bytes <= max_cache_bytes


def test_long_texts_count_towards_the_memory():
    embedder = TextEmbedder(EXPLAINER)
    embedder.embed(["dog " * 100_000])
    assert embedder.cached_bytes > 400_000


def test_threads_that_share_an_embedder_get_their_own_rows():
    embedder = TextEmbedder(EXPLAINER, max_cache_bytes=3000, batch_size=2)
    received = {}
    orders = [TEXTS, TEXTS[::-1], TEXTS[2:], TEXTS[:3]]
    threads = [
        threading.Thread(target=lambda i=i, texts=texts: received.update({i: embedder.embed(texts * 5)}))
        for i, texts in enumerate(orders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, texts in enumerate(orders):
        torch.testing.assert_close(received[i].unit_rows, _expected(texts * 5))


def test_a_failed_batch_leaves_the_embedder_as_it_was():
    explainer = _explainer()
    embedder = TextEmbedder(explainer)
    explainer.model.transformer.resblocks[0].add_module("drop", torch.nn.Dropout(0.1))
    explainer.model.train()
    with pytest.raises(legrad.InputError, match="drops activations"):
        embedder.embed(["a dog"])
    explainer.model.eval()
    assert embedder.cached_bytes == 0
    torch.testing.assert_close(embedder.embed(["a dog"]).unit_rows, _expected(["a dog"]))


def test_callers_in_and_out_of_inference_mode_share_an_embedder():
    embedder = TextEmbedder(EXPLAINER)
    with torch.inference_mode():
        embedder.embed(TEXTS[:1])
    torch.testing.assert_close(embedder.embed(TEXTS).unit_rows, _expected(TEXTS))


def test_an_explainer_without_a_tokenizer_is_refused_at_once():
    with pytest.raises(legrad.TokenizerError, match=r"open_clip\.get_tokenizer"):
        TextEmbedder(legrad.LeGrad(tiny_clip()))


TEMPLATES = ["{}", "a photo of a {}.", "a drawing of the {}."]


def test_an_ensemble_is_the_row_of_open_clips_zero_shot_classifier():
    names = ["dog", "cat on a mat", "cow"]
    ensembles = [tuple(template.format(name) for template in TEMPLATES) for name in names]
    received = TextEmbedder(EXPLAINER).embed_ensembles(ensembles)
    expected = open_clip.build_zero_shot_classifier(EXPLAINER.model, TOKENIZER, names, TEMPLATES).T
    torch.testing.assert_close(received.unit_rows, expected)
    assert received.truncated == (False, False, False)


def test_an_ensemble_is_cut_where_one_of_its_texts_is():
    received = TextEmbedder(EXPLAINER).embed_ensembles([("a dog", TEXTS[1]), ("a dog",)])
    assert received.truncated == (True, False)


def test_a_text_alone_has_the_same_row_beside_ensembles_to_the_last_bit():
    alone = TextEmbedder(EXPLAINER, batch_size=1).embed(["a dog"]).unit_rows
    mixed = TextEmbedder(EXPLAINER, batch_size=1).embed_ensembles([("a dog", "a cat"), ("a dog",)]).unit_rows
    torch.testing.assert_close(mixed[1:], alone, rtol=0, atol=0)


def test_many_ensembles_are_embedded_in_parts_and_once(monkeypatch):
    monkeypatch.setattr(text_embedder, "TEXTS_AT_ONCE", 4)
    explainer = _explainer()
    embedder = TextEmbedder(explainer)
    ensembles = [tuple(f"{template} {number}" for template in "abc"[: 1 + number % 3]) for number in range(7)]
    rows = embedder.embed_ensembles(ensembles).unit_rows
    assert len(explainer.tokenizer.seen) == sum(map(len, ensembles))
    for ensemble, row in zip(ensembles, rows, strict=True):
        mean = _expected(ensemble).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm())
    embedder.embed_ensembles(ensembles[::-1])
    assert len(explainer.tokenizer.seen) == sum(map(len, ensembles))
