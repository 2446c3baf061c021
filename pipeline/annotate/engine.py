"""The device step: a batch of images and their prompts in, similarities and relevance grids out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

import legrad
from legrad.inputs import neutral_patches
from legrad.masks.refine import Refinement
from legrad.text_cache import TextEmbedder
from legrad.views import Views, merged_relevance, preprocessed
from pipeline.annotate.equal_texts import equal_within
from pipeline.annotate.meter import Meter
from pipeline.annotate.refinement import refined_maps
from pipeline.annotate.texts import BatchTextEmbedder, BatchTexts, ImageMaps, choose_maps
from pipeline.prompts.sample_prompts import Companions, Prompt
from pipeline.shards.images import WHOLE_IMAGE, DecodedImage

__all__ = ["Engine", "ExplainedPrompt", "ExplainedSample", "PreparedSample", "Prompt"]

logger = logging.getLogger(__name__)

NO_COMPANIONS = Companions()


@dataclass(frozen=True)
class PreparedSample:
    """A decoded sample that waits for its turn on the device.

    Attributes:
        index: ordinal in the shard.
        key: sample key.
        image: decoded and resized image.
        prompts: texts to explain, at least one.
    """

    index: int
    key: str
    image: DecodedImage
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class ExplainedPrompt:
    """A prompt with its cosine similarity to the image, in [-1, 1]."""

    prompt: Prompt
    truncated: bool
    similarity: float


@dataclass(frozen=True)
class ExplainedSample:
    """What the device step says of a sample.

    Attributes:
        sample: the sample.
        prompts: the prompts kept, in the sample's order.
        relevance_grids: raw relevance, float32 on the CPU, [prompts, grid_height, grid_width].
        dropped_prompts: prompts left out because the sample had too many.
        background_grids: raw relevance of background texts, as `relevance_grids`; [backgrounds, grid_height,
            grid_width], perhaps of no background.
        neutral_patches: where the neutral text's own map is high, bool [grid_height, grid_width]: grids are
            zeroed there before they are normalised; None: no such correction.
        refined_maps: heat maps in [0, 1] on the CPU, in the frame of the model's input, [prompts +
            backgrounds, height, width] with the prompts first; None: not refined.
    """

    sample: PreparedSample
    prompts: tuple[ExplainedPrompt, ...]
    relevance_grids: torch.Tensor
    dropped_prompts: int
    background_grids: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))
    neutral_patches: torch.Tensor | None = None
    refined_maps: torch.Tensor | None = None


class Engine:
    """Explains batches on one device, a few at a time; once memory ran short, one at a time.

    Args:
        explainer: the loaded model.
        max_prompts_per_sample: of more prompts the most similar ones are kept.
        batch_size: most images in a batch.
        batches_at_once: while one computes, others are put together; further threads wait.
        views: of every image, whose relevance is merged; the similarity is the first one's.
        refinement: how heat maps are made to follow the pixels; None: not at all.
        companions: texts explained beside every sample's own.
        meter: takes how long the device was busy.
    """

    def __init__(
        self,
        explainer: legrad.LeGrad,
        max_prompts_per_sample: int,
        batch_size: int,
        meter: Meter | None = None,
        *,
        batches_at_once: int = 1,
        companions: Companions = NO_COMPANIONS,
        views: Views = WHOLE_IMAGE,
        refinement: Refinement | None = None,
    ) -> None:
        self._explainer = explainer
        self._views = views
        self._refinement = refinement
        self._companions = companions
        self._max_prompts_per_sample = max_prompts_per_sample
        within = equal_within(explainer.dtype)
        self._texts = BatchTextEmbedder(TextEmbedder(explainer), companions, within)
        self._turns = threading.Semaphore(batches_at_once)
        self._batches_at_once = batches_at_once
        self._memory_lock = threading.Lock()
        self._said_out_of_memory = False
        self._meter = meter or Meter()
        self._limit_by_shape: dict[Hashable, int] = {}
        self.batch_size = batch_size

    def batch_limit(self, shapes: Hashable) -> int:
        """Most images of such shapes in a batch: `batch_size`, or less where that was too much."""
        return self._limit_by_shape.get(shapes, self.batch_size)

    def explain(self, samples: Sequence[PreparedSample]) -> list[ExplainedSample]:
        """Explain every prompt of every sample; a batch too large for the device is halved.

        Args:
            samples: their images are of the same shapes.

        Raises:
            torch.OutOfMemoryError: not even a single sample fits.
        """
        explained: list[ExplainedSample] = []
        while len(explained) < len(samples):
            shapes = samples[0].image.shapes
            limit = self.batch_limit(shapes)
            batch = samples[len(explained) : len(explained) + limit]
            had_the_device_alone = self._batches_at_once == 1
            # views of one size share a forward pass, up to the limit
            tried = len(batch) if self._views == WHOLE_IMAGE else limit
            part = self._explained_if_it_fits(batch, tried, had_the_device_alone)
            if part is None:
                self._save_memory(shapes, tried, had_the_device_alone)
            else:
                explained += part
        return explained

    def measure_s(self, samples: Sequence[PreparedSample]) -> float:
        """Explain one batch as it is, and say how many seconds that took.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        with self._turns:
            started_s = time.perf_counter()
            self._explain(samples, len(samples))
            return time.perf_counter() - started_s

    def _explained_if_it_fits(
        self, samples: Sequence[PreparedSample], images_at_once: int, has_the_device_alone: bool
    ) -> list[ExplainedSample] | None:
        try:
            with self._turns, self._meter.device_step():
                return self._explain(samples, images_at_once)
        except torch.OutOfMemoryError:
            if images_at_once == 1 and has_the_device_alone:
                raise
        # outside of the handler, whose traceback holds on to tensors
        return None

    def _save_memory(self, shapes: Hashable, images_tried: int, had_the_device_alone: bool) -> None:
        """From now on one batch at a time; where that was so already, halve it."""
        with self._memory_lock:
            if not self._said_out_of_memory:
                logger.warning(
                    "out of device memory with %d images: batches are made smaller; lower run.batch_size",
                    images_tried,
                )
                self._said_out_of_memory = True
            if had_the_device_alone:
                self._limit_by_shape[shapes] = images_tried // 2
            while self._batches_at_once > 1:
                self._turns.acquire()
                self._batches_at_once -= 1

    def _explain(self, samples: Sequence[PreparedSample], images_at_once: int) -> list[ExplainedSample]:
        explainer = self._explainer
        by_canvas = zip(*(sample.image.canvases for sample in samples), strict=True)
        canvases = [torch.from_numpy(np.stack(pixels)) for pixels in by_canvas]
        trace = explainer.encode(preprocessed(explainer, canvases[0]))
        texts = self._texts.embed([sample.prompts for sample in samples])
        similarities = explainer.similarity(trace, texts.unit_rows).float().cpu().numpy()
        chosen = choose_maps(
            similarities, texts, self._max_prompts_per_sample, self._companions.max_background
        )
        text_rows = torch.from_numpy(np.concatenate([maps.text_rows for maps in chosen]))
        counts = [len(maps.text_rows) for maps in chosen]
        owners = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts))
        rows = texts.unit_rows[text_rows.to(texts.unit_rows.device)]
        grids = (
            merged_relevance(
                explainer, trace, canvases, rows, owners, views=self._views, images_at_once=images_at_once
            )
            .float()
            .cpu()
        )
        return self._refined(
            [
                self._explained(sample, maps, own_grids, _told(sample, maps, rows, cosines, texts))
                for sample, maps, own_grids, rows, cosines in zip(
                    samples, chosen, torch.split(grids, counts), texts.prompt_rows, similarities, strict=True
                )
            ]
        )

    def _refined(self, explained: list[ExplainedSample]) -> list[ExplainedSample]:
        if self._refinement is None:
            return explained
        maps = refined_maps(
            [result.sample.image.pixels for result in explained],
            [_competing_grids(result) for result in explained],
            self._refinement,
            self._explainer.tower.normalisation,
            self._explainer.device,
        )
        return [replace(result, refined_maps=own) for result, own in zip(explained, maps, strict=True)]

    def _explained(
        self,
        sample: PreparedSample,
        maps: ImageMaps,
        grids: torch.Tensor,
        prompts: tuple[ExplainedPrompt, ...],
    ) -> ExplainedSample:
        end = maps.prompt_maps
        neutral_grid = grids[end + maps.backgrounds :]
        neutral = None
        if self._companions.neutral is not None:
            neutral = neutral_patches(neutral_grid[None], self._companions.neutral_threshold)[0]
        return ExplainedSample(
            sample=sample,
            prompts=prompts,
            relevance_grids=grids[torch.from_numpy(maps.map_of_prompt)],
            dropped_prompts=len(sample.prompts) - len(prompts),
            background_grids=grids[end : end + maps.backgrounds],
            neutral_patches=neutral,
        )


def _told(
    sample: PreparedSample, maps: ImageMaps, prompt_rows: np.ndarray, cosines: np.ndarray, texts: BatchTexts
) -> tuple[ExplainedPrompt, ...]:
    """The prompts kept of a sample; equal ones have the similarity of the first."""
    similarities = cosines[maps.text_rows[maps.map_of_prompt]].tolist()
    return tuple(
        ExplainedPrompt(sample.prompts[position], texts.truncated[prompt_rows[position]], similarity)
        for position, similarity in zip(maps.prompts.tolist(), similarities, strict=True)
    )


def _competing_grids(explained: ExplainedSample) -> torch.Tensor:
    """Grids of prompts, then of backgrounds, without what a neutral text claims."""
    grids = torch.cat([explained.relevance_grids, explained.background_grids])
    if explained.neutral_patches is None:
        return grids
    return grids.masked_fill(explained.neutral_patches, 0)
