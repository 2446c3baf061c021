"""The shard queue: every shard is done or given up, and only shards that cause losses are given up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.hosting import Place
from pipeline.run.shard_queue import ShardQueue
from pipeline.storage import ShardSource

HERE = Place("machine 1", device="0")
BESIDE = Place("machine 1", device="1")
ELSEWHERE = Place("machine 2", device="0")


def shard_of(name, size_bytes=1):
    return ShardSource(name, f"{name}.tar", f"file:///{name}.tar", size_bytes)


def shards(count):
    return [shard_of(f"s{index}") for index in range(count)]


def queue_of(count, max_attempts=3):
    return ShardQueue(shards(count), max_attempts=max_attempts, backoff_s=1.0)


def test_shards_of_one_size_come_in_order_until_none_is_left():
    queue = queue_of(3)
    assert [queue.take(HERE, [], 0.0).shard_id for _ in range(3)] == ["s0", "s1", "s2"]
    assert queue.take(HERE, [], 0.0) is None
    assert len(queue) == 0


def test_a_suspect_is_run_alone():
    queue = queue_of(4)
    first, second = queue.take(HERE, [], 0.0), queue.take(HERE, [], 0.0)
    assert queue.worker_lost(HERE, [first, second], "killed") == []
    suspect = queue.take(HERE, [], 0.0)
    assert suspect in (first, second)
    assert queue.take(HERE, [suspect], 0.0) is None


def test_busy_workers_go_on_with_fresh_shards_while_suspects_wait_for_an_idle_worker():
    queue = queue_of(4)
    first, second, third = (queue.take(HERE, [], 0.0) for _ in range(3))
    queue.worker_lost(HERE, [first, second], "killed")
    fresh = queue.take(HERE, [third], 0.0)
    assert fresh.shard_id == "s3"
    assert queue.take(HERE, [third, fresh], 0.0) is None
    assert queue.take(HERE, [], 0.0) == first


def test_a_shard_that_kills_its_worker_alone_is_given_up_after_its_attempts():
    queue = queue_of(1, max_attempts=3)
    for _ in range(2):
        assert queue.worker_lost(HERE, [queue.take(HERE, [], 0.0)], "killed") == []
    given_up = queue.worker_lost(HERE, [queue.take(HERE, [], 0.0)], "killed")
    assert [(gone.shard.shard_id, gone.attempts, gone.message) for gone in given_up] == [("s0", 3, "killed")]
    assert len(queue) == 0


def test_a_loss_with_several_shards_in_flight_gives_none_up_even_with_one_attempt():
    queue = queue_of(2, max_attempts=1)
    assert queue.worker_lost(HERE, [queue.take(HERE, [], 0.0), queue.take(HERE, [], 0.0)], "killed") == []
    assert len(queue) == 2


def test_the_loss_of_a_machine_does_not_count_as_an_attempt():
    queue = queue_of(3, max_attempts=1)
    for _ in range(5):
        in_flight = [queue.take(HERE, [], 0.0), queue.take(HERE, [], 0.0)]
        assert [shard.shard_id for shard in in_flight] == ["s0", "s1"]
        assert queue.machine_lost(HERE, in_flight, "machine lost") == []
    assert len(queue) == 3


def test_a_shard_that_takes_every_machine_down_is_given_up_in_the_end_and_no_other():
    queue = queue_of(3, max_attempts=2)
    done, given_up = [], []
    for _ in range(20):
        in_flight = []
        while len(in_flight) < 2 and (shard := queue.take(HERE, in_flight, 0.0)) is not None:
            in_flight.append(shard)
        if any(shard.shard_id == "s0" for shard in in_flight):
            given_up += queue.machine_lost(HERE, in_flight, "machine lost")
        else:
            done += in_flight
    assert sorted(shard.shard_id for shard in done) == ["s1", "s2"]
    assert [(gone.shard.shard_id, gone.attempts, gone.message) for gone in given_up] == [
        ("s0", 2, "machine lost")
    ]


def test_a_failed_attempt_waits_longer_each_time():
    queue = queue_of(1, max_attempts=3)
    shard = queue.take(HERE, [], 0.0)
    assert queue.attempt_failed(HERE, shard, "503", now_s=10.0) is None
    assert queue.take(HERE, [], 10.9) is None
    assert queue.take(HERE, [], 11.0) == shard
    assert queue.attempt_failed(HERE, shard, "503", now_s=20.0) is None
    assert queue.take(HERE, [], 21.9) is None
    assert queue.take(HERE, [], 22.0) == shard
    assert queue.attempt_failed(HERE, shard, "503", now_s=30.0).attempts == 3


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
            while len(one) < 2 and (shard := queue.take(HERE, one, 0.0)) is not None:
                one.append(shard)
        busy = [one for one in in_flight if one]
        if not busy:
            break
        one = choices.choice(busy)
        shard = choices.choice(one)
        if shard.shard_id in poisonous:
            given_up += queue.worker_lost(HERE, list(one), "killed")
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
    while (shard := queue.take(HERE, [], now_s)) is not None:
        attempts += 1
        queue.attempt_failed(HERE, shard, "unreadable", now_s)
        now_s += 1000.0
    assert attempts == max_attempts


def test_the_largest_shards_come_first_and_those_of_unknown_size_count_as_the_usual_one():
    queue = ShardQueue(
        [shard_of("small", 1), shard_of("unknown", None), shard_of("large", 9)], max_attempts=1, backoff_s=1.0
    )
    assert queue.bytes_left == 15
    assert [queue.take(HERE, [], 0.0).shard_id for _ in range(3)] == ["large", "unknown", "small"]
    assert queue.bytes_left == 0


def test_a_worker_that_must_not_end_last_gets_the_largest_shard_that_is_small_enough():
    queue = ShardQueue([shard_of(f"s{size}", size) for size in (9, 5, 3, 1)], max_attempts=1, backoff_s=1.0)
    assert [queue.take(HERE, [], 0.0, most_bytes=most).shard_id for most in (4.0, 4.0, 8.9)] == [
        "s3",
        "s1",
        "s5",
    ]
    assert queue.take(HERE, [], 0.0, most_bytes=8.9) is None


@pytest.mark.parametrize("others", [[ELSEWHERE], [BESIDE, ELSEWHERE]])
def test_a_suspect_runs_on_another_machine_where_there_is_one(others):
    queue = queue_of(1)
    queue.worker_lost(HERE, [queue.take(HERE, [], 0.0)], "killed", others)
    assert queue.take(HERE, [], 0.0, others=others) is None
    assert queue.take(BESIDE, [], 0.0, others=[HERE, ELSEWHERE]) is None
    assert queue.take(ELSEWHERE, [], 0.0, others=[HERE, BESIDE]).shard_id == "s0"


def test_without_another_machine_a_suspect_runs_on_another_device_and_without_that_where_it_was():
    queue = queue_of(1)
    queue.worker_lost(HERE, [queue.take(HERE, [], 0.0)], "killed", [BESIDE])
    assert queue.take(HERE, [], 0.0, others=[BESIDE]) is None
    assert queue.take(HERE, [], 0.0).shard_id == "s0"


@pytest.mark.parametrize("how", ["worker_lost", "attempt_failed"])
@pytest.mark.parametrize("other", [BESIDE, ELSEWHERE])
def test_a_shard_is_given_up_only_after_it_failed_at_two_places_where_there_are_two(how, other):
    queue = queue_of(1, max_attempts=2)
    shard = queue.take(HERE, [], 0.0)

    def fail(place, now_s):
        if how == "worker_lost":
            return queue.worker_lost(place, [shard], "killed", [HERE, other])
        gone = queue.attempt_failed(place, shard, "503", now_s, [HERE, other])
        return [] if gone is None else [gone]

    for attempt in range(5):
        assert fail(HERE, 100.0 * attempt) == []
        assert queue.take(other, [], 100.0 * attempt + 99.0, others=[HERE]) == shard
    assert [gone.attempts for gone in fail(other, 1000.0)] == [6]


def test_attempts_at_a_place_that_turned_out_to_be_at_fault_do_not_count():
    queue = queue_of(1, max_attempts=2)
    shard = queue.take(HERE, [], 0.0)
    queue.worker_lost(HERE, [shard], "killed", [ELSEWHERE])
    queue.forget_attempts_at(Place("machine 1"))
    assert queue.take(ELSEWHERE, [], 0.0, others=[HERE]) == shard
    assert queue.worker_lost(ELSEWHERE, [shard], "killed", [HERE]) == []


def test_where_a_sound_place_may_try_a_suspect_no_place_in_doubt_does():
    queue = queue_of(1)
    queue.worker_lost(HERE, [queue.take(HERE, [], 0.0)], "killed", [BESIDE, ELSEWHERE])
    third = Place("machine 3", device="0")
    others = [HERE, third]
    assert queue.take(ELSEWHERE, [], 0.0, others=others, sound=[third]) is None
    assert queue.take(ELSEWHERE, [], 0.0, others=others, sound=[HERE]).shard_id == "s0"


def test_a_shard_that_is_put_back_counts_no_attempt_and_is_tried_elsewhere_first():
    queue = queue_of(1, max_attempts=1)
    shard = queue.take(HERE, [], 0.0)
    queue.put_back(shard, 5.0, avoided=HERE)
    assert queue.take(ELSEWHERE, [], 4.9, others=[HERE]) is None
    assert queue.take(HERE, [], 5.0, others=[ELSEWHERE]) is None
    assert queue.take(ELSEWHERE, [], 5.0, others=[HERE]) == shard


def test_the_wait_between_attempts_is_bounded():
    queue = queue_of(1, max_attempts=100)
    now_s = 0.0
    for _ in range(20):
        shard = queue.take(HERE, [], now_s)
        assert queue.attempt_failed(HERE, shard, "unreadable", now_s) is None
        now_s += 60.0


def test_a_place_takes_the_suspect_that_did_not_fail_there():
    queue = queue_of(2)
    first, second = queue.take(HERE, [], 0.0), queue.take(ELSEWHERE, [], 0.0)
    queue.worker_lost(HERE, [first], "killed")
    queue.worker_lost(ELSEWHERE, [second], "killed")
    assert queue.take(HERE, [], 0.0) == second
    assert queue.take(ELSEWHERE, [], 0.0) == first
