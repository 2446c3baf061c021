"""One stream of batches for several shards: what is kept apart, what is shared, and what bounds it."""

import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.annotate.stream import BatchStream
from pipeline.annotate.stream_steps import SampleSteps, StreamLimits
from tests.helpers.stream_bench import SOON_S, Bench, explained, numbered, wait_until


@pytest.fixture
def bench():
    benches = []

    def build(**settings):
        benches.append(Bench(**settings))
        return benches[-1]

    yield build
    for one in benches:
        one.stream.close()


def test_a_batch_holds_samples_of_several_shards_and_each_shard_gets_its_own_back(bench):
    both_are_read = threading.Barrier(2)

    def samples(shard):
        yield from numbered(shard, 3)
        both_are_read.wait(SOON_S)

    here = bench(batch_size=6)
    assert here.run_all({"a": samples("a"), "b": samples("b")}) == [None, None]
    assert [sorted(batch) for batch in here.batches] == [numbered("a", 3) + numbered("b", 3)]
    assert here.written == {"a": explained("a", 3), "b": explained("b", 3)}


def test_outcomes_are_written_in_the_shards_order_though_steps_end_in_any(bench):
    def dawdle(sample):
        time.sleep(0.002 * (sample[1] * 7 % 5))
        return sample

    here = bench(prepare=dawdle, finish=dawdle, shape=lambda sample: sample[1] % 3 or None)
    assert here.run_all({"a": numbered("a", 40), "b": numbered("b", 40)}) == [None, None]
    for shard in "ab":
        assert [outcome[1:] for outcome in here.written[shard]] == numbered(shard, 40)


def test_a_shard_alone_always_gets_the_same_batches(bench):
    def dawdle(sample):
        time.sleep(0.001 * (sample[1] * 7 % 5))
        return sample

    here = bench(prepare=dawdle, batch_size=5)
    here.run("a", numbered("a", 23))
    assert here.batches == [numbered("a", 23)[start : start + 5] for start in range(0, 23, 5)]


def test_reading_runs_ahead_of_the_device_by_no_more_than_the_samples_allowed(bench):
    read, go_on = [], threading.Event()

    def samples(shard):
        for sample in numbered(shard, 50):
            read.append(sample)
            yield sample

    here = bench(max_samples=10, explain=lambda batch: go_on.wait(SOON_S))
    with ThreadPoolExecutor(2) as hands:
        runs = [hands.submit(here.run, shard, samples(shard)) for shard in "ab"]
        # ten are in flight, and each reader has read one more
        wait_until(lambda: len(read) == 12)
        time.sleep(0.05)
        assert len(read) == 12
        go_on.set()
        assert [run.exception(SOON_S) for run in runs] == [None, None]
    assert [len(outcomes) for outcomes in here.written.values()] == [50, 50]


def test_bytes_bound_what_is_held_too_and_a_sample_above_the_bound_is_held_alone(bench):
    held, most_held, lock = {}, [], threading.Lock()

    def enter(sample):
        with lock:
            held[sample] = sizes[sample[1]]
            most_held.append((sum(held.values()), len(held)))
        return sample

    def leave(outcome):
        with lock:
            del held[outcome[1:]]

    sizes = [30, 30, 30, 500, 30, 90, 90, 10, 10, 10, 10, 10, 10]
    here = bench(max_bytes=100, size=lambda sample: sizes[sample[1]], prepare=enter, sink=leave)
    here.run("a", numbered("a", len(sizes)))
    assert here.written["a"] == explained("a", len(sizes))
    assert all(held_bytes <= 100 or samples == 1 for held_bytes, samples in most_held)
    assert max(samples for _, samples in most_held) > 1


@pytest.mark.parametrize("stage", ["read", "prepare", "explain", "finish", "sink"])
def test_an_exception_ends_its_own_shard_and_no_other(bench, stage):
    def fail(sample):
        sample = sample[1:] if stage == "sink" else sample
        if sample == ("bad", 7):
            raise ConnectionError("cut")
        return sample

    def fail_with_batch(batch):
        for sample in batch:
            fail(sample)

    def samples(shard):
        for sample in numbered(shard, 30):
            yield fail(sample) if stage == "read" else sample

    hooks = {} if stage == "read" else {stage: fail_with_batch if stage == "explain" else fail}
    here = bench(max_samples=12, **hooks)
    shards = ("good", "bad", "fine")
    good, bad, fine = here.run_all({shard: samples(shard) for shard in shards})
    assert (good, fine) == (None, None)
    assert isinstance(bad, ConnectionError)
    assert here.written["good"] == explained("good", 30)
    assert here.written["fine"] == explained("fine", 30)
    assert here.written["bad"] == explained("bad", len(here.written["bad"]))
    # and what the failed shard held is free again
    here.run("later", numbered("later", 40))
    assert here.written["later"] == explained("later", 40)


def test_the_shard_of_a_sample_that_fails_on_the_device_is_found_though_others_share_its_batch(bench):
    all_are_read = threading.Barrier(3)

    def samples(shard):
        yield from numbered(shard, 2)
        all_are_read.wait(SOON_S)

    def fail(batch):
        if ("bad", 1) in batch:
            raise ZeroDivisionError

    here = bench(batch_size=6, explain=fail)
    shards = ("bad", "fine", "good")
    bad, fine, good = here.run_all({shard: samples(shard) for shard in shards})
    assert isinstance(bad, ZeroDivisionError)
    assert (fine, good) == (None, None)
    assert (here.written["fine"], here.written["good"]) == (explained("fine", 2), explained("good", 2))


def test_a_device_step_that_loses_a_sample_is_an_error():
    steps = SampleSteps(lambda _: 1, list, lambda s: 1, lambda batch: batch[1:], tuple)
    stream = BatchStream(steps, StreamLimits(threads=1, max_samples=8), lambda shape: 4)
    with pytest.raises(ValueError, match="expected 3 explained samples, received 2"):
        stream.run(range(3), print)
    stream.close()


def test_what_was_prepared_is_let_go_once_it_is_explained():
    class Pixels:
        pass

    prepared, alive = [], []

    def prepare(samples):
        pixels = [Pixels() for _ in samples]
        prepared.extend(map(weakref.ref, pixels))
        return pixels

    def finish(numbers):
        for number in numbers:
            alive.append((number, sum(pixels() is not None for pixels in prepared[: number + 1])))
        return numbers

    numbers = iter(range(12))
    steps = SampleSteps(
        lambda _: 1, prepare, lambda _: 1, lambda batch: [next(numbers) for _ in batch], finish
    )
    stream = BatchStream(steps, StreamLimits(threads=1, max_samples=32, chunk_samples=2), lambda shape: 4)
    stream.run(range(12), print)
    stream.close()
    assert alive == [(number, 0) for number in range(12)]


def test_nothing_is_written_once_a_shard_has_failed(bench):
    released = threading.Event()

    def samples():
        yield from numbered("a", 8)
        released.set()
        raise OSError("gone")

    def wait_and_count(sample):
        released.wait(SOON_S)
        time.sleep(0.02)
        return sample

    here = bench(finish=wait_and_count)
    with pytest.raises(OSError, match="gone"):
        here.run("a", samples())
    count = len(here.written["a"])
    time.sleep(0.1)
    assert len(here.written["a"]) == count


def test_a_failed_shard_ends_only_when_nothing_is_written_any_more(bench):
    writing, go_on = threading.Event(), threading.Event()

    def samples():
        yield ("a", 0)
        assert writing.wait(SOON_S)
        raise OSError("gone")

    def write_slowly(outcome):
        writing.set()
        go_on.wait(SOON_S)

    here = bench(batch_size=1, sink=write_slowly)
    with ThreadPoolExecutor(1) as hands:
        run = hands.submit(here.run, "a", samples())
        assert writing.wait(SOON_S)
        time.sleep(0.05)
        assert not run.done()
        go_on.set()
        assert isinstance(run.exception(SOON_S), OSError)


def test_the_source_of_samples_is_closed_when_its_shard_fails_elsewhere(bench):
    closed = threading.Event()

    def samples():
        try:
            while True:
                yield ("a", 0)
        finally:
            closed.set()

    def fail(sample):
        raise MemoryError

    here = bench(finish=fail)
    with pytest.raises(MemoryError):
        here.run("a", samples())
    assert closed.is_set()


def test_a_part_of_a_batch_goes_when_nothing_can_join_it(bench):
    here = bench(batch_size=100)
    here.run("a", numbered("a", 3))
    assert [len(batch) for batch in here.batches] == [3]


def test_many_shapes_that_fill_the_room_do_not_block_each_other(bench):
    here = bench(batch_size=3, max_samples=4, shape=lambda sample: ("shape", sample[1] % 7))
    assert here.run_all({"a": numbered("a", 30), "b": numbered("b", 30)}) == [None, None]
    assert here.written == {"a": explained("a", 30), "b": explained("b", 30)}
    assert all(len({number % 7 for _, number in batch}) == 1 for batch in here.batches)


def test_a_rare_shape_does_not_starve_beside_one_that_never_ends(bench):
    here = bench(max_wait_s=0.02, shape=lambda sample: sample[0])

    def endless():
        number = 0
        while not here.written.get("rare") and number < 10**6:
            yield ("common", number)
            number += 1

    assert here.run_all({"common": endless(), "rare": [("rare", 0)]}) == [None, None]
    assert here.written["rare"] == [("explained", "rare", 0)]
    assert len(here.written["common"]) < 10**6


def test_there_is_room_for_a_second_shard_at_once_and_for_a_third_when_the_device_ran_dry(bench):
    here, end, slow = bench(batch_size=1, max_readers=3), threading.Event(), threading.Event()

    def opening(shard):
        yield (shard, 0)
        slow.wait(SOON_S)
        yield (shard, 1)
        end.wait(SOON_S)

    def has_room():
        asked = ThreadPoolExecutor(1).submit(here.stream.wait_for_room)
        return bool(wait([asked], timeout=0.1).done)

    with ThreadPoolExecutor(3) as hands:
        runs = [hands.submit(here.run, "a", opening("a"))]
        wait_until(lambda: here.written.get("a"))
        wait_until(has_room)
        runs.append(hands.submit(here.run, "b", opening("b")))
        wait_until(lambda: here.written.get("b"))
        # two readers dawdle while the device has worked and has nothing to do
        wait_until(has_room)
        runs.append(hands.submit(here.run, "c", opening("c")))
        wait_until(lambda: here.written.get("c"))
        assert not has_room()
        slow.set()
        end.set()
        assert [run.exception(SOON_S) for run in runs] == [None] * 3


def test_there_is_no_room_for_another_shard_while_reading_is_far_enough_ahead(bench):
    read, go_on = [], threading.Event()

    def samples():
        for sample in numbered("a", 30):
            read.append(sample)
            yield sample

    here = bench(max_samples=4, explain=lambda batch: go_on.wait(SOON_S))
    with ThreadPoolExecutor(2) as hands:
        run = hands.submit(here.run, "a", samples())
        wait_until(lambda: len(read) == 5)
        room = hands.submit(here.stream.wait_for_room)
        time.sleep(0.05)
        assert not room.done()
        go_on.set()
        assert run.exception(SOON_S) is None
        assert room.exception(SOON_S) is None


def test_closing_fails_the_shards_in_flight_and_waits_for_nobody(bench):
    reading = threading.Event()

    def samples():
        while True:
            reading.set()
            yield ("a", 0)

    here = bench()
    with ThreadPoolExecutor(1) as hands:
        run = hands.submit(here.run, "a", samples())
        assert reading.wait(SOON_S)
        here.stream.close()
        assert "closed" in str(run.exception(SOON_S))
    with pytest.raises(RuntimeError, match="closed"):
        here.run("b", numbered("b", 1))
    here.stream.wait_for_room()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=6),
    batch_size=st.integers(1, 9),
    max_samples=st.integers(1, 20),
    shapes=st.integers(1, 4),
    threads=st.integers(1, 3),
    chunk_samples=st.integers(1, 7),
)
def test_whatever_the_sizes_each_sample_is_explained_once_and_written_in_order(
    sizes, batch_size, max_samples, shapes, threads, chunk_samples
):
    def shape(sample):
        return (sample[1] * 5 + sample[0]) % (shapes + 1) or None

    here = Bench(
        batch_size=batch_size,
        max_samples=max_samples,
        threads=threads,
        shape=shape,
        chunk_samples=chunk_samples,
    )
    errors = here.run_all({shard: numbered(shard, count) for shard, count in enumerate(sizes)})
    here.stream.close()
    assert errors == [None] * len(sizes)
    for shard, count in enumerate(sizes):
        assert [outcome[1:] for outcome in here.written[shard]] == numbered(shard, count)
    on_device = [sample for batch in here.batches for sample in batch]
    everything = [sample for shard, count in enumerate(sizes) for sample in numbered(shard, count)]
    assert sorted(on_device) == [sample for sample in everything if shape(sample) is not None]
    assert all(len(batch) <= batch_size and len(set(map(shape, batch))) == 1 for batch in here.batches)
    assert all(len(chunk) <= chunk_samples for chunk in here.chunks)


def test_samples_are_handed_over_in_chunks(bench):
    here = bench(chunk_samples=8, batch_size=4)
    here.run("a", numbered("a", 20))
    assert sorted(here.chunks) == [numbered("a", 20)[start : start + 8] for start in (0, 8, 16)]
    assert here.batches == [numbered("a", 20)[start : start + 4] for start in range(0, 20, 4)]
    assert here.written["a"] == explained("a", 20)


def test_a_chunk_takes_a_sixteenth_of_the_memory_at_most(bench):
    here = bench(chunk_samples=8, size=lambda sample: 10, max_bytes=16 * 35)
    here.run("a", numbered("a", 9))
    assert sorted(map(len, here.chunks)) == [3, 3, 3]


def test_the_samples_of_a_slow_shard_do_not_wait_for_a_full_chunk(bench):
    read_on = threading.Event()

    def samples():
        yield ("a", 0)
        time.sleep(1.1)
        yield ("a", 1)
        assert read_on.wait(SOON_S)
        yield ("a", 2)

    here = bench(chunk_samples=8, batch_size=1)
    with ThreadPoolExecutor(1) as hands:
        run = hands.submit(here.run, "a", samples())
        wait_until(lambda: here.written.get("a"))
        read_on.set()
        assert run.exception(SOON_S) is None
    assert here.written["a"] == explained("a", 3)


def test_samples_count_as_what_they_take_once_they_are_prepared(bench):
    go_on, read = threading.Event(), []

    def samples():
        for sample in numbered("a", 30):
            read.append(sample)
            yield sample

    here = bench(
        size=lambda sample: 16,
        max_bytes=160,
        prepared_bytes=lambda prepared: 8,
        explain=lambda batch: go_on.wait(SOON_S),
    )
    with ThreadPoolExecutor(1) as hands:
        run = hands.submit(here.run, "a", samples())
        # ten would fit as they are read; prepared ones take half of that, and the reader holds one more
        wait_until(lambda: len(read) >= 19)
        go_on.set()
        assert run.exception(SOON_S) is None
    assert here.written["a"] == explained("a", 30)


def test_the_device_waits_while_explained_samples_fill_half_of_the_memory(bench):
    masks_may_be_made = threading.Event()
    here = bench(
        batch_size=2,
        max_bytes=80,
        explained_bytes=lambda explained: 11,
        finish=lambda sample: masks_may_be_made.wait(SOON_S),
    )
    with ThreadPoolExecutor(1) as hands:
        run = hands.submit(here.run, "a", numbered("a", 20))
        wait_until(lambda: len(here.batches) == 2)
        time.sleep(0.05)
        assert len(here.batches) == 2
        masks_may_be_made.set()
        assert run.exception(SOON_S) is None
    assert here.written["a"] == explained("a", 20)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    max_samples=st.integers(1, 20),
    max_bytes=st.sampled_from([1, 20, 100, 1000]),
    part_bytes=st.sampled_from([1, 30]),
    threads=st.integers(1, 3),
)
def test_whatever_fails_nothing_stays_in_flight_and_other_shards_are_whole(
    seed, counts, max_samples, max_bytes, part_bytes, threads
):
    numbers = random.Random(seed)
    share = {step: numbers.choice([0, 0, 0.01, 0.05]) for step in ("prepare", "explain", "finish", "sink")}

    def may_fail(step):
        def fail(item):
            if numbers.random() < share[step]:
                raise ConnectionError
            return item

        return fail

    here = Bench(
        batch_size=numbers.randint(1, 6),
        shape=lambda sample: (sample[1] * 7 + sample[0]) % 3 or None,
        size=lambda sample: sample[1] % 11,
        prepared_bytes=lambda prepared: prepared[1] % 5,
        explained_bytes=lambda explained: explained[2] % 40,
        chunk_samples=numbers.randint(1, 7),
        max_samples=max_samples,
        max_bytes=max_bytes,
        part_bytes=part_bytes,
        threads=threads,
        **{step: may_fail(step) for step in share},
    )
    errors = here.run_all({shard: numbered(shard, count) for shard, count in enumerate(counts)})
    stream = here.stream
    # what was under way for a shard that failed may end after it
    wait_until(lambda: not (stream._preparing or stream._on_device or stream._finishing))
    held = (stream._samples_in_flight, stream._bytes_in_flight, stream._explained_bytes, stream._readers)
    assert held == (0, 0, 0, 0)
    assert not stream._waiting
    assert not stream._blocked_readers
    here.stream.close()
    for shard, error in enumerate(errors):
        if error is None:
            assert [each[1:] for each in here.written[shard]] == numbered(shard, counts[shard])
        else:
            assert isinstance(error, ConnectionError)
