"""Which texts of a batch count as one, and which get a map for which image."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import SimpleTokenizer
from torch.nn import functional as F

from legrad.text_cache import EmbeddedTexts
from legrad.tokens import RowTokenizer
from pipeline.annotate.caption_tokens import caption_tokens
from pipeline.annotate.texts import (
    BatchTextEmbedder,
    BatchTexts,
    choose_maps,
    equal_rows,
    equal_within,
    first_of_equal,
    some_may_be_equal,
)
from pipeline.prompts.sample_prompts import Companions, Prompt

TEXTS = 9
COSINE = st.sampled_from([-0.5, 0.0, 0.25, 0.5])


@st.composite
def batches(draw):
    """Images with prompts among the texts, backgrounds, perhaps a neutral text, and few distinct cosines."""
    rows = st.lists(st.integers(0, TEXTS - 1), min_size=1, max_size=6)
    prompt_rows = draw(st.lists(rows, min_size=1, max_size=4))
    background_rows = [
        draw(st.lists(st.integers(0, TEXTS - 1), unique=True, max_size=5)) for _ in prompt_rows
    ]
    neutral_row = draw(st.lists(st.integers(0, TEXTS - 1), max_size=1))
    cosines = [draw(st.lists(COSINE, min_size=TEXTS, max_size=TEXTS)) for _ in prompt_rows]
    return cosines, prompt_rows, background_rows, neutral_row


def best(rows, cosines, limit):
    """Positions of the most similar, of equal ones the first, in their order."""
    ranked = sorted(range(len(rows)), key=lambda position: (-cosines[rows[position]], position))
    return sorted(ranked[:limit])


def as_rows(lists):
    return tuple(np.array(rows, np.int64) for rows in lists)


@settings(max_examples=40)
@given(batches(), st.integers(1, 4), st.integers(1, 3))
def test_the_most_similar_prompts_and_backgrounds_of_each_image_are_chosen(
    batch, max_prompts, max_background
):
    cosines, map_rows, background_rows, neutral_row = batch
    texts = BatchTexts(
        torch.zeros(TEXTS, 1),
        (False,) * TEXTS,
        as_rows(map_rows),
        as_rows(map_rows),
        as_rows(background_rows),
        np.array(neutral_row, np.int64),
    )
    chosen = choose_maps(np.array(cosines), texts, max_prompts, max_background)
    assert len(chosen) == len(map_rows)
    for maps, own, rows, others in zip(chosen, cosines, map_rows, background_rows, strict=True):
        kept = best(rows, own, max_prompts)
        backgrounds = [others[position] for position in best(others, own, max_background)]
        assert maps.prompts.tolist() == kept
        assert maps.backgrounds == len(backgrounds)
        # prompts of one row share a map
        assert maps.text_rows[maps.map_of_prompt].tolist() == [rows[position] for position in kept]
        assert maps.prompt_maps == len({rows[position] for position in kept})
        assert maps.text_rows[maps.prompt_maps :].tolist() == backgrounds + neutral_row


class Embedder:
    """Embeds each text as the row that a table gives it, moved by noise that differs from call to call."""

    def __init__(self, table, noise=0.0):
        self._table, self._noise, self._calls = table, noise, 0

    def embed_ensembles(self, ensembles, tokens=()):
        self._calls += 1
        generator = torch.Generator().manual_seed(self._calls)
        rows = F.normalize(torch.stack([self._table[text] for (text,) in ensembles]), dim=1)
        moved = rows + self._noise * F.normalize(torch.randn(rows.shape, generator=generator), dim=1)
        return EmbeddedTexts(
            F.normalize(moved, dim=1).float(), tuple(text.endswith("...") for (text,) in ensembles)
        )


def directions(**texts):
    """Rows by text: texts of one number are of one direction."""
    rows = F.normalize(torch.randn(30, 24, generator=torch.Generator().manual_seed(1)).double(), dim=1)
    return {text: rows[number] for text, number in texts.items()}


TABLE = directions(sky=0, clouds=0, grass=1, wall=2, lawn=1, dog=3, puppy=3, hound=3, cat=4, neutral=5)
ROUNDING = {torch.float32: 1.3e-6, torch.float64: 1e-15, torch.float16: 1.8e-3, torch.bfloat16: 1.3e-2}


def prompts(*texts):
    return tuple(Prompt(index, text) for index, text in enumerate(texts))


def embedded(embedder, *samples, background=(), neutral=None, precision=torch.float32):
    companions = Companions(tuple((text,) for text in background), 4, neutral)
    texts = BatchTextEmbedder(embedder, companions, equal_within(precision))
    batch = texts.embed(samples)
    return texts.resolve(batch, torch.zeros(len(samples), len(batch.ensembles)))[0]


def named(rows, texts, table):
    """The texts that rows are nearest to."""
    names, known = list(table), torch.stack(list(table.values()))
    return [names[int((known @ texts.unit_rows[row].double()).argmax())] for row in rows]


@pytest.mark.parametrize("precision", ROUNDING)
def test_of_texts_equal_but_for_rounding_the_first_stands_for_all(precision):
    embedder = Embedder(TABLE, ROUNDING[precision])
    texts = embedded(
        embedder,
        prompts("puppy", "cat", "dog", "hound"),
        prompts("hound", "dog"),
        prompts("lawn", "cat"),
        background=("clouds", "grass", "sky", "wall", "lawn"),
        precision=precision,
    )
    own = [rows.tolist() for rows in texts.prompt_rows]
    puppy, cat, _, hound = own[0]
    # the first of the sample's own list, whatever else is in the batch
    assert texts.map_rows[0].tolist() == [puppy, cat, puppy, puppy]
    assert texts.map_rows[1].tolist() == [hound, hound]
    assert texts.map_rows[2].tolist() == own[2]
    # a background that is a prompt of the image is none
    counts = [len(rows) for rows in texts.background_rows]
    assert counts == [3, 3, 2]
    assert set(texts.background_rows[0]) - set(texts.background_rows[2]) == {texts.background_rows[0][1]}


def test_texts_that_differ_stay_apart_at_each_precision():
    # trained towers hold texts that mean something else at a distance of .1 or more
    near = F.normalize(TABLE["dog"] + 0.1 * F.normalize(TABLE["cat"] - TABLE["dog"], dim=0), dim=0)
    embedder = Embedder({"dog": TABLE["dog"], "spaniel": near})
    for precision in ROUNDING:
        texts = embedded(embedder, prompts("dog", "spaniel"), precision=precision)
        assert len(set(texts.map_rows[0].tolist())) == 2


def test_what_the_tokenizer_cut_is_reported_of_each_text_and_not_of_its_equal():
    embedder = Embedder({"dog": TABLE["dog"], "dog...": TABLE["dog"]})
    texts = embedded(embedder, prompts("dog", "dog..."))
    assert [texts.truncated[row] for row in texts.prompt_rows[0]] == [False, True]
    assert texts.map_rows[0][0] == texts.map_rows[0][1]


def test_the_choice_among_equal_texts_is_the_same_in_every_company():
    samples = [prompts("cat", "dog"), prompts("hound", "puppy", "wall"), prompts("dog", "sky")]
    background = ("wall", "sky", "clouds", "grass")
    alone = [embedded(Embedder(TABLE, 1e-6), one, background=background) for one in samples]
    together = embedded(Embedder(TABLE, 1e-6), *samples, background=background)
    # background texts are identified by their direction alone
    unlike = {text: row for text, row in TABLE.items() if text in ("sky", "grass", "wall")}
    for number, one in enumerate(alone):
        first_rows = one.prompt_rows[0].tolist(), together.prompt_rows[number].tolist()
        first_maps = one.map_rows[0].tolist(), together.map_rows[number].tolist()
        places = [
            [rows.index(row) for row in maps] for rows, maps in zip(first_rows, first_maps, strict=True)
        ]
        assert places[0] == places[1]
        assert named(one.background_rows[0], one, unlike) == named(
            together.background_rows[number], together, unlike
        )


@settings(max_examples=30)
@given(st.sampled_from(list(ROUNDING)), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_rows_that_are_equal_are_never_overlooked(precision, count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(count, 24, generator=generator), dim=1)
    assert not some_may_be_equal(rows, equal_within(torch.float32)) or equal_rows(rows, 0.1)
    noise = F.normalize(torch.randn(2, 24, generator=generator), dim=1) * ROUNDING[precision]
    rows[[0, count - 1]] = F.normalize(rows[:1].double() + noise, dim=1).float()
    within = equal_within(precision)
    assert equal_rows(rows, within)[0] == {count - 1}
    assert some_may_be_equal(rows, within)
    # as a GPU may compute it, with factors of 10 bits
    coarse = (rows.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert some_may_be_equal(coarse, within)


@pytest.mark.parametrize("most_rows_tried", [1, 4096])
@pytest.mark.parametrize("texts", [("dog", "cat", "wall"), ("dog", "puppy", "wall")])
def test_similarities_come_to_the_cpu_as_they_are(texts, most_rows_tried, monkeypatch):
    monkeypatch.setattr("pipeline.annotate.texts.MOST_ROWS_TRIED", most_rows_tried)
    embedder = BatchTextEmbedder(Embedder(TABLE, 1e-6), Companions(), equal_within(torch.float32))
    for number in range(2):  # the second time, the same texts
        similarities = torch.randn(2, 3, generator=torch.Generator().manual_seed(number))
        batch = embedder.embed([prompts(*texts), prompts("dog")])
        resolved, on_cpu = embedder.resolve(batch, similarities)
        assert np.array_equal(on_cpu, similarities.numpy())
        assert len(set(resolved.map_rows[0].tolist())) == (2 if "puppy" in texts else 3)


def test_captions_are_tokenised_and_classes_are_not():
    tokenizer = RowTokenizer(SimpleTokenizer())
    captions = (Prompt(0, "a dog"), Prompt(1, "cat", texts=("a cat", "the cat")), Prompt(2, "a dog"))
    classes = (Prompt(0, "dog", 1, ("a dog", "the dog")), Prompt(1, "cat", 2))
    made = caption_tokens(captions, tokenizer)
    assert made == tokenizer(["a dog", "a cat", "the cat"])
    assert pickle.loads(pickle.dumps(made)) == made
    assert caption_tokens(classes, tokenizer) == caption_tokens(captions, None) == {}


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=600), st.randoms(use_true_random=False))
def test_equal_rows_are_found_among_any_number_and_the_first_of_a_list_stands_for_them(kinds, random):
    rows = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).double(), dim=1)
    noise = 1e-6 * torch.randn(len(kinds), 8, generator=torch.Generator().manual_seed(3))
    equal = equal_rows((rows[kinds] + noise).float(), 1e-4)
    for row in range(len(kinds)):
        same = {other for other, kind in enumerate(kinds) if kind == kinds[row]} - {row}
        assert equal.get(row, frozenset()) == same
    listed = random.sample(range(len(kinds)), min(len(kinds), 9))
    first_of_kind = {kinds[row]: row for row in reversed(listed)}
    expected = [first_of_kind[kinds[row]] for row in listed]
    assert first_of_equal(np.array(listed, np.int64), equal).tolist() == expected
