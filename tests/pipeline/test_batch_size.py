"""`run.batch_size: auto`: the search, on devices whose speed and memory are known."""

import pytest
import torch

from legrad.canvases import Views
from legrad.images import ImageTransform
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.batch_size import find_batch_size, search_batch_size
from pipeline.annotate.model import load_explainer
from pipeline.annotate.trial import TrialSamples
from pipeline.errors import UserError
from tests.helpers.corpus import demo_job, write_corpus


def device(*, fits, overhead_s=0.0, image_s=0.001, parallel=1):
    """Seconds of a step on a device that computes so many images side by side and holds so many at all."""

    def step_s(images):
        if images > fits:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return overhead_s + -(-images // parallel) * image_s

    return step_s


def test_the_batch_grows_as_long_as_the_device_computes_more_side_by_side():
    assert search_batch_size(device(fits=10**6, parallel=128)) == 128


def test_no_larger_batch_is_taken_where_it_gains_nothing():
    assert search_batch_size(device(fits=10**6, parallel=1)) == 8


def test_the_cost_of_a_step_is_spread_over_more_images():
    size = search_batch_size(device(fits=10**6, overhead_s=0.1, image_s=0.001))
    time_lost = 0.1 / (0.1 + size * 0.001)
    assert 512 <= size <= 1024
    assert time_lost < 0.2


@pytest.mark.parametrize(("fits", "size"), [(100, 64), (64, 64), (8, 8), (3, 2), (1, 1), (0, 1)])
def test_where_memory_ends_first_the_largest_size_that_fits_is_taken(fits, size):
    assert search_batch_size(device(fits=fits, parallel=10**6)) == size


class FakeEngine:
    """An engine on a device that holds so many images, and computes 64 of them side by side."""

    batches_at_once = 2

    def __init__(self, fits):
        self.fits, self.batch_size, self.texts = fits, 8, []

    def measure_s(self, batches):
        assert len(batches) == self.batches_at_once
        assert len({len(batch) for batch in batches}) == 1
        images = sum(map(len, batches))
        self.texts += [sample.prompts[0].text for batch in batches for sample in batch]
        return device(fits=self.fits, parallel=64)(images)


@pytest.mark.parametrize(("fits", "size"), [(10**6, 32), (40, 16)])
def test_the_trial_has_as_many_batches_on_the_device_as_the_job_and_no_text_twice(fits, size):
    transform = ImageTransform(32, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    engine = FakeEngine(fits)
    trial = TrialSamples(transform, Views(), 1)
    assert find_batch_size(engine, trial, torch.device("cuda")) == size
    assert len(set(engine.texts)) == len(engine.texts)


def test_on_a_cpu_auto_is_a_fixed_size(tmp_path):
    config = demo_job(write_corpus(tmp_path, 1, 20), tmp_path / "out", run={"batch_size": "auto"})
    explainer = load_explainer(config.model, "cpu")
    encode, sizes = explainer.encode, []

    def counted(images, **options):
        sizes.append(len(images))
        return encode(images, **options)

    explainer.encode = counted
    annotator = ShardAnnotator(config, explainer, decode_threads=1, metadata={})
    counts = annotator.annotate(storage.list_shards(config.input.shards)[0]).counts
    annotator.close()
    assert (sizes, counts.annotated) == ([8, 8, 4], 20)


def test_a_batch_size_is_a_number_or_auto():
    with pytest.raises(UserError, match=r"run\.batch_size"):
        demo_job([], "out", run={"batch_size": "many"})
