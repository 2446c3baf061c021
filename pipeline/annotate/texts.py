"""The texts of a batch, each embedded once, and which of them get a map for which image.

Texts whose embeddings are equal but for rounding count as one wherever texts are chosen: as the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from legrad.text_cache import NO_TOKENS, TextEmbedder
from legrad.tokens import TokenRow
from pipeline.annotate.sample_states import ContextText
from pipeline.prompts.sample_prompts import Companions, Ensemble, Prompt

# Distance of two unit rows up to which they are equal. A text's neighbours in its batch, and another
# processor, move its row by up to 1.3e-6 in float32, 1.8e-3 in float16 and 1.3e-2 in bfloat16; texts that a
# trained tower distinguishes lie hundreds of times as far from each other in float32, ten times in bfloat16.
EQUAL_WITHIN = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
EQUAL_WITHIN_FLOAT32 = 1e-4
ROWS_AT_ONCE = 256
# Up to this number of texts, a product in the precision of the rows shows whether any two may be equal.
MOST_ROWS_TRIED = 4096
# Error of such a product of two unit rows, at most: that of TF32, in which a GPU may compute it.
PRODUCT_ERROR = 2e-3

# what the text of a map is
PROMPT, BACKGROUND, NEUTRAL = range(3)

# row of a text: the rows of the others that are equal to it
EqualRows = Mapping[int, frozenset[int]]


@dataclass(frozen=True)
class EmbeddedBatch:
    """The distinct texts of a batch, embedded; nothing has waited for the device.

    Attributes:
        ensembles: the texts.
        unit_rows: one row for each, [texts, embed_dim], on the model's device.
        truncated: for each, whether the tokenizer cut it.
        prompt_rows: for each sample, the row of each prompt; samples with the same prompts share one array.
        own_texts: number of texts that are prompts; they come first.
        background: rows of the background texts.
        neutral_row: row of the neutral text, int64 [0 or 1].
    """

    ensembles: list[Ensemble]
    unit_rows: torch.Tensor
    truncated: tuple[bool, ...]
    prompt_rows: tuple[np.ndarray, ...]
    own_texts: int
    background: np.ndarray
    neutral_row: np.ndarray


@dataclass(frozen=True)
class BatchTexts:
    """The distinct texts of a batch, and where each sample's own are among them.

    Attributes:
        unit_rows: one row a text, [texts, embed_dim], on the model's device.
        truncated: for each text, whether the tokenizer cut it.
        prompt_rows: for each sample, the row of each prompt, int64 [prompts].
        map_rows: for each sample, the row that each prompt's score and map are made from, int64 [prompts]:
            that of the first prompt whose embedding is equal but for rounding, mostly the prompt's own.
        background_rows: for each sample, rows of the background texts that are equal to none of its prompts
            and to none of each other, int64 [backgrounds].
        neutral_row: row of the neutral text, int64 [0 or 1].
    """

    unit_rows: torch.Tensor
    truncated: tuple[bool, ...]
    prompt_rows: tuple[np.ndarray, ...]
    map_rows: tuple[np.ndarray, ...]
    background_rows: tuple[np.ndarray, ...]
    neutral_row: np.ndarray


@dataclass(frozen=True)
class ImageMaps:
    """Which maps an image gets, in this order: prompts, backgrounds, the neutral text.

    Attributes:
        prompts: positions among the sample's prompts, ascending.
        map_of_prompt: for each of these prompts, which map is its own; equal prompts share one.
        text_rows: row of each map's text.
        backgrounds: how many of the maps are those of backgrounds.
    """

    prompts: np.ndarray
    map_of_prompt: np.ndarray
    text_rows: np.ndarray
    backgrounds: int

    @property
    def prompt_maps(self) -> int:
        """Number of maps that belong to prompts."""
        return len(set(self.map_of_prompt.tolist()))

    @property
    def context_rows(self) -> list[int]:
        """Row of each text beside the prompts: backgrounds, then the neutral text."""
        rows: list[int] = self.text_rows[self.prompt_maps :].tolist()
        return rows


class BatchTextEmbedder:
    """Embeds the texts of batches, and finds which of them count as one.

    Args:
        embedder: of single texts.
        companions: texts that are explained for every sample beside its own prompts. Of background texts that
            are equal but for rounding the first in the list is used; that is decided here, once.
        within: distance up to which unit rows are equal.
    """

    def __init__(self, embedder: TextEmbedder, companions: Companions, within: float) -> None:
        self._embedder = embedder
        self._within = within
        self._neutral: list[Ensemble] = [] if companions.neutral is None else [(companions.neutral,)]
        self._background = self._distinct(companions.background)
        # a job of classes brings the same texts with every batch
        self._last: tuple[list[Ensemble], EqualRows] = ([], {})

    def embed(
        self,
        prompts_of_samples: Sequence[tuple[Prompt, ...]],
        tokens: Mapping[str, TokenRow] = NO_TOKENS,
    ) -> EmbeddedBatch:
        """Embed the texts of a batch, each once, without waiting for the device.

        Args:
            prompts_of_samples: prompts of each sample.
            tokens: tokens of some of their texts; the others are tokenised here.
        """
        row_of: dict[Ensemble, int] = {}

        def rows(ensembles: Sequence[Ensemble]) -> np.ndarray:
            return np.array([row_of.setdefault(ensemble, len(row_of)) for ensemble in ensembles], np.int64)

        # samples that get all classes share one tuple
        distinct = {id(prompts): prompts for prompts in prompts_of_samples}
        rows_of = {key: rows([prompt.ensemble for prompt in prompts]) for key, prompts in distinct.items()}
        own_texts = len(row_of)
        background, neutral_row = rows(self._background), rows(self._neutral)
        embedded = self._embedder.embed_ensembles(list(row_of), tokens)
        return EmbeddedBatch(
            list(row_of),
            embedded.unit_rows,
            embedded.truncated,
            tuple(rows_of[id(prompts)] for prompts in prompts_of_samples),
            own_texts,
            background,
            neutral_row,
        )

    def resolve(self, batch: EmbeddedBatch, similarities: torch.Tensor) -> tuple[BatchTexts, np.ndarray]:
        """Bring similarities to the CPU, and find which texts count as one: mostly none, in the same copy.

        Args:
            batch: as embedded.
            similarities: of images and texts, float [images, texts], on the device.
        """
        ensembles, equal = self._last
        if batch.ensembles == ensembles:
            return _texts_of(batch, equal), similarities.cpu().numpy()
        values = similarities.flatten()
        is_tried = len(batch.ensembles) <= MOST_ROWS_TRIED
        if is_tried:
            values = torch.cat([values, some_may_be_equal(batch.unit_rows, self._within)[None]])
        on_cpu = values.cpu().numpy()
        may_be_equal = not is_tried or on_cpu[-1]
        equal = equal_rows(batch.unit_rows, self._within) if may_be_equal else {}
        self._last = (batch.ensembles, equal)
        return _texts_of(batch, equal), on_cpu[: similarities.numel()].reshape(similarities.shape)

    def _distinct(self, ensembles: Sequence[Ensemble]) -> list[Ensemble]:
        if not ensembles:
            return []
        equal = equal_rows(self._embedder.embed_ensembles(ensembles).unit_rows, self._within)
        firsts = first_of_equal(np.arange(len(ensembles)), equal).tolist()
        return [ensembles[row] for row in dict.fromkeys(firsts)]


def kinds_of_maps(chosen: Sequence[ImageMaps]) -> np.ndarray:
    """Return what the text of each map of a batch is: PROMPT, BACKGROUND or NEUTRAL, int64 [maps]."""
    counts = [
        (prompts, maps.backgrounds, len(maps.text_rows) - prompts - maps.backgrounds)
        for maps in chosen
        for prompts in [maps.prompt_maps]
    ]
    return np.repeat(np.tile([PROMPT, BACKGROUND, NEUTRAL], len(chosen)), np.concatenate(counts))


def images_of_maps(chosen: Sequence[ImageMaps]) -> torch.Tensor:
    """Return the row of the image of each map of a batch, int64 [maps], on the CPU."""
    return torch.from_numpy(np.repeat(np.arange(len(chosen)), [len(maps.text_rows) for maps in chosen]))


def choose_maps(
    similarities: np.ndarray, texts: BatchTexts, max_prompts: int, max_background: int
) -> list[ImageMaps]:
    """Choose the prompts and the backgrounds that are most similar to each image.

    Args:
        similarities: cosines, [images, texts].
        texts: of the batch.
        max_prompts: prompts of an image, at most.
        max_background: backgrounds of an image, at most.
    """
    prompts = _most_similar(similarities, texts.map_rows, max_prompts)
    backgrounds = _most_similar(similarities, texts.background_rows, max_background)
    neutral = texts.neutral_row.tolist()
    chosen = []
    for kept, kept_backgrounds, map_rows, others in zip(
        prompts, backgrounds, texts.map_rows, texts.background_rows, strict=True
    ):
        own = map_rows[kept].tolist()
        map_of_row = {row: number for number, row in enumerate(dict.fromkeys(own))}
        rows = [*map_of_row, *others[kept_backgrounds].tolist(), *neutral]
        map_of_prompt = np.array([map_of_row[row] for row in own], np.int64)
        chosen.append(ImageMaps(kept, map_of_prompt, np.array(rows, np.int64), len(kept_backgrounds)))
    return chosen


def context_texts(
    maps: ImageMaps, cosines: np.ndarray, ensembles: Sequence[Ensemble], companions: Companions
) -> tuple[ContextText, ...]:
    """Return the texts beside an image's prompts that have a map: backgrounds, then the neutral text.

    Args:
        maps: of the image.
        cosines: similarities of the image and all texts of its batch, [texts].
        ensembles: these texts.
        companions: names of background texts.
    """
    return tuple(
        ContextText(
            companions.name_of(ensembles[row]),
            "background" if number < maps.backgrounds else "neutral",
            float(cosines[row]),
        )
        for number, row in enumerate(maps.context_rows)
    )


def _most_similar(
    similarities: np.ndarray, rows_of_images: Sequence[np.ndarray], limit: int
) -> list[np.ndarray]:
    """Return for each image the positions of its most similar texts, ascending; of equal ones the first.

    Args:
        similarities: cosines, [images, texts].
        rows_of_images: rows of the texts to choose from; images that share an array are done at once.
        limit: number of texts of an image, at most.
    """
    everything = [np.arange(length) for length in range(1 + max(map(len, rows_of_images), default=0))]
    kept = [everything[len(rows)] for rows in rows_of_images]
    images_of: dict[int, list[int]] = defaultdict(list)
    for image, rows in enumerate(rows_of_images):
        if len(rows) > limit:
            images_of[id(rows)].append(image)
    for images in images_of.values():
        cosines = similarities[np.ix_(np.array(images), rows_of_images[images[0]])]
        best = np.sort(np.argsort(-cosines, axis=1, kind="stable")[:, :limit], axis=1)
        for image, positions in zip(images, best, strict=True):
            kept[image] = positions
    return kept


# ---------------------------------------------------------------- texts that count as one


def equal_within(precision: torch.dtype) -> float:
    """Return the distance of two unit rows up to which they are equal, for a text tower of a precision."""
    return EQUAL_WITHIN.get(precision, EQUAL_WITHIN_FLOAT32)


def some_may_be_equal(unit_rows: torch.Tensor, within: float) -> torch.Tensor:
    """Return whether any two rows may be equal but for rounding: bool, on the device; never wrongly False."""
    products = unit_rows @ unit_rows.T
    return (products > 1 - within**2 / 2 - PRODUCT_ERROR).triu(diagonal=1).any()


def _texts_of(batch: EmbeddedBatch, equal: EqualRows) -> BatchTexts:
    """Return the texts of a batch, given which are equal."""
    # a background text may also be a prompt of the batch
    is_simple = not equal and (batch.background >= batch.own_texts).all()
    distinct = {} if is_simple else {id(rows): rows for rows in batch.prompt_rows}
    maps_of = {key: first_of_equal(rows, equal) for key, rows in distinct.items()}
    background_of = {key: without_equals(batch.background, rows, equal) for key, rows in distinct.items()}
    return BatchTexts(
        batch.unit_rows,
        batch.truncated,
        batch.prompt_rows,
        tuple(maps_of.get(id(rows), rows) for rows in batch.prompt_rows),
        tuple(background_of.get(id(rows), batch.background) for rows in batch.prompt_rows),
        batch.neutral_row,
    )


def equal_rows(unit_rows: torch.Tensor, within: float) -> EqualRows:
    """Find the rows that are equal but for rounding.

    Args:
        unit_rows: embeddings, [texts, embed_dim].
        within: largest distance of equal rows.

    Returns:
        Nothing for a row that is equal to no other. Whether two rows are equal depends on these two alone.
    """
    # in float64, where the distance of two rows follows from their product to 1e-8
    rows = F.normalize(unit_rows.double(), dim=1)
    pairs = [torch.empty(0, 2, dtype=torch.int64)]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        squared_distances = 2 - 2 * rows[start : start + ROWS_AT_ONCE] @ rows[start:].T
        # one wait for the device; the number of pairs would be another
        pairs.append((squared_distances <= within**2).triu(diagonal=1).cpu().nonzero() + start)
    others: dict[int, set[int]] = {}
    for first, second in torch.cat(pairs).tolist():
        others.setdefault(first, set()).add(second)
        others.setdefault(second, set()).add(first)
    return {row: frozenset(equal) for row, equal in others.items()}


def first_of_equal(rows: np.ndarray, equal: EqualRows) -> np.ndarray:
    """Return, for each text of a list, the row of the first one that is equal to it; often its own.

    Args:
        rows: of the texts, int64 [texts].
        equal: rows that are equal to each other.
    """
    position_of: dict[int, int] = {}
    firsts = []
    for position, row in enumerate(rows.tolist()):
        earlier = min(
            (position_of[other] for other in equal.get(row, ()) if other in position_of), default=None
        )
        firsts.append(row if earlier is None else int(rows[earlier]))
        if earlier is None:
            position_of.setdefault(row, position)
    return np.array(firsts, np.int64)


def without_equals(rows: np.ndarray, taken: np.ndarray, equal: EqualRows) -> np.ndarray:
    """Return the rows that neither are, nor are equal to, one of those taken; of all, the same array."""
    barred = set(taken.tolist())
    barred |= {other for row in taken.tolist() for other in equal.get(row, ())}
    if barred.isdisjoint(rows.tolist()):
        return rows
    return rows[~np.isin(rows, list(barred))]
