"""The two states of a sample between its tar and its rows: prepared for the device, explained by it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from legrad.heatmaps import Normalisation
from legrad.masks.runs import MapRuns
from legrad.tokens import TokenRow
from pipeline.prompts.sample_prompts import Prompt
from pipeline.shards.sample_error import SampleError


@dataclass(frozen=True)
class PreparedSample:
    """A decoded sample that waits for the device.

    Attributes:
        index: ordinal in the shard.
        key: sample key.
        image_height: rows of the original image, after EXIF orientation.
        image_width: columns of the original image, after EXIF orientation.
        canvases: the image resized for its views, RGB, uint8 [height, width, 3] each, the first one at the
            model's input size.
        prompts: texts to explain, at least one.
        errors: of prompts that could not be read.
        tokens: tokens of texts of the prompts; of others they are made beside the model.
    """

    index: int
    key: str
    image_height: int
    image_width: int
    canvases: tuple[np.ndarray, ...]
    prompts: tuple[Prompt, ...]
    errors: tuple[SampleError, ...] = ()
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)

    @property
    def shape(self) -> Hashable:
        """What samples that share a batch have in common: the sizes of their canvases."""
        return tuple(canvas.shape for canvas in self.canvases)

    @property
    def held_bytes(self) -> int:
        """Bytes of its canvases."""
        return sum(canvas.nbytes for canvas in self.canvases)

    @property
    def decoded_images(self) -> int:
        """Number of images that were decoded for it."""
        return 1


@dataclass(frozen=True)
class ExplainedPrompt:
    """A prompt that has a map.

    Attributes:
        index: see `Prompt`.
        text: as its rows name it.
        class_id: see `Prompt`.
        truncated: whether the tokenizer cut it.
        similarity: its cosine similarity to the image, in [-1, 1].
    """

    index: int
    text: str
    class_id: int | None
    truncated: bool
    similarity: float


@dataclass(frozen=True)
class ContextText:
    """A text beside the prompts of a sample that has a map.

    Attributes:
        text: as the configuration names it.
        kind: background or neutral.
        similarity: its cosine similarity to the image, in [-1, 1].
    """

    text: str
    kind: Literal["background", "neutral"]
    similarity: float


@dataclass(frozen=True)
class SampleMaps:
    """The maps of a sample on the CPU: those of its prompts, then those of background texts that compete.

    The arrays are contiguous slices of the arrays of a batch, so that sharing out a batch copies nothing.

    Attributes:
        relevance_grids: raw relevance, float32 [maps, grid_height, grid_width].
        peaks: maximum of each grid outside the patches that a neutral text claims, float32 [maps].
        rejections: which filter rejects each map's text, as a position in
            `pipeline.annotate.filters.STATUSES`, uint8 [maps]; None: there is no filter.
        mask_maps: what masks are cut from, [maps, rows, columns]: float32 grids, after the neutral text,
            smoothing and contrast between texts; or heat maps in [0, 1] refined from these, in the frame of
            the model's input, float32, or float16 from a GPU. None: masks are cut from `relevance_grids`.
        map_of_prompt: for each prompt, which of the maps is its own, int64 [prompts]; equal prompts share
            one.
        prompt_maps: how many of the maps belong to prompts.
        normalisation: how mask maps are brought to [0, 1]; None: they are refined, and in [0, 1] already.
        runs: masks of the maps that were cut on the device; None: masks are still to be cut from the maps.
        instance_labels: where a segmenter has cut out instances, its label maps in the frame of `mask_maps`:
            0, or i + 1 at instance i, uint8 [maps, rows, columns]; None: instances are still to be found.
        context_grids: raw relevance of the background texts, whether they compete or not, then of the neutral
            text if there is one, float32 [texts, grid_height, grid_width].
        distances: see `legrad.text_distances`: between the texts of the prompts' maps and the background
            texts, float32 [texts, texts]; None: they are not kept.
    """

    relevance_grids: np.ndarray
    peaks: np.ndarray
    rejections: np.ndarray | None
    mask_maps: np.ndarray | None
    map_of_prompt: np.ndarray
    prompt_maps: int
    normalisation: Normalisation | None
    runs: tuple[MapRuns, ...] | None = None
    instance_labels: np.ndarray | None = None
    context_grids: np.ndarray | None = None
    distances: np.ndarray | None = None

    @property
    def cut_maps(self) -> np.ndarray:
        """What masks are cut from: `mask_maps`, or the relevance grids where there are none."""
        return self.relevance_grids if self.mask_maps is None else self.mask_maps


@dataclass(frozen=True)
class ExplainedSample:
    """A sample after the device step; its pixels are gone.

    Attributes:
        index: ordinal in the shard.
        key: sample key.
        image_height: rows of the original image, after EXIF orientation.
        image_width: columns of the original image, after EXIF orientation.
        prompts: those that have a map, in the sample's order.
        maps: the maps of these prompts, and those of background texts.
        dropped_prompts: prompts omitted because the sample had too many.
        errors: of prompts that could not be read.
        context: the texts of `maps.context_grids`.
    """

    index: int
    key: str
    image_height: int
    image_width: int
    prompts: tuple[ExplainedPrompt, ...]
    maps: SampleMaps
    dropped_prompts: int = 0
    errors: tuple[SampleError, ...] = ()
    context: tuple[ContextText, ...] = ()
