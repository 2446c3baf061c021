"""The simulated cluster that dispatchers are tested on: time, resources, sharing of a device, and work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.hosting import Abandoned, Ended, HasRoom, Heard, Loaded, Lost, Place, Started
from pipeline.run.plan import WorkerShape
from tests.helpers.simulated_faults import FailsAttempt, HangsAttempt, KillsWorker, RefusesPuts, at
from tests.helpers.simulated_host import RayTimes, SimulatedHost, TimeIsUp
from tests.helpers.simulated_job import simulated_shards
from tests.helpers.simulated_machines import SimulatedMachine
from tests.helpers.simulated_records import ideal_s
from tests.helpers.simulated_worker import WorkerTimes

EXACT = WorkerTimes(process_s=1.0, load_s=2.0, call_s=0.0, open_s=0.0, publish_s=0.0, samples_per_s=100.0)
GPU = WorkerShape(1, 1.0)


def cluster_of(machines=1, gpus=1, **times):
    return [SimulatedMachine(f"m{number}", cpus=8, gpus=gpus, **times) for number in range(machines)]


def all_events(host, until_s=1e4):
    """Return the events and their times, until nothing happens any more."""
    found = []
    while host.now_s() < until_s:
        found += [(host.now_s(), event) for event in host.events(until_s - host.now_s())]
    return found


def ready_host(faults=(), times=EXACT, workers=1, machines=None, **settings):
    """Return a host with workers that have loaded their model."""
    host = SimulatedHost(machines or cluster_of(gpus=workers), faults, times=times, **settings)
    for worker in range(workers):
        host.start(worker, GPU)
    ready = 0
    while ready < workers:
        for event in host.events(100):
            if isinstance(event, Started):
                host.load(event.worker)
            ready += isinstance(event, Loaded)
    return host


def work_through(host, shards, workers):
    """Hand out shards in order, as long as workers ask for them; return the ids of those that ended."""
    left, ended = list(reversed(shards)), []
    for worker in range(workers):
        host.wait_for_room(worker)
    expected = len(shards)
    while expected:
        events = host.events(1e4)
        if not events:
            break
        for event in events:
            match event:
                case HasRoom(worker=worker) if left:
                    host.annotate(worker, left.pop())
                    host.wait_for_room(worker)
                case Ended(shard=shard):
                    ended.append(shard.shard_id)
                    expected -= 1
    return ended


def test_two_shards_of_a_worker_share_the_device_in_equal_parts():
    host = ready_host()
    for shard in simulated_shards([100, 300]):
        host.annotate(0, shard)
    start_s = host.now_s()
    ends = [(when_s - start_s, event.shard.shard_id) for when_s, event in all_events(host)]
    assert ends == [(pytest.approx(2.0), "s000000"), (pytest.approx(4.0), "s000001")]


def test_a_device_may_serve_shards_in_the_order_of_their_arrival():
    host = ready_host(times=WorkerTimes(1, 2, 0, 0, 0, 100, is_fair=False))
    for shard in simulated_shards([100, 300]):
        host.annotate(0, shard)
    start_s = host.now_s()
    assert [when_s - start_s for when_s, _ in all_events(host)] == [pytest.approx(1.0), pytest.approx(4.0)]


def test_gpus_are_numbered_and_the_lowest_free_one_is_reserved_first():
    host = SimulatedHost(cluster_of(machines=1, gpus=2), times=EXACT)
    for worker in range(3):
        host.start(worker, GPU)
    assert [(event.worker, event.place.device) for _, event in all_events(host, 10)] == [(0, "0"), (1, "1")]
    assert host.pending == (GPU,)
    host.stop(0)
    ((_, event),) = all_events(host, 20)
    assert event == Started(2, Place("m0", "host-m0", "0"))


def test_a_worker_meant_for_a_machine_waits_for_room_there():
    host = SimulatedHost(cluster_of(machines=2), times=EXACT)
    shape = WorkerShape(1, 1.0, "m1")
    host.start(0, shape)
    host.start(1, shape)
    assert [event.place.machine_id for _, event in all_events(host, 10)] == ["m1"]
    assert host.pending == (shape,)


def test_workers_of_a_machine_that_leaves_are_reported_lost_once_the_loss_is_known():
    machines = [*cluster_of(), SimulatedMachine("short", 8, 1, leaves_s=50.0)]
    host = ready_host(machines=machines, workers=2, ray=RayTimes(machine_lost_s=5.0))
    host.start(2, WorkerShape(1, 1.0, "short"))
    host.annotate(1, simulated_shards([100_000])[0])
    events = all_events(host, 100)
    assert {(when_s, event.worker, event.machine_lost) for when_s, event in events} == {
        (55.0, 1, True),
        (55.0, 2, True),
    }
    assert [machine.node_id for machine in host.machines()] == ["m0"]
    assert host.records.work.lost_with_machines == pytest.approx(47.0 * 100)


def test_a_machine_that_drains_gets_no_worker():
    host = SimulatedHost(cluster_of(drains_s=1.0), times=EXACT)
    host.events(2.0)
    assert [machine.drains for machine in host.machines()] == [True]
    host.start(0, GPU)
    assert all_events(host, 100) == []


def test_machines_are_added_while_a_worker_has_no_room():
    host = SimulatedHost([], times=EXACT, reserve=cluster_of(machines=3), ray=RayTimes(machine_added_s=60.0))
    host.start(0, GPU)
    host.start(1, GPU)
    started = [(when_s, event.place.machine_id) for when_s, event in all_events(host, 1000)]
    assert started == [(61.0, "m0"), (121.0, "m1")]
    assert len(host.machines()) == 2


def test_a_worker_that_was_stopped_causes_no_further_event():
    host = ready_host()
    host.annotate(0, simulated_shards([100])[0])
    host.heartbeat(0)
    host.stop(0)
    assert all_events(host) == []
    assert host.records.puts == {}


def test_a_worker_has_room_for_two_shards_at_first_and_then_when_its_device_would_run_dry():
    host = ready_host(times=WorkerTimes(1, 2, 0, open_s=1.0, publish_s=0.0, samples_per_s=100.0))
    shards = simulated_shards([1000, 1000, 1000])
    given_s = []
    start_s = host.now_s()
    for shard in shards:
        host.wait_for_room(0)
        while not any(isinstance(event, HasRoom) for event in host.events(100)):
            pass
        given_s.append(host.now_s() - start_s)
        host.annotate(0, shard)
    # 2,000 samples at 100 a second, of which 200 are read ahead
    assert given_s == [0.0, 0.0, pytest.approx(1.0 + 18.0)]


def test_a_worker_takes_no_more_shards_than_its_limit():
    host = ready_host(times=WorkerTimes(1, 2, 0, 0, publish_s=100.0, shards_in_flight=2))
    shards = simulated_shards([1, 1])
    for shard in shards:
        host.annotate(0, shard)
    host.wait_for_room(0)
    first, *_ = [event for _, event in all_events(host)]
    assert isinstance(first, Ended)


def test_a_shard_in_progress_can_be_abandoned_and_one_being_published_cannot():
    host = ready_host(times=WorkerTimes(1, 2, 0, 0, publish_s=5.0, samples_per_s=100.0))
    long, short = simulated_shards([10_000, 10])
    host.annotate(0, long)
    host.annotate(0, short)
    host.events(1.0)
    host.abandon(0, long)
    host.abandon(0, short)
    answers = [event for _, event in all_events(host)]
    assert Abandoned(0, long, True) in answers
    assert Abandoned(0, short, False) in answers
    assert [(e.shard, e.outcome.status) for e in answers if isinstance(e, Ended)] == [
        (long, "abandoned"),
        (short, "done"),
    ]


def test_a_shard_that_hangs_can_be_abandoned_but_never_ends():
    host = ready_host([HangsAttempt(after_s=0.5)])
    (shard,) = simulated_shards([100])
    host.annotate(0, shard)
    assert all_events(host, 100) == []
    host.heartbeat(0)
    host.abandon(0, shard)
    heard, abandoned = [event for _, event in all_events(host, 200)]
    assert isinstance(heard, Heard) and heard.heartbeat.progress["s000000"].done_share == pytest.approx(0.5)
    assert abandoned == Abandoned(0, shard, will_not_publish=True)


def test_a_frozen_worker_answers_nothing():
    host = ready_host([HangsAttempt(after_s=0.5, freezes_worker=True)])
    host.annotate(0, simulated_shards([100])[0])
    host.events(1.0)
    host.heartbeat(0)
    assert all_events(host, 100) == []


def test_a_broken_cuda_context_fails_every_later_shard_of_its_worker():
    host = ready_host([FailsAttempt(status="device", times=1, after_s=0.1)])
    for shard in simulated_shards([100, 100]):
        host.annotate(0, shard)
        host.events(0.5)
    host.annotate(0, simulated_shards([1, 1, 1])[2])
    assert [event.outcome.status for _, event in all_events(host)] == ["device"]


def test_a_store_that_is_down_refuses_what_workers_publish_meanwhile():
    host = ready_host([RefusesPuts(from_s=0.0, until_s=10.0)])
    short, long = simulated_shards([100, 2000])
    host.annotate(0, short)
    host.annotate(0, long)
    assert [event.outcome.status for _, event in all_events(host)] == ["output", "done"]
    assert list(host.records.puts) == ["s000001"]


def test_a_bad_place_kills_its_worker_soon_after_it_has_taken_a_shard():
    host = ready_host([KillsWorker(at("m0", "1"), after_s=1.0)], workers=2, ray=RayTimes(worker_lost_s=2.0))
    good, bad = simulated_shards([1000, 1000])
    host.annotate(0, good)
    host.annotate(1, bad)
    lost, ended = all_events(host)
    assert lost == (pytest.approx(6.0), Lost(1, "SIGKILL"))
    assert ended[1].shard == good
    assert host.records.work.lost_by_deaths == pytest.approx(100.0)


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=30),
    st.integers(1, 4),
    st.booleans(),
    st.integers(1, 4),
)
def test_without_faults_every_shard_is_published_once_in_no_less_than_the_ideal_time(
    samples, workers, is_fair, shards_in_flight
):
    times = WorkerTimes(is_fair=is_fair, shards_in_flight=shards_in_flight)
    host = ready_host(times=times, workers=workers)
    shards = simulated_shards(samples)
    assert sorted(work_through(host, shards, workers)) == [shard.shard_id for shard in shards]
    assert all(len(puts) == 1 for puts in host.records.puts.values())
    assert host.records.work.total == pytest.approx(sum(samples))
    assert host.now_s() >= ideal_s(host.records, times, max(samples)) * (1 - 1e-6)


@given(st.integers(1, 3), st.floats(0.1, 30.0))
def test_what_devices_have_done_is_published_or_lost(times, after_s):
    host = ready_host([KillsWorker(at("m0", "0"), after_s=after_s, times=times)], workers=2)
    work_through(host, simulated_shards([300] * 10), 2)
    assert host.records.work.published == 300 * len(host.records.puts)
    assert host.records.work.total == host.records.work.published + host.records.work.lost_by_deaths
    assert {death.place.device for death in host.records.deaths} <= {"0"}


def test_a_simulation_repeats_itself():
    def happened():
        host = ready_host([FailsAttempt(after_s=1.0, times=3)], workers=3)
        work_through(host, simulated_shards(range(1, 40)), 3)
        return host.now_s(), dict(host.records.puts)

    assert happened() == happened()


def test_the_ideal_time_counts_machines_while_they_are_there():
    # one device from 3 s on, a second one from 13 to 23 s: 20 s of both do 3,000 samples at 100 a second
    host = ready_host(machines=[*cluster_of(), SimulatedMachine("m1", 8, 1, joins_s=10.0, leaves_s=23.0)])
    all_events(host, 30)
    host.records.work.published = 3000.0
    assert ideal_s(host.records, EXACT, 10) == pytest.approx(3.0 + 20.0)
    assert ideal_s(host.records, EXACT, 5000) == pytest.approx(3.0 + 50.0)


def test_a_run_that_does_not_end_is_a_failure():
    host = SimulatedHost([], time_limit_s=100.0)
    with pytest.raises(TimeIsUp, match="after 100 s"):
        while True:
            host.events(10.0)
    host = SimulatedHost([])
    with pytest.raises(TimeIsUp, match="calls of events"):
        while True:
            host.events(0.0)
