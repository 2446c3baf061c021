"""Whatever goes wrong: every shard is published, given up or left, nothing twice, and the run ends."""

from dataclasses import replace

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pipeline.errors import OutputError
from pipeline.run.worker import LoadOutcome
from tests.helpers.cluster_scenarios import Scenario, run_scenario
from tests.helpers.simulated_faults import (
    Dies,
    FailsAttempt,
    FailsToLoad,
    HangsAttempt,
    KillsWorker,
    RefusesPuts,
    at,
)
from tests.helpers.simulated_machines import SimulatedMachine
from tests.helpers.simulated_worker import WorkerTimes

SECONDS = st.floats(0.1, 120.0)
# less than any shard takes to be opened and published
SOON_S = st.floats(0.05, 0.9)
PLACES = st.builds(at, st.sampled_from(["m0", "m1", "m2"]), st.sampled_from(["0", "1", None]))
RUN = {"stall_timeout_s": 60.0, "drain_s": 20.0, "wait_for_devices_s": 300.0}


@st.composite
def machines(draw):
    """Return machines of which m0 to m3 are there at first; m3 stays and is sound."""
    found = []
    for number in range(4):
        leaves_s = draw(st.none() | st.floats(5.0, 400.0)) if number < 3 else None
        drains_s = draw(st.none() | st.just(max(0.1, leaves_s - 30.0))) if leaves_s else None
        found.append(
            SimulatedMachine(
                f"m{number}",
                8,
                2,
                drains_s=drains_s,
                leaves_s=leaves_s,
                speed=draw(st.sampled_from([1.0, 1.0, 0.3])),
            )
        )
    for number in range(draw(st.integers(0, 2))):
        found.append(SimulatedMachine(f"late{number}", 8, 2, joins_s=draw(st.floats(1.0, 300.0))))
    return found


def shard_sets(most):
    return st.frozensets(st.integers(0, 39).map("s{:06d}".format), min_size=1, max_size=most)


FLEETING_FAULTS = st.one_of(
    st.builds(KillsWorker, shards=shard_sets(8), times=st.integers(1, 2), after_s=SECONDS),
    st.builds(HangsAttempt, shards=shard_sets(4), times=st.just(1), freezes_worker=st.booleans()),
    st.builds(FailsAttempt, shards=shard_sets(8), times=st.integers(1, 2), after_s=SECONDS),
    st.builds(RefusesPuts, times=st.integers(1, 3)),
    st.builds(
        FailsToLoad,
        where=PLACES,
        times=st.integers(1, 2),
        outcome=st.sampled_from(
            [Dies(1.0, "SIGKILL"), LoadOutcome("ECC", is_device_fault=True), LoadOutcome("busy")]
        ),
    ),
)
BAD_PLACES = st.one_of(
    st.builds(KillsWorker, where=PLACES, after_s=st.floats(0.1, 3.0)),
    st.builds(FailsAttempt, where=PLACES, status=st.just("device"), after_s=st.floats(0.1, 3.0)),
    st.builds(FailsAttempt, where=PLACES, status=st.just("machine"), after_s=st.floats(0.1, 3.0)),
    st.builds(FailsToLoad, where=PLACES, outcome=st.just(Dies(1.0, "SIGKILL"))),
)
POISON = frozenset({"s000005", "s000021"})
POISON_FAULTS = st.one_of(
    st.builds(KillsWorker, shards=st.just(POISON), after_s=SOON_S),
    st.builds(FailsAttempt, shards=st.just(POISON), after_s=SOON_S),
)
SAMPLES = st.lists(st.integers(1, 3000), min_size=40, max_size=40)
TIMES = st.builds(
    WorkerTimes,
    process_s=st.floats(0.1, 10),
    load_s=st.floats(0.1, 20),
    shards_in_flight=st.integers(1, 4),
    is_fair=st.booleans(),
)


@st.composite
def scenarios(draw, faults):
    times = draw(TIMES)
    return Scenario(
        draw(SAMPLES),
        draw(machines()),
        draw(faults),
        times=times,
        run={**RUN, "shards_in_flight": times.shards_in_flight},
        time_limit_s=2e4,
    )


def check_accounts(run):
    """Check that each shard has one end, that it is counted, and that only a loss has it published twice."""
    state = run.end.state
    shards = {f"s{number:06d}" for number in range(len(run.scenario.samples))}
    published, given_up = set(run.published), set(run.given_up)
    assert not published & given_up
    assert published | given_up <= shards
    assert state.shards_done == len(published) and state.shards_failed == len(given_up)
    assert state.shards_left == len(shards - published - given_up)
    assert state.counts.samples_in == sum(run.scenario.samples[int(name[1:])] for name in published)
    for name, puts in run.host.records.puts.items():
        lost = [death for death in run.host.records.deaths if name in death.shards]
        assert len(puts) <= 1 + len(lost)
    assert not any(run.host.workers_at(place) for place in run.host.records.started)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(scenarios(st.lists(st.one_of(FLEETING_FAULTS, BAD_PLACES), max_size=3)))
def test_good_shards_are_never_given_up(scenario):
    # several faults may strike the same shard
    run = run_scenario(replace(scenario, run={**scenario.run, "max_attempts": 7}))
    if run.error is not None:
        # what no shard is to blame for may end the run, but only after it has happened again and again
        event(type(run.error).__name__)
        assert not isinstance(run.error, OutputError)
        assert run.given_up == []
        return
    check_accounts(run)
    assert run.end.stopped == ""
    assert run.given_up == []
    assert len(run.published) == 40


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(scenarios(st.tuples(POISON_FAULTS, st.one_of(FLEETING_FAULTS, BAD_PLACES))))
def test_poison_shards_are_given_up_after_failures_at_two_places_and_nothing_else_is(scenario):
    run = run_scenario(scenario)
    if run.error is not None:
        event(type(run.error).__name__)
        return
    check_accounts(run)
    assert set(run.given_up) == POISON
    for name in POISON:
        assert len(set(run.host.records.takes[name])) > 1


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(scenarios(st.lists(FLEETING_FAULTS, max_size=2)), st.floats(0.0, 300.0))
def test_a_run_that_is_asked_to_end_ends_in_time_with_its_accounts_in_order(scenario, terminated_s):
    run = run_scenario(replace(scenario, terminated_s=terminated_s))
    if run.error is None:
        check_accounts(run)
        assert run.duration_s <= terminated_s + 20.0 + 1.0 or not run.end.terminated
