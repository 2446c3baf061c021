"""The device step: a batch of images and their prompts in, similarities and maps out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Sequence

import numpy as np
import torch

import legrad
from legrad.canvases import Views
from legrad.masks.refine import Refinement
from legrad.method.trace import Trace
from legrad.text_cache import TextEmbedder
from legrad.views import merged_relevance, preprocessed
from pipeline.annotate.maps import MapSettings, sample_maps
from pipeline.annotate.meter import Meter
from pipeline.annotate.sample_states import ExplainedPrompt, ExplainedSample, PreparedSample, SampleMaps
from pipeline.annotate.texts import (
    BatchTextEmbedder,
    BatchTexts,
    ImageMaps,
    choose_maps,
    equal_within,
    images_of_maps,
)
from pipeline.prompts.sample_prompts import Companions
from pipeline.shards.images import WHOLE_IMAGE

logger = logging.getLogger(__name__)

NO_COMPANIONS = Companions()


class Engine:
    """Explains batches on one device, a few at a time; once memory ran short, one at a time.

    Args:
        explainer: the loaded model.
        max_prompts_per_sample: of more prompts the most similar ones are kept.
        batch_size: most images in a batch.
        batches_at_once: while one computes, others are put together; further threads wait.
        meter: measures how long the device was busy.
        companions: texts explained beside every sample's own.
        views: of every image, whose relevance is merged; the similarity is the first one's.
        refinement: how heat maps are made to follow the pixels; None: not at all.
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
        self._map_settings = MapSettings(
            explainer.tower.normalisation,
            None if companions.neutral is None else companions.neutral_threshold,
            refinement,
        )
        self._max_background = companions.max_background
        self._max_prompts_per_sample = max_prompts_per_sample
        within = equal_within(explainer.dtype)
        self._texts = BatchTextEmbedder(TextEmbedder(explainer), companions, within)
        self._turns = threading.Semaphore(batches_at_once)
        self._batches_at_once = batches_at_once
        self._memory_lock = threading.Lock()
        self._has_warned = False
        self._meter = meter or Meter()
        self._limit_by_shape: dict[Hashable, int] = {}
        self.batch_size = batch_size

    def batch_limit(self, shape: Hashable) -> int:
        """Return the most images of a shape in one batch: `batch_size`, or less where that did not fit."""
        return self._limit_by_shape.get(shape, self.batch_size)

    def explain(self, samples: Sequence[PreparedSample]) -> list[ExplainedSample]:
        """Explain every prompt of every sample; a batch too large for the device is halved.

        Args:
            samples: of one shape.

        Raises:
            torch.OutOfMemoryError: not even a single sample fits.
        """
        explained: list[ExplainedSample] = []
        while len(explained) < len(samples):
            shape = samples[0].shape
            limit = self.batch_limit(shape)
            batch = samples[len(explained) : len(explained) + limit]
            had_the_device_alone = self._batches_at_once == 1
            # views of one size share a forward pass, up to the limit
            tried = len(batch) if self._views == WHOLE_IMAGE else limit
            part = self._explained_if_it_fits(batch, tried, had_the_device_alone)
            if part is None:
                self._save_memory(shape, tried, had_the_device_alone)
            else:
                explained += part
        return explained

    def measure_s(self, samples: Sequence[PreparedSample]) -> float:
        """Explain one batch without halving it, and return the seconds that took.

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

    def _save_memory(self, shape: Hashable, images_tried: int, had_the_device_alone: bool) -> None:
        """Allow one batch at a time from now on; where only one was running, halve it."""
        with self._memory_lock:
            if not self._has_warned:
                logger.warning(
                    "out of device memory with %d images in a forward pass; using smaller batches. "
                    "Lower run.batch_size to avoid this.",
                    images_tried,
                )
                self._has_warned = True
            if had_the_device_alone:
                self._limit_by_shape[shape] = images_tried // 2
            while self._batches_at_once > 1:
                self._turns.acquire()
                self._batches_at_once -= 1

    def _explain(self, samples: Sequence[PreparedSample], images_at_once: int) -> list[ExplainedSample]:
        explainer = self._explainer
        by_canvas = zip(*(sample.canvases for sample in samples), strict=True)
        canvases = [torch.from_numpy(np.stack(pixels)).to(explainer.device) for pixels in by_canvas]
        trace = explainer.encode(preprocessed(explainer, canvases[0]))
        texts = self._texts.embed([sample.prompts for sample in samples])
        similarities = explainer.similarity(trace, texts.unit_rows).float().cpu().numpy()
        chosen = choose_maps(similarities, texts, self._max_prompts_per_sample, self._max_background)
        grids = self._relevance(trace, canvases, texts, chosen, images_at_once)
        maps = sample_maps(grids, canvases[0], chosen, self._map_settings)
        return [
            _explained(sample, own_maps, _explained_prompts(sample, choice, rows, cosines, texts))
            for sample, choice, own_maps, rows, cosines in zip(
                samples, chosen, maps, texts.prompt_rows, similarities, strict=True
            )
        ]

    def _relevance(
        self,
        trace: Trace,
        canvases: Sequence[torch.Tensor],
        texts: BatchTexts,
        chosen: Sequence[ImageMaps],
        images_at_once: int,
    ) -> torch.Tensor:
        """Return the raw grids of all maps of a batch, image by image, float32 on the device."""
        text_rows = torch.from_numpy(np.concatenate([maps.text_rows for maps in chosen]))
        return merged_relevance(
            self._explainer,
            trace,
            canvases,
            texts.unit_rows[text_rows.to(texts.unit_rows.device)],
            images_of_maps(chosen),
            views=self._views,
            images_at_once=images_at_once,
        ).float()


def _explained(
    sample: PreparedSample, maps: SampleMaps, prompts: tuple[ExplainedPrompt, ...]
) -> ExplainedSample:
    return ExplainedSample(
        index=sample.index,
        key=sample.key,
        image_height=sample.image_height,
        image_width=sample.image_width,
        prompts=prompts,
        maps=maps,
        dropped_prompts=len(sample.prompts) - len(prompts),
        errors=sample.errors,
    )


def _explained_prompts(
    sample: PreparedSample, maps: ImageMaps, prompt_rows: np.ndarray, cosines: np.ndarray, texts: BatchTexts
) -> tuple[ExplainedPrompt, ...]:
    """Return the prompts of a sample that have maps; equal ones have the similarity of the first."""
    similarities = cosines[maps.text_rows[maps.map_of_prompt]].tolist()
    return tuple(
        ExplainedPrompt(sample.prompts[position], texts.truncated[prompt_rows[position]], similarity)
        for position, similarity in zip(maps.prompts.tolist(), similarities, strict=True)
    )
