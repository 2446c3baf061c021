"""The two states of a sample between its tar and its rows: prepared for the device, and explained by it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from legrad.heatmaps import Normalisation
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


@dataclass(frozen=True)
class ExplainedPrompt:
    """A prompt that has a map.

    Attributes:
        prompt: the prompt.
        truncated: whether the tokenizer cut it.
        similarity: its cosine similarity to the image, in [-1, 1].
    """

    prompt: Prompt
    truncated: bool
    similarity: float


@dataclass(frozen=True)
class TextMaps:
    """The maps of some texts on one image, float32 on the CPU; perhaps of no text.

    Attributes:
        relevance_grids: raw relevance, [texts, grid_height, grid_width].
        peaks: maximum of each grid outside the patches that a neutral text claims, [texts].
        mask_maps: what masks are cut from, [texts, rows, columns]: the grids with the patches zeroed that a
            neutral text claims, or refined heat maps in [0, 1] in the frame of the model's input.
    """

    relevance_grids: torch.Tensor
    peaks: torch.Tensor
    mask_maps: torch.Tensor


@dataclass(frozen=True)
class SampleMaps:
    """The maps of a sample.

    Attributes:
        prompts: of its prompts, in their order.
        backgrounds: of the background texts that compete with them.
        normalisation: how `mask_maps` are brought to [0, 1]; None: they are refined, and in [0, 1] already.
    """

    prompts: TextMaps
    backgrounds: TextMaps
    normalisation: Normalisation | None


@dataclass(frozen=True)
class ExplainedSample:
    """A sample after the device step; its pixels are gone.

    Attributes:
        index: ordinal in the shard.
        key: sample key.
        image_height: rows of the original image, after EXIF orientation.
        image_width: columns of the original image, after EXIF orientation.
        prompts: those that have a map, in the sample's order.
        maps: their maps, and those of background texts.
        dropped_prompts: prompts omitted because the sample had too many.
        errors: of prompts that could not be read.
    """

    index: int
    key: str
    image_height: int
    image_width: int
    prompts: tuple[ExplainedPrompt, ...]
    maps: SampleMaps
    dropped_prompts: int = 0
    errors: tuple[SampleError, ...] = ()
