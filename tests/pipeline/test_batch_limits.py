"""How many images share a batch, after batches that did not fit."""

from itertools import pairwise

from pipeline.annotate.batch_limits import BATCHES_UNTIL_RETRY, BatchLimits


def run(limits, fits, batches):
    """Run full batches of a shape on a device that holds so many images; return the sizes tried."""
    tried = []
    for _ in range(batches):
        images = limits.of("shape")
        tried.append(images)
        if images > fits:
            limits.failed("shape", images)
        else:
            limits.fitted("shape", images)
    return tried


def test_a_limit_is_halved_until_a_batch_fits():
    limits = BatchLimits(64)
    assert run(limits, 20, 4) == [64, 32, 16, 16]
    assert limits.of("another shape") == 64


def test_a_limit_doubles_after_many_batches_and_stays_where_that_fits():
    limits = BatchLimits(64)
    run(limits, 20, 3)
    tried = run(limits, 100, 2 * BATCHES_UNTIL_RETRY + 10)
    assert tried[-1] == limits.of("shape") == 64
    assert sorted(set(tried)) == [16, 32, 64]


def test_a_size_that_never_fits_is_tried_more_and_more_rarely():
    limits = BatchLimits(64)
    tried = run(limits, 32, 20 * BATCHES_UNTIL_RETRY)
    failures = [position for position, images in enumerate(tried) if images > 32]
    gaps = [after - before for before, after in pairwise(failures)]
    assert gaps == [BATCHES_UNTIL_RETRY * 2**number + 1 for number in range(len(gaps))]
    assert len(gaps) == 4


def test_batches_below_the_limit_neither_raise_nor_lower_it():
    limits = BatchLimits(64)
    limits.failed("shape", 64)
    for _ in range(2 * BATCHES_UNTIL_RETRY):
        limits.fitted("shape", 31)
    assert limits.of("shape") == 32


def test_a_limit_never_exceeds_the_batch_size_and_never_falls_below_one():
    limits = BatchLimits(48)
    limits.failed("shape", 40)
    run(limits, 100, 4 * BATCHES_UNTIL_RETRY)
    assert limits.of("shape") == 48
    assert run(BatchLimits(2), 0, 3) == [2, 1, 1]


def test_it_is_known_whether_as_many_images_have_fitted():
    limits = BatchLimits(64)
    limits.fitted("shape", 20)
    assert limits.has_fitted("shape", 20)
    assert not limits.has_fitted("shape", 21)
    assert not limits.has_fitted("another shape", 1)
    limits.failed("shape", 16)
    assert not limits.has_fitted("shape", 16)
