"""The device step: batches side by side, and what happens when the device's memory runs out."""

import copy
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from legrad.canvases import Views, canvas_pixels
from legrad.heatmaps import heatmaps_of
from legrad.tokens import RowTokenizer
from legrad.views import view_relevance
from pipeline.annotate import batch_limits
from pipeline.annotate.caption_tokens import caption_tokens
from pipeline.annotate.engine import Engine
from pipeline.annotate.model import load_explainer
from pipeline.annotate.sample_states import PreparedSample
from pipeline.annotate.trial import TrialSamples
from pipeline.config.schema import ModelConfig
from pipeline.demo.assets import DEMO_MODEL_NAME
from pipeline.prompts.sample_prompts import Companions, Prompt
from pipeline.shards.images import WHOLE_IMAGE

TILES = Views(tile=True, scales=(1.0, 0.75), tile_zoom=1.25, max_tiles=4)
SOON_S = 120.0
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
SHAPE = ((96, 96, 3),)

# for the demo's text tower, grass and sky are one, as are any two texts of one word that it does not know
BACKGROUNDS = ["sky", "a wall", "grass", "a very old wall", "a dog"]
COMPANIONS = Companions(tuple((text,) for text in BACKGROUNDS), 2, "a photo of a", 0.6)


@pytest.fixture(scope="module")
def explainer():
    return load_explainer(ModelConfig(name=DEMO_MODEL_NAME, pretrained="demo", layers=1), "cpu")


def samples(count, first=0):
    generator = np.random.default_rng(first)
    return [
        PreparedSample(
            index,
            f"k{index}",
            96,
            96,
            (generator.integers(0, 256, (96, 96, 3), dtype=np.uint8),),
            (Prompt(0, f"text {index}"), Prompt(1, "a dog")),
        )
        for index in range(first, first + count)
    ]


def large_samples(explainer, count, views):
    """Samples whose image is large enough for windows, and their images."""
    generator = np.random.default_rng(7)
    images = [
        Image.fromarray(generator.integers(0, 256, (200, 260, 3), dtype=np.uint8)) for _ in range(count)
    ]
    prompts = (Prompt(0, "a dog"), Prompt(1, "a cat"))
    prepared = [
        PreparedSample(
            index, f"k{index}", 200, 260, canvas_pixels(views, explainer.transform, image), prompts
        )
        for index, image in enumerate(images)
    ]
    return prepared, images


class Device:
    """Wraps an explainer's encode: counts who is inside, and has memory for so many images.

    `fails_at` are the calls, from 0, that find the free memory in pieces; `error` is raised then.
    """

    def __init__(self, explainer, fits=10**6, meet=None, fails_at=(), error=OUT_OF_MEMORY):
        self.explainer = copy.copy(explainer)
        self.explainer.encode = self.encode
        self._encode, self._fits, self._meet = explainer.encode, fits, meet
        self._fails_at, self._error = fails_at, error
        self._lock, self._inside = threading.Lock(), 0
        self.calls, self.done, self.most_at_once, self.refused = 0, [], 0, 0

    def encode(self, images, **options):
        with self._lock:
            self._inside += len(images)
            self.most_at_once = max(self.most_at_once, self._inside)
        try:
            if self._meet is not None:
                self._meet()
            with self._lock:
                self.calls += 1
                if self._inside > self._fits or self.calls - 1 in self._fails_at:
                    self.refused += 1
                    raise self._error
            trace = self._encode(images, **options)
            self.done.append(len(images))
            return trace
        finally:
            with self._lock:
                self._inside -= len(images)


def warnings_of_memory(caplog):
    return sum("out of device memory" in record.message for record in caplog.records)


def prompt_grids(explained):
    """The grid of each prompt."""
    maps = explained.maps
    return torch.from_numpy(maps.relevance_grids[maps.map_of_prompt])


def same(results, expected):
    assert [result.key for result in results] == [result.key for result in expected]
    for result, wanted in zip(results, expected, strict=True):
        assert torch.allclose(prompt_grids(result), prompt_grids(wanted), rtol=1e-3, atol=1e-9)
        assert [prompt.text for prompt in result.prompts] == [prompt.text for prompt in wanted.prompts]


def test_an_explained_sample_keeps_no_pixels(explainer):
    batch, _ = large_samples(explainer, 2, TILES)
    canvases = [weakref.ref(canvas) for sample in batch for canvas in sample.canvases]
    assert len(canvases) == 6
    results = Engine(explainer, 32, 8, views=TILES).explain(batch)
    batch.clear()
    assert len(results) == 2
    assert [canvas() for canvas in canvases] == [None] * 6


def test_tokens_that_come_with_the_samples_change_nothing_and_none_are_made(explainer):
    tokenizer = RowTokenizer(explainer.tokenizer)
    batch = samples(3)
    with_tokens = [replace(sample, tokens=caption_tokens(sample.prompts, tokenizer)) for sample in batch]
    engine = Engine(explainer, 32, 8)
    with mock.patch.object(RowTokenizer, "_plain_row", side_effect=AssertionError("tokenised again")):
        results = engine.explain(with_tokens)
    same(results, Engine(explainer, 32, 8).explain(batch))


def test_two_batches_are_on_the_device_at_once_where_that_is_wanted(explainer):
    both = threading.Barrier(2)
    device = Device(explainer, meet=lambda: both.wait(SOON_S))
    engine = Engine(device.explainer, 32, 3, batches_at_once=2)
    batches = [samples(3), samples(3, first=3)]
    with ThreadPoolExecutor(2) as hands:
        results = list(hands.map(engine.explain, batches))
    assert device.most_at_once == 6
    for result, batch in zip(results, batches, strict=True):
        same(result, Engine(explainer, 32, 3).explain(batch))


def test_where_memory_is_short_for_two_batches_they_take_turns_and_none_is_halved(explainer, caplog):
    both, is_first = threading.Barrier(2), threading.Event()

    def meet_once():
        if not is_first.is_set():
            both.wait(SOON_S)
            is_first.set()

    device = Device(explainer, fits=3, meet=meet_once)
    engine = Engine(device.explainer, 32, 3, batches_at_once=2)
    with ThreadPoolExecutor(2) as hands:
        results = list(hands.map(engine.explain, [samples(3, first=3 * number) for number in range(4)]))
    assert [result.index for batch in results for result in batch] == list(range(12))
    assert device.refused >= 1
    assert set(device.done) == {3}
    assert engine.batch_limit(((96, 96, 3),)) == 3
    assert warnings_of_memory(caplog) == 1


def test_a_batch_too_large_is_halved_until_it_fits_and_gives_the_same(explainer, caplog):
    device = Device(explainer, fits=2)
    engine = Engine(device.explainer, 32, 8, batches_at_once=2)
    batch = samples(11)
    same(engine.explain(batch), Engine(explainer, 32, 8).explain(batch))
    assert device.done == [2, 2, 2, 2, 2, 1]
    assert engine.batch_limit(((96, 96, 3),)) == 2
    # what is too much for one shape says nothing of another
    assert engine.batch_limit(((32, 32, 3),)) == 8
    assert warnings_of_memory(caplog) == 1


@pytest.mark.parametrize("fails_at", [(1,), (2,), (1, 3)])
@pytest.mark.parametrize("count", [8, 3])
def test_a_batch_that_fails_although_as_many_fitted_is_tried_again_as_it_is(
    explainer, caplog, count, fails_at
):
    device = Device(explainer, fails_at=fails_at)
    engine = Engine(device.explainer, 32, 8)
    batches = [samples(8), samples(count, first=8), samples(count, first=16)]
    results = [engine.explain(batch) for batch in batches]
    assert [len(batch) for batch in results] == device.done == [8, count, count]
    assert device.refused == len(fails_at)
    assert engine.batch_limit(SHAPE) == 8
    assert warnings_of_memory(caplog) == 0


def test_a_batch_that_fails_twice_is_halved_and_the_limit_recovers(explainer, caplog, monkeypatch):
    monkeypatch.setattr(batch_limits, "BATCHES_UNTIL_RETRY", 2)
    device = Device(explainer, fails_at=(1, 2))
    engine = Engine(device.explainer, 32, 4)
    for number in range(5):
        engine.explain(samples(4, first=4 * number))
    assert device.done == [4, 2, 2, 4, 4, 4]
    assert engine.batch_limit(SHAPE) == 4
    assert warnings_of_memory(caplog) == 1


def test_a_partial_batch_that_fails_lowers_the_limit_to_half_of_itself_for_a_while_alone(
    explainer, monkeypatch
):
    monkeypatch.setattr(batch_limits, "BATCHES_UNTIL_RETRY", 2)
    device = Device(explainer, fails_at=(1, 2))
    engine = Engine(device.explainer, 32, 8)
    for count, first in ((8, 0), (2, 8), (8, 10)):
        engine.explain(samples(count, first=first))
    assert device.done == [8, 1, 1, 2, 2, 4]
    engine.explain(samples(8, first=18))
    assert device.done[6:] == [4, 4]
    assert engine.batch_limit(SHAPE) == 8


@pytest.mark.parametrize(
    "message", ["cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory"]
)
def test_a_lack_of_memory_that_another_library_reports_halves_a_batch_too(explainer, message):
    device = Device(explainer, fits=2, error=RuntimeError(message))
    batch = samples(4)
    same(Engine(device.explainer, 32, 4).explain(batch), Engine(explainer, 32, 4).explain(batch))
    assert device.done == [2, 2]


def test_another_error_of_the_device_is_passed_on_at_once(explainer):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    device = Device(explainer, fits=2, error=error)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Engine(device.explainer, 32, 4).explain(samples(4))
    assert device.refused == 1


def test_a_single_image_that_fitted_before_is_tried_once_more(explainer):
    engine = Engine(Device(explainer, fails_at=(1,)).explainer, 32, 1)
    assert [result.index for result in engine.explain(samples(3))] == [0, 1, 2]
    device = Device(explainer, fails_at=(1, 2))
    with pytest.raises(torch.OutOfMemoryError):
        Engine(device.explainer, 32, 1).explain(samples(3))
    assert device.refused == 2


def test_a_warm_up_runs_every_step_and_fails_where_the_device_does(explainer):
    trial = TrialSamples(explainer.transform, TILES, 2)
    device = Device(explainer)
    engine = Engine(device.explainer, 32, 8, views=TILES, companions=COMPANIONS)
    engine.warm_up(trial.batch(2))
    assert sum(device.done) == 2 * (2 + 4)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(Device(explainer, fits=0).explainer, 32, 8, views=TILES).warm_up(trial.batch(2))


def test_a_trial_runs_as_many_batches_at_the_same_time_as_the_job(explainer):
    both = threading.Barrier(2)
    device = Device(explainer, meet=lambda: both.wait(SOON_S))
    engine = Engine(device.explainer, 32, 8, batches_at_once=2)
    trial = TrialSamples(explainer.transform, WHOLE_IMAGE, 1)
    assert engine.measure_s([trial.batch(3) for _ in range(2)]) > 0
    assert device.most_at_once == 6


def test_samples_of_a_trial_share_no_text_unless_those_of_the_job_do(explainer):
    def texts(trial):
        batches = [trial.batch(4), trial.batch(4)]
        return [prompt.text for batch in batches for sample in batch for prompt in sample.prompts]

    unlike, alike = (
        texts(TrialSamples(explainer.transform, WHOLE_IMAGE, 3, recur)) for recur in (False, True)
    )
    assert len(set(unlike)) == len(unlike) == 24
    assert len(set(alike)) == 3
    assert {len(text.split()) for text in unlike} == {13}


def test_an_image_that_does_not_fit_alone_is_an_error(explainer):
    engine = Engine(Device(explainer, fits=0).explainer, 32, 4, batches_at_once=2)
    with pytest.raises(torch.OutOfMemoryError):
        engine.explain(samples(4))


def test_views_of_a_batch_are_those_of_each_image_and_the_similarity_is_the_whole_images(explainer):
    batch, images = large_samples(explainer, 2, TILES)
    texts = explainer.embed_text(["a dog", "a cat"])
    wanted = view_relevance(explainer, images, texts, views=TILES)
    whole = explainer.similarity(explainer.encode(explainer.preprocess(images)), texts)
    for limit in (2, 32):
        results = Engine(explainer, 32, limit, views=TILES).explain(batch)
        for result, grids, cosines in zip(results, wanted, whole, strict=True):
            assert torch.allclose(prompt_grids(result), grids, rtol=1e-3, atol=1e-9)
            received = [prompt.similarity for prompt in result.prompts]
            assert received == pytest.approx(cosines.tolist(), abs=1e-5)


def test_each_view_is_encoded_once_and_prompts_are_chosen_before(explainer):
    batch, _ = large_samples(explainer, 2, TILES)
    device = Device(explainer)
    results = Engine(device.explainer, 1, 32, views=TILES).explain(batch)
    # the whole image on two scales and four windows, of two images
    assert sum(device.done) == 2 * (2 + 4)
    assert [(len(prompt_grids(result)), result.dropped_prompts) for result in results] == [(1, 1)] * 2
    for sample, result in zip(batch, results, strict=True):
        both = Engine(explainer, 2, 32).explain([sample])[0].prompts
        assert result.prompts[0].text == max(both, key=lambda prompt: prompt.similarity).text


def test_where_memory_is_short_views_share_no_forward_pass_that_does_not_fit(explainer, caplog):
    batch, _ = large_samples(explainer, 1, TILES)
    device = Device(explainer, fits=3)
    engine = Engine(device.explainer, 32, 8, views=TILES)
    same(engine.explain(batch), Engine(explainer, 32, 8, views=TILES).explain(batch))
    assert max(device.done) == 2
    assert engine.batch_limit(batch[0].shape) == 2
    assert warnings_of_memory(caplog) == 1


def test_a_view_that_does_not_fit_alone_is_an_error(explainer):
    batch, _ = large_samples(explainer, 2, TILES)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(Device(explainer, fits=0).explainer, 32, 4, views=TILES).explain(batch)


def test_backgrounds_and_the_neutral_text_are_those_of_the_library(explainer):
    batch = samples(3)
    results = Engine(explainer, 1, 3, companions=COMPANIONS).explain(batch)
    neutral_row = explainer.embed_text(["a photo of a"])
    # "a dog" is a prompt of each of these images, so no background
    backgrounds = explainer.embed_text(["sky", "a wall", "a very old wall"])
    for sample, result in zip(batch, results, strict=True):
        pixels = torch.from_numpy(sample.canvases[0])[None]
        trace = explainer.encode(explainer.transform.normalise(pixels, explainer.dtype))
        cosines = explainer.similarity(trace, backgrounds)[0]
        assert cosines.sort().values.diff().min() > 1e-5
        best = cosines.topk(2).indices.sort().values
        expected = explainer.relevance(trace, backgrounds[best])[0]
        backgrounds_found = torch.from_numpy(result.maps.relevance_grids[result.maps.prompt_maps :])
        torch.testing.assert_close(backgrounds_found, expected, rtol=1e-3, atol=1e-9)

        (kept,) = result.prompts
        assert (result.dropped_prompts, prompt_grids(result).shape) == (1, (1, 12, 12))
        text = explainer.embed_text([kept.text])
        corrected = explainer.heatmaps(trace, text, neutral_embedding=neutral_row, neutral_threshold=0.6)[0]
        plain = explainer.heatmaps(trace, text)[0]
        assert not torch.equal(corrected, plain)
        zeroed = torch.from_numpy(result.maps.mask_maps[:1])
        assert result.maps.normalisation == explainer.tower.normalisation
        heatmaps = heatmaps_of(zeroed, 96, 96, result.maps.normalisation)
        assert result.maps.peaks[0] == zeroed.max()
        torch.testing.assert_close(heatmaps, corrected, rtol=1e-3, atol=1e-4)


def test_without_companions_there_is_no_background_and_no_correction(explainer):
    for result in Engine(explainer, 32, 3).explain(samples(2)):
        assert len(result.maps.relevance_grids) == result.maps.prompt_maps
        assert result.maps.mask_maps is None


def test_a_batch_with_companions_that_is_too_large_is_halved_and_gives_the_same(explainer):
    device = Device(explainer, fits=2)
    batch = samples(5)
    received = Engine(device.explainer, 32, 4, companions=COMPANIONS).explain(batch)
    expected = Engine(explainer, 32, 8, companions=COMPANIONS).explain(batch)
    assert device.done == [2, 2, 1]
    same(received, expected)
    for result, wanted in zip(received, expected, strict=True):
        found, expected_maps = result.maps, wanted.maps
        np.testing.assert_allclose(found.relevance_grids, expected_maps.relevance_grids, rtol=1e-3, atol=1e-9)
        is_zeroed, was_zeroed = (maps.mask_maps != maps.relevance_grids for maps in (found, expected_maps))
        assert (is_zeroed == was_zeroed).mean() > 0.98
