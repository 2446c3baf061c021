"""Faults that last for a while, that several machines have, or that are hard to tell apart, simulated."""

from dataclasses import dataclass, field, replace

import pytest

from pipeline.run.hosting import Abandoned, Ended
from pipeline.run.worker import LoadOutcome, ShardOutcome
from tests.helpers.cluster_scenarios import Scenario, gpu_machines, run_scenario
from tests.helpers.simulated_faults import (
    FailsAttempt,
    FailsToLoad,
    Fault,
    HangsAttempt,
    HangsPublishing,
    KillsWorker,
    RefusesPuts,
    at,
)
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


@pytest.mark.parametrize("bad", [["m1"], ["m1", "m2"]])
def test_machines_that_cannot_write_the_output_do_not_end_a_run_while_another_one_is_at_work(bad):
    """Before: OutputError after five refusals, while the sound machine did a large shard."""
    scenario = Scenario([100_000, *[400] * 50], gpu_machines(3, 1), [RefusesPuts(on(*bad))], times=QUICK)
    run = run_scenario(scenario)
    assert run.error is None
    assert len(run.published) == 51 and run.given_up == []


def test_machines_with_full_temporary_disks_do_not_end_a_run_while_another_one_is_at_work():
    """Before: ScratchError after four seconds."""
    fault = FailsAttempt(on("m1", "m2"), status="machine", after_s=0.5)
    run = run_scenario(Scenario([10_000] * 20, gpu_machines(3, 1), [fault], times=QUICK, is_usable=on("m0")))
    assert run.error is None
    assert len(run.published) == 20 and run.given_up == []
    assert run.efficiency > 0.95


class EndsAttemptFirst:
    """A host whose workers end an abandoned attempt before they answer the request."""

    def __init__(self, host):
        self._host = host

    def __getattr__(self, name):
        return getattr(self._host, name)

    def events(self, timeout_s):
        for event in self._host.events(timeout_s):
            if isinstance(event, Abandoned) and event.will_not_publish:
                yield Ended(event.worker, event.shard, ShardOutcome("abandoned"))
            yield event


def test_a_shard_that_always_hangs_is_given_up_in_whatever_order_its_worker_answers():
    """Before: an attempt that ended before the answer did not count, and the run never ended."""
    fault = HangsAttempt(shards=frozenset({"s000003"}))
    scenario = Scenario(
        [400] * 40,
        gpu_machines(2, 2),
        [fault],
        times=QUICK,
        run={"stall_timeout_s": 60.0},
        time_limit_s=5000.0,
    )
    run = run_scenario(scenario, EndsAttemptFirst)
    assert run.given_up == ["s000003"] and len(run.published) == 39
    assert len(run.host.records.takes["s000003"]) == 3


def test_a_worker_whose_publication_hangs_is_replaced():
    """Before: it answered for ever that it was publishing, and the run never ended."""
    scenario = Scenario(
        [400] * 40,
        gpu_machines(2, 1),
        [HangsPublishing(shards=frozenset({"s000003"}), times=1)],
        times=QUICK,
        run={"stall_timeout_s": 60.0},
        time_limit_s=5000.0,
    )
    run = run_scenario(scenario)
    assert len(run.published) == 40 and run.given_up == []


def test_a_request_to_end_also_counts_while_a_run_ends_for_another_reason():
    """Before: the run took all of run.drain_s, and its exit code did not say that it was asked to end."""
    failed_share = {f"s{number:06d}": 1.0 for number in range(10)}
    scenario = Scenario(
        [*[10_000] * 10, *[5_000] * 190],
        gpu_machines(2, 2),
        times=QUICK,
        failed_share=failed_share,
        run={"drain_s": 600.0},
    )
    ended_s = run_scenario(scenario).duration_s
    run = run_scenario(replace(scenario, terminated_s=ended_s - 30.0))
    assert run.end.terminated
    assert run.duration_s <= ended_s + 1.0


@dataclass
class HasMemoryForOne(Fault):
    """Only the first worker at each place can load its model."""

    full: set = field(default_factory=set)

    def on_loading(self, place):
        if place in self.full:
            return LoadOutcome("CUDA out of memory", is_device_fault=True)
        self.full.add(place)
        return None


def test_a_gpu_that_has_memory_for_one_of_two_workers_is_used_by_that_one():
    """Before: each GPU was left alone with the worker that had loaded, and the run ended without a result."""
    scenario = Scenario(
        [400] * 200, gpu_machines(2, 2), [HasMemoryForOne()], times=QUICK, run={"gpus_per_worker": 0.5}
    )
    run = run_scenario(scenario)
    assert run.error is None
    assert len(run.published) == 200 and run.given_up == []
    assert run.end.state.left_alone == ()
    assert run.efficiency > 0.9


def test_one_wanted_worker_moves_to_another_machine_when_it_is_lost():
    """Before: each replacement was started on the same bad GPU, and all shards were given up."""
    scenario = Scenario(
        [400] * 40,
        gpu_machines(4, 1),
        [KillsWorker(at("m0"))],
        times=QUICK,
        run={"workers": 1},
        is_usable=on("m1"),
    )
    run = run_scenario(scenario)
    assert len(run.published) == 40 and run.given_up == []
    assert run.loads_at(at("m0")) == 1
    assert run.efficiency > 0.9


def test_a_shard_that_waits_behind_a_large_one_on_a_slow_device_is_not_taken_for_one_that_hangs():
    """Before: it counted as a failed attempt and its worker was replaced, for every large shard."""
    scenario = Scenario(
        [2000] * 12,
        [replace(gpu_machines(1, 1)[0], speed=0.2)],
        times=replace(QUICK, is_fair=False, lookahead_samples=1900),
        run={"stall_timeout_s": 60.0},
    )
    run = run_scenario(scenario)
    assert len(run.published) == 12 and run.given_up == []
    assert all(len(places) == 1 for places in run.host.records.takes.values())
    assert run.loads_at(on("m0")) == 1


def test_a_machine_that_fails_while_the_others_still_load_does_not_end_the_run():
    machines = [*gpu_machines(1, 1), SimulatedMachine("late", 4, 1, joins_s=2.5)]
    fault = FailsAttempt(at("m0"), status="machine", after_s=0.05)
    run = run_scenario(Scenario([400] * 40, machines, [fault], times=replace(QUICK, load_s=5.0)))
    assert run.error is None
    assert len(run.published) == 40 and run.given_up == []


def test_the_last_shards_are_taken_from_a_device_that_is_far_too_slow():
    """Before: efficiency 0.3, because one of the largest shards took 20 times as long as elsewhere."""
    machines = gpu_machines(4, 1)
    machines[0] = replace(machines[0], speed=0.05)
    samples = [20_000, 20_000, 20_000, 20_000, *[1000] * 120]
    run = run_scenario(Scenario(samples, machines, times=QUICK))
    assert len(run.published) == 124 and run.given_up == []
    assert all(len(puts) == 1 for puts in run.host.records.puts.values())
    assert run.efficiency > 0.7


@pytest.mark.parametrize("gpus_per_worker", [1, 0.5])
def test_a_bad_gpu_does_not_keep_the_cores_that_the_worker_at_the_good_one_needs(gpus_per_worker):
    """Before: the worker that held the bad GPU had all CPU cores of the machine, and the run never ended."""
    fault = FailsToLoad(at("m0", "0"), outcome=LoadOutcome("ECC", is_device_fault=True))
    machines = [*gpu_machines(1, 2), SimulatedMachine("first", 8, 2, leaves_s=40.0)]
    scenario = Scenario(
        [400] * 60,
        machines,
        [fault],
        times=QUICK,
        run={"workers": 1, "gpus_per_worker": gpus_per_worker},
        time_limit_s=5000.0,
    )
    run = run_scenario(scenario)
    assert len(run.published) == 60 and run.given_up == []


def test_a_shard_that_failed_at_the_fast_machine_is_not_taken_from_the_slow_one():
    machines = gpu_machines(2, 1)
    machines[1] = replace(machines[1], speed=0.05)
    fault = FailsAttempt(at("m0"), shards=frozenset({"s000000"}))
    run = run_scenario(Scenario([5000, *[500] * 40], machines, [fault], times=QUICK, time_limit_s=5000.0))
    assert len(run.published) == 41 and run.given_up == []
