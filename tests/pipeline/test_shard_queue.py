"""The shard queue: every shard is done or given up, and only shards that cause losses are given up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.shard_queue import ShardQueue
from pipeline.storage import ShardSource


def shards(count):
    return [ShardSource(f"s{index}", f"s{index}.tar", f"file:///s{index}.tar", 1) for index in range(count)]


def queue_of(count, max_attempts=3):
    return ShardQueue(shards(count), max_attempts=max_attempts, backoff_s=1.0)


def test_shards_come_in_order_until_none_is_left():
    queue = queue_of(3)
    assert [queue.take([], 0.0).shard_id for _ in range(3)] == ["s0", "s1", "s2"]
    assert queue.take([], 0.0) is None
    assert len(queue) == 0


def test_a_suspect_is_run_alone():
    queue = queue_of(4)
    first, second = queue.take([], 0.0), queue.take([], 0.0)
    assert queue.worker_lost([first, second], "killed") == []
    suspect = queue.take([], 0.0)
    assert suspect in (first, second)
    assert queue.take([suspect], 0.0) is None


def test_busy_workers_go_on_with_fresh_shards_while_suspects_wait_for_an_idle_worker():
    queue = queue_of(4)
    first, second, third = (queue.take([], 0.0) for _ in range(3))
    queue.worker_lost([first, second], "killed")
    fresh = queue.take([third], 0.0)
    assert fresh.shard_id == "s3"
    assert queue.take([third, fresh], 0.0) is None
    assert queue.take([], 0.0) == first


def test_a_shard_that_kills_its_worker_alone_is_given_up_after_its_attempts():
    queue = queue_of(1, max_attempts=3)
    for _ in range(2):
        assert queue.worker_lost([queue.take([], 0.0)], "killed") == []
    given_up = queue.worker_lost([queue.take([], 0.0)], "killed")
    assert [(gone.shard.shard_id, gone.attempts, gone.message) for gone in given_up] == [("s0", 3, "killed")]
    assert len(queue) == 0


def test_a_loss_with_several_shards_in_flight_gives_none_up_even_with_one_attempt():
    queue = queue_of(2, max_attempts=1)
    assert queue.worker_lost([queue.take([], 0.0), queue.take([], 0.0)], "killed") == []
    assert len(queue) == 2


def test_the_loss_of_a_machine_does_not_count_as_an_attempt():
    queue = queue_of(3, max_attempts=1)
    for _ in range(5):
        in_flight = [queue.take([], 0.0), queue.take([], 0.0)]
        assert [shard.shard_id for shard in in_flight] == ["s0", "s1"]
        assert queue.machine_lost(in_flight, "machine lost") == []
    assert len(queue) == 3


def test_a_shard_that_takes_every_machine_down_is_given_up_in_the_end_and_no_other():
    queue = queue_of(3, max_attempts=2)
    done, given_up = [], []
    for _ in range(20):
        in_flight = []
        while len(in_flight) < 2 and (shard := queue.take(in_flight, 0.0)) is not None:
            in_flight.append(shard)
        if any(shard.shard_id == "s0" for shard in in_flight):
            given_up += queue.machine_lost(in_flight, "machine lost")
        else:
            done += in_flight
    assert sorted(shard.shard_id for shard in done) == ["s1", "s2"]
    assert [(gone.shard.shard_id, gone.attempts, gone.message) for gone in given_up] == [
        ("s0", 2, "machine lost")
    ]


def test_a_failed_attempt_waits_longer_each_time():
    queue = queue_of(1, max_attempts=3)
    shard = queue.take([], 0.0)
    assert queue.attempt_failed(shard, "503", now_s=10.0) is None
    assert queue.take([], 10.9) is None
    assert queue.take([], 11.0) == shard
    assert queue.attempt_failed(shard, "503", now_s=20.0) is None
    assert queue.take([], 21.9) is None
    assert queue.take([], 22.0) == shard
    assert queue.attempt_failed(shard, "503", now_s=30.0).attempts == 3


@given(
    poison=st.sets(st.integers(0, 11)),
    count=st.integers(1, 12),
    workers=st.integers(1, 4),
    max_attempts=st.integers(1, 3),
    choices=st.randoms(use_true_random=False),
)
def test_whatever_the_order_of_losses_only_poison_shards_are_given_up_and_all_others_done(
    poison, count, workers, max_attempts, choices
):
    queue = queue_of(count, max_attempts)
    poisonous = {f"s{index}" for index in poison if index < count}
    in_flight = [[] for _ in range(workers)]
    done, given_up = [], []
    for _ in range(10_000):
        for one in in_flight:
            while len(one) < 2 and (shard := queue.take(one, 0.0)) is not None:
                one.append(shard)
        busy = [one for one in in_flight if one]
        if not busy:
            break
        one = choices.choice(busy)
        shard = choices.choice(one)
        if shard.shard_id in poisonous:
            given_up += queue.worker_lost(list(one), "killed")
            one.clear()
        else:
            one.remove(shard)
            done.append(shard.shard_id)
    assert sorted(done) == sorted({f"s{index}" for index in range(count)} - poisonous)
    assert sorted(gone.shard.shard_id for gone in given_up) == sorted(poisonous)
    assert len(queue) == 0


@pytest.mark.parametrize("max_attempts", [1, 2, 4])
def test_a_shard_gets_exactly_its_attempts(max_attempts):
    queue = queue_of(1, max_attempts)
    attempts, now_s = 0, 0.0
    while (shard := queue.take([], now_s)) is not None:
        attempts += 1
        queue.attempt_failed(shard, "unreadable", now_s)
        now_s += 1000.0
    assert attempts == max_attempts
