"""The dispatcher on clusters that grow, shrink and drain, simulated: time passes only there."""

import random
from dataclasses import replace

import pytest

from pipeline.errors import UserError
from tests.helpers.cluster_scenarios import (
    NO_START,
    Scenario,
    gpu_machines,
    one_large_shard_at_the_end,
    run_scenario,
)
from tests.helpers.simulated_faults import anywhere
from tests.helpers.simulated_host import RayTimes
from tests.helpers.simulated_machines import SimulatedMachine
from tests.helpers.simulated_worker import WorkerTimes

QUICK = WorkerTimes(process_s=1.0, load_s=2.0)
HEAD = SimulatedMachine("head", cpus=2)


def joining(machines, gpus, joins_s, **times):
    return [SimulatedMachine(f"late{n}", 4 * gpus, gpus, joins_s=joins_s, **times) for n in range(machines)]


def test_gpus_that_join_after_the_start_do_the_work_and_the_head_gets_no_worker():
    """Before: one worker on the head's two cores did the whole job."""
    run = run_scenario(Scenario([200] * 400, [HEAD, *joining(4, 2, joins_s=1.0)], times=QUICK))
    assert len(run.published) == 400
    assert run.loads_at(lambda place: bool(place.device)) == 8
    assert run.started_at(lambda place: not place.device) == 0
    assert run.efficiency > 0.95


def test_a_run_waits_for_the_first_gpu():
    """Before: exit 1 at once."""
    run = run_scenario(Scenario([1000] * 8, [HEAD, *joining(1, 2, joins_s=120.0)], times=QUICK))
    assert len(run.published) == 8
    assert any("Waiting for" in message for message in run.messages)


def test_a_run_without_any_gpu_ends_with_a_clear_line_after_its_longest_wait():
    run = run_scenario(Scenario([1000], [HEAD], run={"wait_for_devices_s": 300.0}))
    assert isinstance(run.error, UserError)
    assert "wait_for_devices_s" in str(run.error) and "gpus_per_worker" in str(run.error)
    assert 300 <= run.duration_s < 310
    assert "\n" not in str(run.error)


def test_a_wanted_number_of_workers_is_reached_as_machines_join():
    """Before: run.workers=8, 2 GPUs there and 6 that join: 2 workers for ever."""
    machines = [*gpu_machines(1, 2), *joining(3, 2, joins_s=60.0)]
    run = run_scenario(Scenario([2000] * 80, machines, times=QUICK, run={"workers": 8}))
    assert len(run.published) == 80
    assert run.started_at(lambda place: place.machine_id.startswith("late")) >= 6
    assert run.end.state.workers_wanted == 8
    assert run.efficiency > 0.9


def test_a_wanted_number_of_workers_is_not_exceeded():
    machines = [*gpu_machines(1, 2), *joining(3, 2, joins_s=60.0)]
    run = run_scenario(Scenario([2000] * 80, machines, times=QUICK, run={"workers": 3}))
    assert len(run.published) == 80
    assert run.loads_at(anywhere) == 3


def test_workers_that_are_wanted_make_an_autoscaler_add_machines():
    scenario = Scenario(
        [2000] * 60,
        gpu_machines(1, 1),
        times=QUICK,
        reserve=gpu_machines(8, 1)[1:],
        run={"workers": 4},
        ray=RayTimes(machine_added_s=30.0),
    )
    run = run_scenario(scenario)
    assert len(run.published) == 60
    assert len(run.host.records.joined) == 4
    assert run.host.pending == ()


def test_without_a_number_machines_are_asked_for_while_there_is_work_for_them():
    scenario = Scenario([2000] * 60, [HEAD], times=QUICK, reserve=gpu_machines(3, 2))
    run = run_scenario(scenario)
    assert len(run.published) == 60
    assert [machine.node_id for machine in run.host.records.joined] == ["head", "m0", "m1", "m2"]
    assert run.loads_at(lambda place: bool(place.device)) == 6


def test_workers_for_which_a_new_machine_has_more_cores_use_them():
    machines = [*gpu_machines(1, 1), SimulatedMachine("large", 32, 1, joins_s=30.0)]
    run = run_scenario(Scenario([2000] * 40, machines, times=QUICK, run={"workers": 2}))
    assert len(run.published) == 40
    assert run.started_at(lambda place: place.machine_id == "large") >= 1
    assert run.efficiency > 0.9


def test_what_was_in_flight_on_a_lost_machine_is_done_by_others():
    machines = [*gpu_machines(3, 2), SimulatedMachine("short", 8, 2, leaves_s=40.0)]
    run = run_scenario(Scenario([800] * 100, machines, times=QUICK))
    assert len(run.published) == 100 and run.given_up == []
    assert all(len(puts) == 1 for puts in run.host.records.puts.values())
    assert run.end.state.workers_lost == 2
    assert not any(machine.node_id == "short" for machine in run.host.machines())


def test_a_run_goes_on_after_all_machines_were_lost_and_others_join():
    machines = [
        SimulatedMachine("first", 8, 2, leaves_s=40.0),
        SimulatedMachine("second", 8, 2, joins_s=200.0),
    ]
    run = run_scenario(Scenario([800] * 40, machines, times=QUICK))
    assert len(run.published) == 40 and run.given_up == []


def test_a_machine_that_is_drained_gets_no_further_shard_and_loses_no_work_that_was_nearly_done():
    drains_s, leaves_s = 50.0, 110.0
    machines = [*gpu_machines(3, 1), SimulatedMachine("spot", 4, 1, drains_s=drains_s, leaves_s=leaves_s)]
    # 8 s a shard: all of those in flight can be finished in the time until the machine leaves
    run = run_scenario(Scenario([800] * 60, machines, times=QUICK, run={"drain_s": 30.0}))
    at_spot = [
        put.when_s
        for puts in run.host.records.puts.values()
        for put in puts
        if put.place.machine_id == "spot"
    ]
    assert len(run.published) == 60 and run.given_up == []
    assert run.host.records.work.lost_with_machines == 0
    assert max(at_spot) <= drains_s + 30.0
    assert any("drained" in message for message in run.messages)


def test_a_shard_that_a_drained_machine_cannot_finish_is_begun_elsewhere_at_once():
    machines = [*gpu_machines(2, 1), SimulatedMachine("spot", 4, 1, drains_s=50.0, leaves_s=170.0)]
    # 1,000 s a shard
    run = run_scenario(Scenario([100_000] * 3, machines, times=QUICK, run={"drain_s": 30.0}))
    assert len(run.published) == 3
    assert run.host.records.work.lost_with_machines == 0
    assert run.duration_s < 2 * 1000 + 60


def test_a_run_that_is_asked_to_end_finishes_what_is_nearly_done_and_begins_nothing():
    scenario = Scenario(
        [800] * 400, gpu_machines(2, 2), times=QUICK, run={"drain_s": 30.0}, terminated_s=100.0
    )
    run = run_scenario(scenario)
    assert run.end.terminated
    assert 100.0 < run.duration_s <= 131.0
    work = run.host.records.work
    # what was in flight, at most four shards on each of four workers, was finished
    assert work.published > 0 and work.repeated == 0
    assert len(run.published) == run.end.state.shards_done
    assert len(run.host.records.takes) == len(run.published)
    assert run.end.state.shards_left == 400 - len(run.published)


def test_a_run_that_is_asked_to_end_does_not_wait_for_a_shard_that_takes_too_long():
    scenario = Scenario(
        [100_000] * 8, gpu_machines(1, 2), times=QUICK, run={"drain_s": 30.0}, terminated_s=100.0
    )
    run = run_scenario(scenario)
    assert run.end.terminated and run.published == []
    assert run.duration_s <= 110.0


def test_no_shard_is_begun_beside_the_one_that_ends_last():
    """Before: 11 to 12 s, where 8 s are possible."""
    run = run_scenario(one_large_shard_at_the_end())
    assert len(run.published) == 81
    assert run.duration_s < 8.5
    assert run.efficiency > 0.95


@pytest.mark.parametrize("is_fair", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_workers_end_at_about_the_same_time_with_shards_of_very_different_sizes(seed, is_fair):

    rng = random.Random(seed)
    samples = [max(1, min(6000, round(200 * rng.lognormvariate(0, 1.2)))) for _ in range(200)]
    scenario = Scenario(samples, gpu_machines(2, 4), times=replace(NO_START, is_fair=is_fair))
    run = run_scenario(scenario)
    assert len(run.published) == 200
    assert run.efficiency > 0.95


def test_a_lost_worker_costs_at_most_the_shards_that_a_worker_may_have_in_flight():
    machines = [*gpu_machines(3, 1), SimulatedMachine("short", 4, 1, leaves_s=70.0)]
    run = run_scenario(Scenario([100] * 300, machines, times=QUICK, run={"shards_in_flight": 2}))
    (death,) = run.host.records.deaths
    assert 1 <= len(death.shards) <= 2
    assert len(run.published) == 300
