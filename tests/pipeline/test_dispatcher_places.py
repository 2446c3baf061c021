"""Machines and devices that are at fault, simulated: they are left alone, and no good shard is given up."""

from dataclasses import replace

import pytest

from pipeline.errors import PipelineError, ScratchError, UserError
from pipeline.run.worker import LoadOutcome
from tests.helpers.cluster_scenarios import (
    Scenario,
    gpu_machines,
    large_cluster,
    one_bad_machine_of_four,
    run_scenario,
)
from tests.helpers.simulated_faults import Dies, FailsAttempt, FailsToLoad, Hangs, KillsWorker, at
from tests.helpers.simulated_machines import SimulatedMachine
from tests.helpers.simulated_worker import WorkerTimes

QUICK = WorkerTimes(process_s=1.0, load_s=2.0)


def poison(*shard_ids, after_s=1.0):
    return KillsWorker(shards=frozenset(shard_ids), after_s=after_s, cause="SIGSEGV")


def test_a_machine_that_kills_its_workers_is_left_alone_and_costs_no_shard():
    """Before: 29 of 240 good shards were given up, and the bad machine got 118 workers."""
    run = run_scenario(one_bad_machine_of_four())
    assert len(run.published) == 240 and run.given_up == []
    assert run.loads_at(at("m3")) <= 5
    (left_alone,) = run.end.state.left_alone
    assert "host-m3" in left_alone
    assert any("host-m3" in message and "alone" in message for message in run.messages)
    assert run.efficiency > 0.95


def test_one_bad_gpu_of_64_is_left_alone_and_the_others_of_its_machine_are_used():
    """Before: 154 good shards given up in 5 hours."""
    run = run_scenario(large_cluster(shards=1000))
    assert len(run.published) == 1000 and run.given_up == []
    assert run.loads_at(at("m0", "5")) <= 5
    (left_alone,) = run.end.state.left_alone
    assert "host-m0, GPU 5" in left_alone
    assert run.efficiency > 0.95


def test_a_machine_on_which_several_devices_kill_their_workers_is_left_alone_as_a_whole():
    scenario = Scenario([400] * 400, gpu_machines(4, 4), [KillsWorker(at("m2"), after_s=1.0)], times=QUICK)
    run = run_scenario(scenario)
    assert len(run.published) == 400 and run.given_up == []
    assert any("host-m2:" in text for text in run.end.state.left_alone)
    assert run.loads_at(at("m2")) <= 16


def test_poison_shards_are_given_up_after_deaths_on_two_machines_and_shut_no_machine():
    bad = {"s000003", "s000030", "s000031", "s000070"}
    scenario = Scenario([400] * 120, gpu_machines(4, 1), [poison(*bad)], times=QUICK)
    run = run_scenario(scenario)
    assert set(run.given_up) == bad
    assert len(run.published) == 116
    assert run.end.state.left_alone == ()
    for shard_id in bad:
        assert len({place.machine_id for place in run.host.records.takes[shard_id]}) > 1


def test_a_poison_shard_is_given_up_where_there_is_only_one_place():
    run = run_scenario(Scenario([400] * 12, gpu_machines(1, 1), [poison("s000003")], times=QUICK))
    assert run.given_up == ["s000003"]
    assert len(run.published) == 11


def test_a_bad_machine_and_poison_shards_are_told_apart():
    bad = {"s000003", "s000031"}
    faults = [poison(*bad), KillsWorker(at("m1"), after_s=1.0)]
    run = run_scenario(Scenario([400] * 120, gpu_machines(4, 1), faults, times=QUICK))
    assert set(run.given_up) == bad
    assert len(run.published) == 118
    (left_alone,) = run.end.state.left_alone
    assert "host-m1" in left_alone


def test_a_worker_that_dies_now_and_then_is_replaced_and_its_place_kept():
    faults = [KillsWorker(shards=frozenset({f"s{n:06d}"}), times=1, after_s=2.0) for n in range(0, 400, 40)]
    run = run_scenario(Scenario([400] * 400, gpu_machines(2, 2), faults, times=QUICK))
    assert len(run.published) == 400 and run.given_up == []
    assert run.end.state.left_alone == ()
    assert run.end.state.workers_lost == 10


def test_a_fault_of_cuda_counts_against_the_device():
    fault = FailsAttempt(at("m1", "0"), status="device", after_s=1.0, message="uncorrectable ECC error")
    run = run_scenario(Scenario([400] * 200, gpu_machines(2, 4), [fault], times=QUICK))
    assert len(run.published) == 200 and run.given_up == []
    (left_alone,) = run.end.state.left_alone
    assert "host-m1, GPU 0" in left_alone
    assert run.loads_at(at("m1", "0")) <= 4


def test_one_worker_that_cannot_load_its_model_does_not_end_the_job():
    """Before: the job ended with the first exception of any worker."""
    outcome = LoadOutcome("the hub answered 429", is_user_error=True)
    run = run_scenario(
        Scenario([400] * 80, gpu_machines(2, 2), [FailsToLoad(at("m0", "1"), times=1, outcome=outcome)])
    )
    assert len(run.published) == 80 and run.given_up == []
    assert run.end.state.left_alone == ()


@pytest.mark.parametrize(
    "outcome", [LoadOutcome("CUDA error: ECC", is_device_fault=True), Dies(1.0, "SIGKILL")]
)
def test_a_device_on_which_no_model_loads_is_left_alone(outcome):
    fault = FailsToLoad(at("m0", "1"), outcome=outcome)
    run = run_scenario(Scenario([4000] * 80, gpu_machines(2, 2), [fault], times=QUICK))
    assert len(run.published) == 80 and run.given_up == []
    (left_alone,) = run.end.state.left_alone
    assert "host-m0, GPU 1" in left_alone
    assert run.loads_at(at("m0", "1")) <= 5


def test_a_replacement_that_cannot_load_does_not_end_the_job():
    """Before: also after ten hours."""
    kills = KillsWorker(shards=frozenset({"s000040"}), times=1)
    fails = FailsToLoad(lambda place: bool(kills.struck), times=1, outcome=LoadOutcome("NFS hiccup"))
    run = run_scenario(Scenario([400] * 80, gpu_machines(2, 1), [kills, fails], times=QUICK))
    assert fails.struck == 1
    assert len(run.published) == 80 and run.given_up == []


@pytest.mark.parametrize(("is_user_error", "kind"), [(True, UserError), (False, PipelineError)])
def test_a_model_that_no_worker_can_load_ends_the_run_with_its_reason(is_user_error, kind):
    outcome = LoadOutcome("model.name: no such model", is_user_error=is_user_error)
    run = run_scenario(Scenario([400] * 80, gpu_machines(2, 2), [FailsToLoad(outcome=outcome)], times=QUICK))
    assert isinstance(run.error, kind) and "no such model" in str(run.error)
    assert isinstance(run.error, UserError) == is_user_error
    assert run.duration_s < 120


def test_a_full_temporary_disk_is_the_fault_of_its_machine():
    """Before: exit 2, as if the output could not be written."""
    fault = FailsAttempt(at("m1"), status="machine", after_s=0.5, message="temporary disk is full")
    run = run_scenario(Scenario([400] * 200, gpu_machines(4, 1), [fault], times=QUICK))
    assert len(run.published) == 200 and run.given_up == []
    (left_alone,) = run.end.state.left_alone
    assert "host-m1" in left_alone
    assert run.efficiency > 0.7


def test_full_temporary_disks_everywhere_end_the_run():
    fault = FailsAttempt(status="machine", after_s=0.5, message="temporary disk is full")
    run = run_scenario(Scenario([400] * 200, gpu_machines(2, 1), [fault], times=QUICK))
    assert isinstance(run.error, ScratchError) and "temporary disk is full" in str(run.error)
    assert run.duration_s < 600


def test_a_slow_machine_holds_the_others_up_no_longer_than_its_last_shard():
    machines = gpu_machines(4, 1)
    machines[0] = replace(machines[0], speed=0.1)
    run = run_scenario(Scenario([400] * 200, machines, times=QUICK))
    assert len(run.published) == 200
    assert run.efficiency > 0.85


def test_the_last_shards_do_not_wait_for_a_machine_whose_devices_are_all_left_alone():
    faults = [FailsToLoad(at("m0"), outcome=Dies(1.0, "SIGKILL")), poison("s000039", after_s=0.3)]
    machines = [*gpu_machines(1, 2), SimulatedMachine("m1", 4, 1)]
    run = run_scenario(Scenario([400] * 40, machines, faults, times=QUICK))
    assert len(run.published) == 39
    assert run.given_up == ["s000039"]


def test_a_worker_whose_model_never_loads_is_replaced_and_its_place_left_alone():
    fault = FailsToLoad(at("m0", "1"), outcome=Hangs(0.0))
    settings = {"stall_timeout_s": 60.0}
    run = run_scenario(Scenario([400] * 200, gpu_machines(2, 2), [fault], times=QUICK, run=settings))
    assert len(run.published) == 200
    (place,) = run.end.state.left_alone
    assert "GPU 1: the model could not be loaded 3 times: not loaded after 60 s" in place


def test_a_number_of_workers_is_reached_beside_a_bad_gpu():
    fault = KillsWorker(at("m0", "0"), after_s=1.0)
    settings = {"workers": 3, "cpus_per_worker": 1}
    run = run_scenario(Scenario([400] * 200, gpu_machines(1, 8), [fault], times=QUICK, run=settings))
    assert (len(run.published), run.given_up, run.end.state.workers_ready) == (200, [], 3)
