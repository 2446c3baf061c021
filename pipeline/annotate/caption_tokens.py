"""Tokens of a sample's captions, made while the sample is prepared; nothing here needs the model."""

from __future__ import annotations

from collections.abc import Sequence

from legrad.tokens import RowTokenizer, TokenRow
from pipeline.prompts.sample_prompts import Prompt


def caption_tokens(prompts: Sequence[Prompt], tokenizer: RowTokenizer | None) -> dict[str, TokenRow]:
    """Return the tokens of each distinct text of a sample's captions.

    Args:
        prompts: of the sample. Classes are skipped: they recur, and are tokenised once beside the model.
        tokenizer: from `picklable_tokenizer`; None: tokens are made beside the model, none here.
    """
    if tokenizer is None:
        return {}
    return tokenizer(text for prompt in prompts if prompt.class_id is None for text in prompt.ensemble)
