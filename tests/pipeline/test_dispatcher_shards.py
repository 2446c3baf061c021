"""Shards that fail, hang or cannot be decoded, and an output store that refuses, simulated."""

import pytest

from pipeline.errors import OutputError
from tests.helpers.cluster_scenarios import Scenario, gpu_machines, run_scenario
from tests.helpers.simulated_faults import FailsAttempt, HangsAttempt, RefusesPuts
from tests.helpers.simulated_worker import WorkerTimes

QUICK = WorkerTimes(process_s=1.0, load_s=2.0)


def failing(*shard_ids, **settings):
    return FailsAttempt(shards=frozenset(shard_ids), message="connection refused", **settings)


def hanging(*shard_ids, **settings):
    return HangsAttempt(shards=frozenset(shard_ids), **settings)


def test_a_shard_that_fails_twice_is_done_at_its_third_attempt():
    run = run_scenario(Scenario([400] * 20, gpu_machines(2, 1), [failing("s000003", times=2)], times=QUICK))
    assert len(run.published) == 20 and run.given_up == []


def test_a_shard_that_always_fails_is_given_up_after_its_attempts():
    run = run_scenario(Scenario([400] * 20, gpu_machines(2, 1), [failing("s000003")], times=QUICK))
    assert run.given_up == ["s000003"] and len(run.published) == 19
    assert len(run.host.records.takes["s000003"]) == 3


def test_one_put_that_fails_is_tried_again():
    """Before: the job ended with exit 2."""
    run = run_scenario(Scenario([400] * 40, gpu_machines(2, 1), [RefusesPuts(times=1)], times=QUICK))
    assert len(run.published) == 40 and run.given_up == []


def test_a_store_that_is_down_for_a_moment_costs_no_shard():
    fault = RefusesPuts(from_s=20.0, until_s=30.0)
    run = run_scenario(Scenario([100] * 200, gpu_machines(2, 2), [fault], times=QUICK))
    assert run.error is None
    assert len(run.published) == 200 and run.given_up == []


def test_a_store_that_stays_down_ends_the_run_with_its_error():
    fault = RefusesPuts(from_s=20.0)
    run = run_scenario(Scenario([100] * 2000, gpu_machines(2, 2), [fault], times=QUICK))
    assert isinstance(run.error, OutputError) and "SLOW_DOWN" in str(run.error)
    assert run.duration_s < 120 and run.given_up == []


def test_a_store_that_refuses_one_put_in_ten_costs_no_shard():
    class Every10th(RefusesPuts):
        def on_publishing(self, place, shard, now_s):
            self.struck += 1
            return super().on_publishing(place, shard, now_s) if self.struck % 10 == 0 else None

    run = run_scenario(Scenario([100] * 200, gpu_machines(2, 2), [Every10th()], times=QUICK))
    assert run.error is None
    assert len(run.published) == 200 and run.given_up == []


@pytest.mark.parametrize("workers", [1, 8])
def test_a_shard_of_undecodable_images_at_the_front_stops_nothing(workers):
    """Before: a job of one worker stopped, and the rerun began with the same shard."""
    samples = [3000, *[500] * 60]
    scenario = Scenario(
        samples,
        gpu_machines(1, workers),
        times=QUICK,
        failed_share={"s000000": 1.0},
        run={"error_budget": 0.2},
    )
    run = run_scenario(scenario)
    assert run.end.stopped == ""
    assert len(run.published) == 61


def test_several_shards_over_the_error_budget_stop_the_run_and_are_named():
    failed_share = {f"s{number:06d}": 1.0 for number in range(0, 200, 2)}
    scenario = Scenario([500] * 200, gpu_machines(2, 1), times=QUICK, failed_share=failed_share)
    run = run_scenario(scenario)
    assert "error_budget" in run.end.stopped and "s0.tar" in run.end.stopped
    assert 3 <= run.end.state.shards_done < 40
    # what was in flight is published
    assert len(run.published) == run.end.state.shards_done


def test_too_many_shards_given_up_stop_the_run():
    ids = [f"s{number:06d}" for number in range(20)]
    scenario = Scenario(
        [400] * 200, gpu_machines(2, 1), [failing(*ids)], times=QUICK, run={"max_failed_shards": 2}
    )
    run = run_scenario(scenario)
    assert "max_failed_shards" in run.end.stopped
    assert run.end.state.shards_left > 100


@pytest.mark.parametrize("freezes_worker", [False, True])
def test_a_shard_that_hangs_once_is_done_elsewhere_while_the_others_go_on(freezes_worker):
    """Before: it was noticed only once all other shards were done."""
    fault = hanging("s000003", times=1, freezes_worker=freezes_worker)
    scenario = Scenario([400] * 400, gpu_machines(2, 2), [fault], times=QUICK, run={"stall_timeout_s": 60.0})
    run = run_scenario(scenario)
    assert len(run.published) == 400 and run.given_up == []
    first, second = run.host.records.takes["s000003"]
    assert first.machine_id != second.machine_id
    (put,) = run.host.records.puts["s000003"]
    assert put.when_s < 150
    assert run.efficiency > 0.9


def test_a_shard_that_always_hangs_is_given_up_while_the_others_go_on():
    scenario = Scenario(
        [400] * 400, gpu_machines(2, 2), [hanging("s000003")], times=QUICK, run={"stall_timeout_s": 60.0}
    )
    run = run_scenario(scenario)
    assert run.given_up == ["s000003"]
    assert len(run.published) == 399
    assert run.end.state.left_alone == ()
    assert run.efficiency > 0.85


def test_a_shard_that_is_slow_but_progresses_is_left_alone():
    scenario = Scenario([40_000, *[40] * 20], gpu_machines(1, 1), times=QUICK, run={"stall_timeout_s": 30.0})
    run = run_scenario(scenario)
    assert len(run.published) == 21 and run.given_up == []
    assert run.host.records.work.repeated == 0


def test_nothing_is_published_twice_by_attempts_at_the_same_time():
    ids = [f"s{number:06d}" for number in range(0, 40, 4)]
    scenario = Scenario(
        [400] * 40, gpu_machines(2, 2), [hanging(*ids, times=12)], times=QUICK, run={"stall_timeout_s": 20.0}
    )
    run = run_scenario(scenario)
    assert len(run.published) + len(run.given_up) == 40
    assert all(len(puts) == 1 for puts in run.host.records.puts.values())


def test_a_shard_that_alone_cannot_be_published_is_given_up_in_the_end():
    fault = RefusesPuts(shards=frozenset({"s000003"}))
    run = run_scenario(Scenario([400] * 200, gpu_machines(2, 2), [fault], times=QUICK))
    assert (len(run.published), run.given_up) == (199, ["s000003"])
    assert run.error is None
