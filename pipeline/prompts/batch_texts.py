"""The texts of a batch, embedded once each, and which of them get a map for which image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from legrad.text_embedder import TextEmbedder
from pipeline.prompts.sample_prompts import Companions, Ensemble, Prompt


@dataclass(frozen=True)
class BatchTexts:
    """The distinct texts of a batch, and where each sample's own are among them.

    Attributes:
        unit_rows: one row a text, [texts, embed_dim], on the model's device.
        truncated: for each text, whether the tokenizer cut it.
        prompt_rows: for each sample, the row of each prompt, int64 [prompts].
        background_rows: rows of the background texts, int64 [backgrounds].
        neutral_row: row of the neutral text, int64 [0 or 1].
    """

    unit_rows: torch.Tensor
    truncated: tuple[bool, ...]
    prompt_rows: tuple[np.ndarray, ...]
    background_rows: np.ndarray
    neutral_row: np.ndarray


@dataclass(frozen=True)
class ImageMaps:
    """Which maps an image gets, in this order: prompts, backgrounds, the neutral text.

    Attributes:
        prompts: positions among the sample's prompts, ascending.
        text_rows: row of each map's text.
        backgrounds: how many of the maps are those of backgrounds.
    """

    prompts: np.ndarray
    text_rows: np.ndarray
    backgrounds: int


def embed_batch(
    embedder: TextEmbedder, prompts_of_samples: Sequence[tuple[Prompt, ...]], companions: Companions
) -> BatchTexts:
    """Embed the texts of a batch, each once."""
    row_of: dict[Ensemble, int] = {}

    def rows(ensembles: Sequence[Ensemble]) -> np.ndarray:
        return np.array([row_of.setdefault(ensemble, len(row_of)) for ensemble in ensembles], np.int64)

    # samples that get all classes share one tuple
    distinct = {id(prompts): prompts for prompts in prompts_of_samples}
    rows_of = {key: rows([prompt.ensemble for prompt in prompts]) for key, prompts in distinct.items()}
    background_rows = rows(companions.background)
    neutral_row = rows([] if companions.neutral is None else [(companions.neutral,)])
    embedded = embedder.embed_ensembles(list(row_of))
    return BatchTexts(
        embedded.unit_rows,
        embedded.truncated,
        tuple(rows_of[id(prompts)] for prompts in prompts_of_samples),
        background_rows,
        neutral_row,
    )


def choose_maps(
    similarities: np.ndarray, texts: BatchTexts, max_prompts: int, max_background: int
) -> list[ImageMaps]:
    """Choose the prompts and the backgrounds that are most similar to each image.

    A background that is one of the image's own prompts is none.

    Args:
        similarities: cosines, [images, texts].
        texts: of the batch.
        max_prompts: prompts of an image, at most.
        max_background: backgrounds of an image, at most.
    """
    chosen = []
    for cosines, prompt_rows in zip(similarities, texts.prompt_rows, strict=True):
        prompts = _most_similar(cosines[prompt_rows], max_prompts)
        others = texts.background_rows[~np.isin(texts.background_rows, prompt_rows)]
        backgrounds = others[_most_similar(cosines[others], max_background)]
        rows = np.concatenate([prompt_rows[prompts], backgrounds, texts.neutral_row])
        chosen.append(ImageMaps(prompts, rows, len(backgrounds)))
    return chosen


def _most_similar(cosines: np.ndarray, limit: int) -> np.ndarray:
    """Positions of the greatest, at most `limit`, in ascending order; of equal ones the first."""
    return np.sort(np.argsort(-cosines, kind="stable")[:limit])
