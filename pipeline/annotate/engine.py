"""The device step: a batch of images and their prompts in, similarities and maps out."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

import legrad
from legrad.canvases import Views
from legrad.inputs import RaggedPrompts, ragged_unit_rows, unit_row_cosines
from legrad.masks.refine import Refinement
from legrad.memory import is_out_of_memory
from legrad.text_cache import TextEmbedder
from legrad.views import merged_relevance, preprocessed
from pipeline.annotate.batch_limits import BatchLimits
from pipeline.annotate.cutting import DeviceCut
from pipeline.annotate.device_clock import device_clock
from pipeline.annotate.device_memory import Streams, sent
from pipeline.annotate.grid_steps import NO_STEPS, GridSteps, GridTexts, with_centre
from pipeline.annotate.maps import MapSettings, sample_maps
from pipeline.annotate.sample_states import (
    ContextText,
    ExplainedPrompt,
    ExplainedSample,
    PreparedSample,
    SampleMaps,
)
from pipeline.annotate.segmenting import MapSharpener
from pipeline.annotate.texts import (
    BatchTextEmbedder,
    BatchTexts,
    ImageMaps,
    choose_maps,
    context_texts,
    equal_within,
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
        companions: texts explained beside every sample's own.
        views: of every image, whose relevance is merged; the similarity is the first one's.
        grid_steps: what is done to grids before they are normalised; a contrast gets its centre here.
        refinement: how heat maps are made to follow the pixels; None: not at all.
        sharpener: makes masks anew with a segmenter; None: there is none.
        cut: how masks are cut on the device; None: that is done later, on the CPU.

    Attributes:
        batches_at_once: batches that may be on the device now.
        clock: measures how long the device was busy.
    """

    def __init__(
        self,
        explainer: legrad.LeGrad,
        max_prompts_per_sample: int,
        batch_size: int,
        *,
        batches_at_once: int = 1,
        companions: Companions = NO_COMPANIONS,
        views: Views = WHOLE_IMAGE,
        grid_steps: GridSteps = NO_STEPS,
        refinement: Refinement | None = None,
        sharpener: MapSharpener | None = None,
        cut: DeviceCut | None = None,
    ) -> None:
        self._explainer = explainer
        self._views = views
        self._companions = companions
        self._max_prompts_per_sample = max_prompts_per_sample
        embedder = TextEmbedder(explainer)
        self._map_settings = MapSettings(
            explainer.tower.normalisation,
            None if companions.neutral is None else companions.neutral_threshold,
            with_centre(grid_steps, companions.centre, embedder),
            refinement,
            sharpener,
            cut,
        )
        self._texts = BatchTextEmbedder(embedder, companions, equal_within(explainer.dtype))
        self._streams = Streams(explainer.device)
        self._turns = threading.Semaphore(batches_at_once)
        self._memory_lock = threading.Lock()
        self._has_warned = False
        self._limits = BatchLimits(batch_size)
        self.batches_at_once = batches_at_once
        self.clock = device_clock(explainer.device)

    @property
    def batch_size(self) -> int:
        """Most images in a batch, of any shape."""
        return self._limits.batch_size

    @batch_size.setter
    def batch_size(self, images: int) -> None:
        self._limits = BatchLimits(images)

    def batch_limit(self, shape: Hashable) -> int:
        """Return the most images of a shape in one batch: `batch_size`, or less where that did not fit."""
        with self._memory_lock:
            return self._limits.of(shape)

    def explain(self, samples: Sequence[PreparedSample]) -> list[ExplainedSample]:
        """Explain every prompt of every sample; a batch too large for the device is halved.

        Args:
            samples: of one shape.

        Raises:
            torch.OutOfMemoryError: not even a single sample fits; or what another library raises then.
        """
        explained: list[ExplainedSample] = []
        may_retry = True
        while len(explained) < len(samples):
            shape = samples[0].shape
            limit = self.batch_limit(shape)
            batch = samples[len(explained) : len(explained) + limit]
            # views of one size share a forward pass, up to the limit
            tried = _Tried(shape, len(batch) if self._views == WHOLE_IMAGE else limit, self.batches_at_once)
            part = self._explained_if_it_fits(batch, tried, may_retry)
            if part is None:
                may_retry = self._saves_memory(tried, may_retry)
            else:
                explained += part
                may_retry = True
        return explained

    def warm_up(self, samples: Sequence[PreparedSample]) -> None:
        """Explain samples and forget the result, so that kernels are loaded, and one that cannot run fails.

        Args:
            samples: of one shape; they must fit into one batch.
        """
        self.measure_s([samples])

    def measure_s(self, batches: Sequence[Sequence[PreparedSample]]) -> float:
        """Explain batches at the same time, without halving them, and return the seconds that took.

        Args:
            batches: at most `batches_at_once`, each of samples of one shape.

        Raises:
            torch.OutOfMemoryError: they do not fit; or what another library raises then.
        """
        started_s = time.perf_counter()
        with ThreadPoolExecutor(len(batches)) as threads:
            deque(threads.map(self._explain_in_turn, batches, map(len, batches)), maxlen=0)
        return time.perf_counter() - started_s

    def _explain_in_turn(
        self, samples: Sequence[PreparedSample], images_at_once: int
    ) -> list[ExplainedSample]:
        with self._turns, self._streams.own_stream():
            return self._explain(samples, images_at_once)

    def _explained_if_it_fits(
        self, samples: Sequence[PreparedSample], tried: _Tried, may_retry: bool
    ) -> list[ExplainedSample] | None:
        """Return None where the device's memory was exhausted, and less of it can be used."""
        try:
            explained = self._explain_in_turn(samples, tried.images)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            is_alone = tried.images == 1 and tried.batches_at_once == 1
            if is_alone and not (may_retry and self._has_fitted(tried)):
                raise
            # outside of the handler, whose traceback holds on to tensors
            return None
        with self._memory_lock:
            self._limits.fitted(tried.shape, tried.images)
        return explained

    def _has_fitted(self, tried: _Tried) -> bool:
        with self._memory_lock:
            return self._limits.has_fitted(tried.shape, tried.images)

    def _saves_memory(self, tried: _Tried, may_retry: bool) -> bool:
        """Release what is cached; unless as much has fitted before, allow less from now on.

        Returns:
            Whether a batch that fails next may be tried again as it is.
        """
        if self._explainer.device.type == "cuda":
            torch.cuda.empty_cache()
        if may_retry and self._has_fitted(tried):
            logger.info(
                "out of device memory with %d images, which fitted before; trying again", tried.images
            )
            return False
        with self._memory_lock:
            if not self._has_warned:
                logger.warning(
                    "out of device memory with %d images in a forward pass; using smaller batches. "
                    "Lower run.batch_size to avoid this.",
                    tried.images,
                )
                self._has_warned = True
            if tried.batches_at_once == 1:
                self._limits.failed(tried.shape, tried.images)
            while self.batches_at_once > 1:
                self._turns.acquire()
                self.batches_at_once -= 1
        return may_retry

    def _explain(self, samples: Sequence[PreparedSample], images_at_once: int) -> list[ExplainedSample]:
        explainer = self._explainer
        canvases = [
            sent(pixels, explainer.device)
            for pixels in zip(*(sample.canvases for sample in samples), strict=True)
        ]
        tokens = {text: row for sample in samples for text, row in sample.tokens.items()}
        with self.clock.work():
            trace = explainer.encode(preprocessed(explainer, canvases[0]), check_pixels=False)
            with self._streams.ordered():
                embedded = self._texts.embed([sample.prompts for sample in samples], tokens)
            cosines = unit_row_cosines(trace.image_features, embedded.unit_rows)
            texts, similarities = self._texts.resolve(embedded, cosines)
        chosen = choose_maps(
            similarities, texts, self._max_prompts_per_sample, self._companions.max_background
        )
        prompts = _prompts_of_maps(chosen, texts.unit_rows)
        image_sizes = [(sample.image_height, sample.image_width) for sample in samples]
        with self.clock.work():
            grids = merged_relevance(
                explainer, trace, canvases, prompts, views=self._views, images_at_once=images_at_once
            ).float()
            grid_texts = GridTexts(prompts.unit_rows, _similarities_of_maps(chosen, similarities))
            maps = sample_maps(
                grids,
                chosen,
                grid_texts,
                self._map_settings,
                pixels=canvases[0],
                image_sizes=image_sizes,
            )
        return [
            _explained(
                sample,
                own_maps,
                _explained_prompts(sample, choice, rows, cosines, texts),
                context_texts(choice, cosines, embedded.ensembles, self._companions),
            )
            for sample, choice, own_maps, rows, cosines in zip(
                samples, chosen, maps, texts.prompt_rows, similarities, strict=True
            )
        ]


@dataclass(frozen=True)
class _Tried:
    """A batch on its way to the device: its shape, images in a forward pass, and batches beside it."""

    shape: Hashable
    images: int
    batches_at_once: int


def _prompts_of_maps(chosen: Sequence[ImageMaps], unit_rows: torch.Tensor) -> RaggedPrompts:
    """Return the text of every map of a batch with its image, sent to the device by one copy."""
    images = np.repeat(np.arange(len(chosen)), [len(maps.text_rows) for maps in chosen])
    # the index first, where memory is aligned: Triton compiles a kernel again for one that is not
    image_index, text_rows = sent(
        [images, np.concatenate([maps.text_rows for maps in chosen])], unit_rows.device
    )
    one_by_one = len(images) == len(chosen) and all(len(maps.text_rows) == 1 for maps in chosen)
    return ragged_unit_rows(unit_rows[text_rows], image_index, one_by_one=one_by_one)


def _similarities_of_maps(chosen: Sequence[ImageMaps], similarities: np.ndarray) -> np.ndarray:
    of_images = zip(similarities, chosen, strict=True)
    return np.concatenate([cosines[maps.text_rows] for cosines, maps in of_images])


def _explained(
    sample: PreparedSample,
    maps: SampleMaps,
    prompts: tuple[ExplainedPrompt, ...],
    context: tuple[ContextText, ...],
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
        context=context,
    )


def _explained_prompts(
    sample: PreparedSample, maps: ImageMaps, prompt_rows: np.ndarray, cosines: np.ndarray, texts: BatchTexts
) -> tuple[ExplainedPrompt, ...]:
    """Return the prompts of a sample that have maps; equal ones have the similarity of the first."""
    similarities = cosines[maps.text_rows[maps.map_of_prompt]].tolist()
    return tuple(
        ExplainedPrompt(prompt.index, prompt.text, prompt.class_id, texts.truncated[row], similarity)
        for prompt, row, similarity in zip(
            [sample.prompts[position] for position in maps.prompts.tolist()],
            prompt_rows[maps.prompts].tolist(),
            similarities,
            strict=True,
        )
    )
