"""Which samples go to the device together."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.annotate.queues import WaitingSamples


def waiting(entries, limit=3, max_wait_s=10.0):
    samples = WaitingSamples(lambda shape: limit, max_wait_s)
    for shape, item, now_s in entries:
        samples.add(shape, item, now_s)
    return samples


def test_a_full_batch_goes_in_the_order_of_arrival_and_the_rest_waits():
    samples = waiting([("wide", number, 0.0) for number in range(4)])
    assert samples.take(0.0, flush=False) == [0, 1, 2]
    assert samples.take(0.0, flush=False) == []
    assert len(samples) == 1


def test_shapes_never_share_a_batch():
    samples = waiting([("wide", 1, 0.0), ("tall", 2, 0.0), ("wide", 3, 0.0)])
    assert samples.take(0.0, flush=False) == []
    assert samples.take(0.0, flush=True) == [1, 3]
    assert samples.take(0.0, flush=True) == [2]
    assert samples.take(0.0, flush=True) == []


def test_of_several_full_batches_the_one_that_waited_longest_goes_first():
    samples = waiting([("tall", 0, 0.0), *(("wide", number, 1.0) for number in (1, 2, 3))])
    samples.add("tall", 4, 2.0)
    samples.add("tall", 5, 2.0)
    assert samples.take(2.0, flush=False) == [0, 4, 5]


def test_a_rare_shape_that_waited_too_long_goes_before_full_batches():
    samples = waiting([("rare", "r", 0.0), *(("common", number, 5.0) for number in range(6))])
    assert samples.take(9.0, flush=False) == [0, 1, 2]
    assert samples.take(10.0, flush=False) == ["r"]


def test_the_longest_wait_ends_when_the_oldest_sample_has_waited_too_long():
    samples = waiting([("wide", 1, 0.0), ("tall", 2, 4.0)])
    assert samples.longest_wait_s(3.0) == 7.0
    assert samples.longest_wait_s(30.0) == 0.0
    assert samples.take(10.0, flush=False) == [1]
    assert samples.longest_wait_s(10.0) == 4.0
    assert waiting([]).longest_wait_s(0.0) is None


def test_a_limit_that_is_lowered_holds_for_the_next_batch():
    limits = {"wide": 4}
    samples = WaitingSamples(limits.__getitem__, 10.0)
    for number in range(6):
        samples.add("wide", number, 0.0)
    assert samples.take(0.0, flush=False) == [0, 1, 2, 3]
    limits["wide"] = 1
    assert samples.take(0.0, flush=False) == [4]


def test_what_is_discarded_is_never_taken():
    samples = waiting([("wide", number, 0.0) for number in range(5)])
    samples.discard(lambda number: number % 2 == 0)
    assert samples.take(0.0, flush=True) == [1, 3]
    samples.discard(lambda number: True)
    assert len(samples) == 0


@given(
    arrivals=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=60),
    limit=st.integers(1, 5),
)
def test_every_sample_goes_once_in_a_batch_of_its_shape_within_the_limit(arrivals, limit):
    samples = WaitingSamples(lambda shape: limit, max_wait_s=4.0)
    now_s, batches = 0.0, []
    for number, (shape, pause_s, flush) in enumerate(arrivals):
        now_s += pause_s
        samples.add(shape, (shape, number), now_s)
        batches.append(samples.take(now_s, flush=flush))
    while batch := samples.take(now_s, flush=True):
        batches.append(batch)
    taken = [item for batch in batches for item in batch]
    assert sorted(taken) == sorted((shape, number) for number, (shape, _, _) in enumerate(arrivals))
    assert all(len(batch) <= limit and len({shape for shape, _ in batch}) <= 1 for batch in batches)
    for shape in "abc":
        in_order = [number for taken_shape, number in taken if taken_shape == shape]
        assert in_order == sorted(in_order)
