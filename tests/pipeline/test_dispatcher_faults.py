"""Faults that last for a while, that several machines have, or that are hard to tell apart, simulated."""

from dataclasses import dataclass

from tests.helpers.cluster_scenarios import Scenario, gpu_machines, run_scenario
from tests.helpers.simulated_faults import FailsAttempt, Fault, KillsWorker, at
from tests.helpers.simulated_machines import SimulatedMachine
from tests.helpers.simulated_worker import WorkerTimes

QUICK = WorkerTimes(process_s=1.0, load_s=2.0)


def on(*machine_ids):
    return lambda place: place.machine_id in machine_ids


@dataclass
class UntilTime(Fault):
    """Another fault, which ends at a time."""

    fault: Fault | None = None
    until_s: float = 0.0

    def on_taking(self, place, shard, now_s):
        return self.fault.on_taking(place, shard, now_s) if now_s < self.until_s else None


def test_a_machine_that_was_left_alone_is_used_again_when_it_is_the_only_one_left():
    """Before: its only GPU was held and the run never ended."""
    machines = [*gpu_machines(1, 1), SimulatedMachine("good", 4, 1, leaves_s=100.0)]
    fault = UntilTime(fault=KillsWorker(at("m0")), until_s=60.0)
    run = run_scenario(Scenario([400] * 200, machines, [fault], times=QUICK))
    assert len(run.published) == 200 and run.given_up == []
    assert any("another chance" in message for message in run.messages)


def test_a_head_without_a_gpu_does_not_hide_that_every_gpu_is_left_alone():
    machines = [
        SimulatedMachine("head", 2),
        *gpu_machines(1, 1),
        SimulatedMachine("good", 4, 1, leaves_s=100.0),
    ]
    fault = UntilTime(fault=KillsWorker(at("m0")), until_s=60.0)
    run = run_scenario(Scenario([400] * 200, machines, [fault], times=QUICK))
    assert len(run.published) == 200 and run.given_up == []


def test_a_bad_gpu_takes_none_of_the_wanted_number_of_workers():
    """Before: one worker, because the plan kept a place for the bad machine."""
    scenario = Scenario(
        [400] * 200,
        gpu_machines(3, 1),
        [KillsWorker(at("m0"))],
        times=QUICK,
        run={"workers": 2},
        is_usable=on("m1", "m2"),
    )
    run = run_scenario(scenario)
    assert len(run.published) == 200 and run.given_up == []
    assert run.efficiency > 0.9


def test_two_bad_machines_of_three_are_both_left_alone():
    scenario = Scenario(
        [400] * 240, gpu_machines(3, 1), [KillsWorker(on("m1", "m2"))], times=QUICK, is_usable=on("m0")
    )
    run = run_scenario(scenario)
    assert len(run.published) == 240 and run.given_up == []
    assert len(run.end.state.left_alone) == 2
    assert run.efficiency > 0.95


def test_machines_whose_every_attempt_fails_do_not_use_up_the_attempts_at_a_shard():
    """Before: they took the shards from each other, since the sound one was busy, and 5 were given up."""
    scenario = Scenario(
        [400] * 400,
        gpu_machines(4, 1),
        [FailsAttempt(on("m1", "m2", "m3"), after_s=0.2)],
        times=QUICK,
        is_usable=on("m0"),
    )
    run = run_scenario(scenario)
    assert len(run.published) == 400 and run.given_up == []
    assert run.efficiency > 0.95


def test_a_store_of_shards_that_is_down_for_a_moment_costs_no_shard():
    """Before: 1,896 of 2,000 shards were given up within 80 s."""
    fault = UntilTime(fault=FailsAttempt(after_s=0.2), until_s=100.0)
    run = run_scenario(Scenario([400] * 2000, gpu_machines(4, 1), [fault], times=QUICK))
    assert len(run.published) == 2000 and run.given_up == []


def test_a_job_whose_shards_all_fail_ends_soon():
    scenario = Scenario([400] * 500, gpu_machines(4, 1), [FailsAttempt(after_s=0.2)], times=QUICK)
    run = run_scenario(scenario)
    assert len(run.given_up) == 500
    assert run.duration_s < 300
