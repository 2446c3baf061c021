"""Which texts of a batch get a map for which image."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.prompts.batch_texts import BatchTexts, choose_maps

TEXTS = 9


@st.composite
def batches(draw):
    """Images with prompts among the texts, backgrounds perhaps a neutral text, and few distinct cosines."""
    rows = st.lists(st.integers(0, TEXTS - 1), min_size=1, max_size=6)
    prompt_rows = draw(st.lists(rows, min_size=1, max_size=4))
    background_rows = draw(st.lists(st.integers(0, TEXTS - 1), unique=True, max_size=5))
    neutral_row = draw(st.lists(st.integers(0, TEXTS - 1), max_size=1))
    cosine = st.sampled_from([-0.5, 0.0, 0.25, 0.5])
    cosines = [draw(st.lists(cosine, min_size=TEXTS, max_size=TEXTS)) for _ in prompt_rows]
    return cosines, prompt_rows, background_rows, neutral_row


def best(rows, cosines, limit):
    """Positions of the most similar, of equal ones the first, in their order."""
    ranked = sorted(range(len(rows)), key=lambda position: (-cosines[rows[position]], position))
    return sorted(ranked[:limit])


@settings(max_examples=40)
@given(batches(), st.integers(1, 4), st.integers(1, 3))
def test_the_most_similar_prompts_and_backgrounds_of_each_image_are_chosen(
    batch, max_prompts, max_background
):
    cosines, prompt_rows, background_rows, neutral_row = batch
    texts = BatchTexts(
        torch.zeros(TEXTS, 1),
        (False,) * TEXTS,
        tuple(np.array(rows, np.int64) for rows in prompt_rows),
        np.array(background_rows, np.int64),
        np.array(neutral_row, np.int64),
    )
    chosen = choose_maps(np.array(cosines), texts, max_prompts, max_background)
    assert len(chosen) == len(prompt_rows)
    for maps, own, rows in zip(chosen, cosines, prompt_rows, strict=True):
        kept = best(rows, own, max_prompts)
        others = [row for row in background_rows if row not in rows]
        backgrounds = [others[position] for position in best(others, own, max_background)]
        assert maps.prompts.tolist() == kept
        assert maps.backgrounds == len(backgrounds)
        assert maps.text_rows.tolist() == [rows[position] for position in kept] + backgrounds + neutral_row
