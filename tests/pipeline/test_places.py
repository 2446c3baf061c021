"""Places: what is at fault, a shard or the machine or device where workers die with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.hosting import Place
from pipeline.run.places import FORGIVEN_AFTER_SHARDS, LOAD_FAILURES, STRIKES, Places

BAD = Place("machine 1", "10.0.0.1", "3")
BESIDE = Place("machine 1", "10.0.0.1", "4")
GOOD = Place("machine 2", "10.0.0.2", "0")


def lose(places, place, *names, at=GOOD, is_device_fault=False):
    """Lose a worker with each of some shards in flight in turn; another place then finishes each shard."""
    decisions = []
    for name in names:
        places.worker_lost(place, [name], is_device_fault=is_device_fault)
        decisions += places.shard_done(at, name)
    return decisions


def test_a_place_is_left_alone_after_losses_with_different_shards_that_another_one_finished():
    places = Places()
    assert lose(places, BAD, "a", "b") == []
    assert not places.is_left_alone(BAD)
    (decision,) = lose(places, BAD, "c")
    assert decision.place == BAD
    assert str(decision) == "10.0.0.1, GPU 3: worker lost 3 times with shards that others finished"
    assert places.is_left_alone(BAD)
    assert not places.is_left_alone(BESIDE)
    assert not places.is_left_alone(GOOD)


def test_losses_with_the_same_shard_again_and_again_are_the_shards_fault():
    places = Places()
    for _ in range(10):
        places.worker_lost(BAD, ["a"])
    assert places.shard_done(GOOD, "a") == []
    assert not places.is_left_alone(BAD)


def test_a_place_that_finishes_the_shard_itself_is_not_at_fault():
    places = Places()
    for name in "abcdef":
        places.worker_lost(BAD, [name])
        places.shard_done(BAD, name)
        assert places.shard_done(GOOD, name) == []
    assert not places.is_left_alone(BAD)


def test_a_loss_with_several_shards_counts_once_all_of_them_were_finished_elsewhere():
    places = Places()
    lose(places, BAD, "a", "b")
    places.worker_lost(BAD, ["c", "d", "e"])
    assert places.shard_done(GOOD, "c") == []
    assert places.shard_done(GOOD, "d") == []
    assert [decision.place for decision in places.shard_done(GOOD, "e")] == [BAD]


def test_shards_that_are_given_up_shut_no_place():
    places = Places()
    for place in (BAD, BESIDE, GOOD):
        for name in "abcdefgh":
            places.worker_lost(place, [f"poison {name}", f"innocent {place.device} {name}"])
    for name in "abcdefgh":
        places.shard_given_up(f"poison {name}")
        for place in (BAD, BESIDE, GOOD):
            assert places.shard_done(Place("machine 3"), f"innocent {place.device} {name}") == []
    assert places.left_alone == ()


def test_a_fault_of_cuda_counts_more_against_its_device_and_not_against_the_machine():
    places = Places()
    decisions = lose(places, BAD, "a", "b", is_device_fault=True)
    assert [str(one) for one in decisions] == [
        "10.0.0.1, GPU 3: CUDA failed 2 times with shards that others finished"
    ]
    assert not places.is_left_alone(BESIDE)


def test_a_machine_is_left_alone_when_two_of_its_devices_are():
    places = Places()
    lose(places, BAD, "a", "b", "c")
    *_, decision = lose(places, BESIDE, "d", "e", "f")
    assert decision.place == Place("machine 1")
    assert str(decision) == "10.0.0.1: 2 of its devices are left alone"
    assert places.is_left_alone(Place("machine 1", device="7"))
    assert not places.is_left_alone(GOOD)


def test_where_workers_are_lost_everywhere_now_and_then_no_place_is_at_fault():
    places = Places()
    spots = [Place(f"machine {number}") for number in range(4)]
    for round_ in range(10):
        for number, spot in enumerate(spots):
            assert lose(places, spot, f"{round_} {number}", at=spots[(number + 1) % 4]) == []
    assert places.left_alone == ()


def test_a_place_that_has_finished_many_shards_since_is_forgiven():
    places = Places()
    lose(places, BAD, "a", "b")
    for number in range(FORGIVEN_AFTER_SHARDS):
        places.shard_done(BAD, f"s{number}")
    assert not places.is_on_probation(BAD)
    assert lose(places, BAD, "c") == []


def test_a_place_is_in_question_until_others_have_tried_what_was_lost_there():
    places = Places()
    for name in "abc":
        assert not places.is_in_question(BAD)
        places.worker_lost(BAD, [name])
        assert places.is_on_probation(BAD)
    assert places.is_in_question(BAD)
    for name in "abc":
        places.shard_given_up(name)
    assert not places.is_on_probation(BAD)


def test_a_place_where_the_model_cannot_be_loaded_rests_and_is_left_alone_where_others_could():
    places = Places()
    for number in range(LOAD_FAILURES + 2):
        assert places.load_failed(BAD, "out of memory", 100.0 * number) is None
        assert places.rests(BAD, 100.0 * number + 1.9)
    places.loaded(GOOD)
    decision = places.load_failed(BAD, "out of memory", 0.0)
    assert str(decision) == "10.0.0.1, GPU 3: the model could not be loaded 3 times: out of memory"
    assert places.is_left_alone(BAD)


def test_a_place_where_attempts_fail_in_a_row_rests_longer_each_time_and_never_more_than_minutes():
    places, rests = Places(), []
    for now_s in range(0, 20_000, 1000):
        for _ in range(7):
            # of several shards in flight, those that fail during a rest do not make it longer
            places.attempt_failed(BAD, float(now_s))
            rests.append(next(s for s in range(1000) if not places.rests(BAD, float(now_s + s))))
    assert rests[:8] == [0, 2, 2, 2, 2, 2, 2, 4]
    assert rests[-1] == 300
    places.shard_done(BAD, "a")
    places.attempt_failed(BAD, 30_000.0)
    assert not places.rests(BAD, 30_000.0)


@given(
    poison=st.integers(0, 5),
    losses=st.lists(
        st.tuples(st.integers(0, 3), st.sets(st.integers(0, 11), min_size=1, max_size=4)), max_size=40
    ),
)
def test_whatever_poison_shards_do_no_place_is_left_alone_for_them(poison, losses):
    places = Places()
    spots = [Place(f"machine {number // 2}", device=str(number)) for number in range(4)]
    for spot, names in losses:
        # every loss has a poison shard in flight
        places.worker_lost(spots[spot], {*map(str, names), f"poison {poison}"})
    for name in range(12):
        for spot in spots:
            assert places.shard_done(spot, str(name)) == []
    places.shard_given_up(f"poison {poison}")
    assert places.left_alone == ()


@pytest.mark.parametrize("count", [1, 2, 8])
def test_good_places_are_never_left_alone_beside_a_bad_one(count):
    places = Places()
    good = [Place(f"good {number}") for number in range(count)]
    bad = Place("bad")
    for number in range(STRIKES):
        lose(places, bad, f"s{number}", at=good[number % count])
    assert [decision.place for decision in places.left_alone] == [bad]
