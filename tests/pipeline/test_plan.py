"""Plan workers that fit on the machines of a cluster and use its GPUs."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import RunConfig
from pipeline.output.survey import spread_evenly
from pipeline.run.plan import (
    CORES_PER_GPU_NEEDED,
    MOST_ASKS,
    MachineResources,
    WorkerShape,
    asks_wanted,
    no_devices_message,
    plan_workers,
)

EIGHT_GPUS = (64, 8)


def resources(machines):
    return [MachineResources(*sizes, node_id=f"node{place}") for place, sizes in enumerate(machines)]


def planned(machines, shards=100, *, cpus_only=False, **settings):
    return plan_workers(RunConfig(**settings), resources(machines), shards, cpus_only=cpus_only)


def cpus_of(plan):
    return sorted(shape.cpus for shape in plan.shapes)


def notes_on_gpus(plan):
    return [note for note in plan.notes if "GPUs get no worker" in note]


ON_CPUS = {"cpus_only": True}


@pytest.mark.parametrize(
    ("machines", "settings", "cpus", "gpus"),
    [
        ([EIGHT_GPUS], {}, 8 * [8], 1.0),
        ([(16, 8)], {}, 8 * [2], 1.0),
        ([EIGHT_GPUS], {"gpus_per_worker": 0.5}, 16 * [4], 0.5),
        # Ray never divides a worker between GPUs: two shares of 0.4 fit on each
        ([(64, 8)], {"gpus_per_worker": 0.4}, 16 * [4], 0.4),
        ([(20, 1)], {"gpus_per_worker": 0.1}, 10 * [2], 0.1),
        ([EIGHT_GPUS], {"workers": 3}, 3 * [21], 1.0),
        ([EIGHT_GPUS], {"gpus_per_worker": 0, "cpus_per_worker": 4, "workers": 4}, 4 * [4], 0.0),
        ([(16, 8), (64, 1)], {}, [*(8 * [2]), 32], 1.0),
        ([(4,)], ON_CPUS, [4], 0.0),
        ([(12,)], ON_CPUS, [12], 0.0),
        ([(32,)], ON_CPUS, 4 * [8], 0.0),
        ([(32,)], {**ON_CPUS, "cpus_per_worker": 4}, 8 * [4], 0.0),
        ([(8,)], {**ON_CPUS, "workers": 99, "cpus_per_worker": 2}, 4 * [2], 0.0),
        ([(8,)], {**ON_CPUS, "workers": 4}, 4 * [2], 0.0),
        ([(4,), (4,)], ON_CPUS, 2 * [4], 0.0),
        ([(4,), (64,)], ON_CPUS, [4, *(8 * [8])], 0.0),
        # a GPU machine's cores are used too
        ([(4,), EIGHT_GPUS], {"gpus_per_worker": 0}, [4, *(8 * [8])], 0.0),
        # each machine could hold all three
        ([EIGHT_GPUS, EIGHT_GPUS], {"workers": 3}, 3 * [21], 1.0),
        ([(32,)] + 4 * [(4, 1)], {}, 4 * [4], 1.0),
        ([(256, 1), (256, 1)], {}, 2 * [32], 1.0),
        # a head without cores
        ([(0,), EIGHT_GPUS], {}, 8 * [8], 1.0),
    ],
)
def test_every_gpu_gets_a_worker_and_each_machines_cores_are_shared_among_its_own_workers(
    machines, settings, cpus, gpus
):
    plan = planned(machines, **settings)
    assert cpus_of(plan) == sorted(cpus)
    assert {shape.gpus for shape in plan.shapes} == {gpus}


@pytest.mark.parametrize(
    ("machines", "settings", "note"),
    [
        (
            [(32, 8)],
            {"cpus_per_worker": 8},
            "run.cpus_per_worker 8: 4 of 8 GPUs get no worker on machines with 32 cores; lower it to 4 or "
            "leave it out",
        ),
        (
            [(16, 8), (64, 1), (16, 8)],
            {"cpus_per_worker": 8},
            "run.cpus_per_worker 8: 12 of 16 GPUs get no worker on machines with 16 cores; lower it to 2 or "
            "leave it out",
        ),
        (
            [(2, 4)],
            {},
            "2 of 4 GPUs get no worker on machines with 2 cores: a worker takes at least one core",
        ),
        (
            [(6, 8)],
            {"gpus_per_worker": 0.5},
            "5 of 8 GPUs get no worker on machines with 6 cores: a worker takes at least one core",
        ),
        ([EIGHT_GPUS], {"workers": 2}, "run.workers 2: 6 of 8 GPUs get no worker"),
        ([EIGHT_GPUS], {"shards": 5}, "5 shard(s): 3 of 8 GPUs get no worker"),
        ([EIGHT_GPUS], {"gpus_per_worker": 0}, "run.gpus_per_worker 0: 8 of 8 GPUs get no worker"),
    ],
)
def test_gpus_without_a_worker_are_named_with_the_reason(machines, settings, note):
    assert notes_on_gpus(planned(machines, **settings)) == [note]


def test_workers_with_fewer_cores_than_a_gpu_needs_are_named():
    (note,) = planned([(16, 8), (64, 1)]).notes
    assert note.startswith(
        f"8 of 9 worker(s) get 2 CPU core(s) each; keeping a GPU busy takes about {CORES_PER_GPU_NEEDED}, "
    )
    assert "tests/bench/host_ceiling.py" in note
    assert planned([(8 * CORES_PER_GPU_NEEDED, 8)]).notes == ()
    # two workers on a GPU share what it needs
    assert planned([(8 * CORES_PER_GPU_NEEDED, 8)], gpus_per_worker=0.5).notes == ()
    assert planned([(1,)], cpus_only=True).notes == ()


def test_cpu_cores_that_a_number_of_workers_leaves_idle_are_named():
    (note,) = planned([(16,), (16,)], workers=4, cpus_only=True).notes
    assert note.startswith("the workers get 16 of 32 CPU cores")
    assert "run.cpus_per_worker=8" in note
    assert planned([(16,), (16,)], workers=4, cpus_per_worker=8, cpus_only=True).notes == ()


def test_every_worker_is_meant_for_one_machine():
    assert planned([(16, 8), (64, 1)]).shapes_by_machine == {
        "node0": 8 * (WorkerShape(2, 1.0, "node0"),),
        "node1": (WorkerShape(32, 1.0, "node1"),),
    }


machine_sizes = st.lists(st.tuples(st.integers(0, 128), st.integers(0, 10)), max_size=6)
shard_numbers = st.integers(1, 200)
runs = st.fixed_dictionaries(
    {
        "workers": st.none() | st.integers(1, 40),
        "cpus_per_worker": st.none() | st.integers(1, 40),
        "gpus_per_worker": st.sampled_from([0, 0.1, 0.25, 0.3, 0.5, 1]),
        "cpus_only": st.booleans(),
    }
)


def overbooked(machine, shapes):
    """Whether shapes do not fit on a machine together; Ray never divides a worker between GPUs."""
    per_gpu = max((int(1 / shape.gpus + 1e-9) for shape in shapes if shape.gpus), default=0)
    cpus, gpus = machine
    return sum(shape.cpus for shape in shapes) > cpus or (per_gpu and len(shapes) > gpus * per_gpu)


def by_machine(plan, machines):
    return [(size, plan.shapes_by_machine.get(f"node{place}", ())) for place, size in enumerate(machines)]


@given(machine_sizes, shard_numbers, runs)
def test_no_machine_is_overbooked(machines, shards, run):
    plan = planned(machines, shards, **run)
    assert {shape.node_id for shape in plan.shapes} == set(plan.shapes_by_machine)
    for machine, shapes in by_machine(plan, machines):
        assert not overbooked(machine, shapes)
    on_gpus = run["gpus_per_worker"] if not run["cpus_only"] else 0
    assert {shape.gpus for shape in plan.shapes} <= {on_gpus}
    assert plan.ask.gpus == on_gpus
    if run["cpus_per_worker"]:
        assert {shape.cpus for shape in plan.shapes} <= {run["cpus_per_worker"]}


@given(machine_sizes, shard_numbers, runs)
def test_as_many_workers_are_planned_as_are_wanted_and_fit(machines, shards, run):
    plan = planned(machines, shards, **run)
    assert len(plan.shapes) <= plan.wanted <= min(shards, run["workers"] or shards)
    assert plan.wanted == min(shards, run["workers"] or plan.wanted)
    if len(plan.shapes) < plan.wanted:
        # one more like those that are planned fits nowhere
        one_more = WorkerShape(run["cpus_per_worker"] or 1, plan.ask.gpus)
        assert all(overbooked(machine, (*shapes, one_more)) for machine, shapes in by_machine(plan, machines))


@given(machine_sizes, shard_numbers, runs)
def test_every_gpu_without_a_worker_is_named(machines, shards, run):
    plan = planned(machines, shards, **run)
    named = sum(int(found) for note in plan.notes for found in re.findall(r"(\d+) of \d+ GPUs get", note))
    total = sum(gpus for _, gpus in machines)
    if plan.ask.gpus:
        used = -(-len(plan.shapes) // int(1 / plan.ask.gpus + 1e-9))
        # workers on several machines may leave shares of several GPUs free
        assert used <= total - named <= len(plan.shapes)
    else:
        assert named == (0 if run["gpus_per_worker"] else total)


@given(machine_sizes, shard_numbers, runs, st.data())
def test_a_machine_that_joins_or_leaves_changes_no_worker_elsewhere(machines, shards, run, data):
    place = data.draw(st.integers(0, len(machines)))
    joining = data.draw(st.tuples(st.integers(0, 128), st.integers(0, 10)))
    # it may be listed anywhere, and have any id
    there, newcomer = resources(machines), MachineResources(*joining, node_id=f"node{place}-new")
    config = RunConfig(**{key: value for key, value in run.items() if key != "cpus_only"})
    small = plan_workers(config, there, shards, cpus_only=run["cpus_only"])
    large = plan_workers(
        config, data.draw(st.permutations([newcomer, *there])), shards, cpus_only=run["cpus_only"]
    )
    for machine in there:
        before, after = (plan.shapes_by_machine.get(machine.node_id, ()) for plan in (small, large))
        if run["workers"] is None and large.wanted < shards:
            assert before == after
        # workers of one plan may run beside those of the other
        both = max(before, after, key=len)
        assert set(before) | set(after) == set(both)


def test_a_machine_that_drains_gets_no_worker():
    drains = MachineResources(64, 8, "leaving", drains=True)
    plan = plan_workers(RunConfig(), [drains, MachineResources(8, 1, "staying")], 100)
    assert set(plan.shapes_by_machine) == {"staying"}
    assert plan.wanted == 1
    assert notes_on_gpus(plan) == []


def test_without_a_gpu_the_plan_is_empty_and_asks_for_a_worker_with_one():
    plan = planned([(0,), (64,)])
    assert (plan.shapes, plan.wanted, plan.ask) == ((), 0, WorkerShape(1, 1.0))
    assert (plan.ask.device, plan.ask.cpus) == ("cuda", 1)
    assert planned([], cpus_per_worker=4, gpus_per_worker=0.5).ask == WorkerShape(4, 0.5)


def test_a_cpu_worker_that_is_asked_for_is_like_those_that_are_planned():
    assert planned([(4,), (64,)], cpus_only=True).ask == WorkerShape(4)
    assert planned([], cpus_only=True).ask == WorkerShape(1)


@pytest.mark.parametrize(
    ("machines", "settings", "shards", "asks"),
    [
        # as many as the run wants
        ([EIGHT_GPUS], {"workers": 12}, 100, 4),
        ([EIGHT_GPUS], {"workers": 8}, 100, 0),
        ([], {"workers": 3}, 100, 3),
        # as many again
        ([EIGHT_GPUS], {}, 100, 8),
        ([], {}, 100, 1),
        (4 * [EIGHT_GPUS], {}, 100, MOST_ASKS),
        # never more workers than shards that are not finished
        ([EIGHT_GPUS], {}, 10, 2),
        ([EIGHT_GPUS], {"workers": 12}, 9, 1),
        ([EIGHT_GPUS], {}, 3, 0),
    ],
)
def test_more_workers_are_asked_for_while_there_are_shards_for_them(machines, settings, shards, asks):
    plan, run = planned(machines, **settings), RunConfig(**settings)
    assert asks_wanted(run, plan, shards) == asks
    assert asks_wanted(run, plan, shards, is_own_ray=True) == 0


def test_no_more_workers_than_shards_are_planned():
    assert len(planned([EIGHT_GPUS], shards=2).shapes) == 2


def test_the_device_follows_the_plan():
    assert planned([EIGHT_GPUS], shards=1).ask.device == "cuda"
    assert planned([(2,)], shards=1, cpus_only=True).ask.device == "cpu"


@pytest.mark.parametrize(
    ("machines", "settings", "message"),
    [
        (
            [(4,), (4,)],
            {"cpus_per_worker": 8, "gpus_per_worker": 0},
            "a worker needs 8 CPU core(s) (run.cpus_per_worker); the cluster has 2 machine(s) with 4 CPU "
            "core(s) and no GPU; set run.cpus_per_worker to 4 or less, or add such a machine",
        ),
        (
            [(64,), (4, 2), (4, 8)],
            {"cpus_per_worker": 8},
            "a worker needs 1 GPU (run.gpus_per_worker) and 8 CPU core(s) (run.cpus_per_worker); the cluster "
            "has 1 machine(s) with 64 CPU core(s) and no GPU and 2 machine(s) with 4 CPU core(s) and 2 to 8 "
            "GPU(s); set run.cpus_per_worker to 4 or less, or add such a machine, or set "
            "run.gpus_per_worker=0 to compute on CPUs, slowly",
        ),
        (
            [(0,), (64,)],
            {"cpus_per_worker": 1},
            "a worker needs 1 GPU (run.gpus_per_worker) and 1 CPU core(s) (run.cpus_per_worker); the cluster "
            "has 2 machine(s) with 0 to 64 CPU core(s) and no GPU; add such a machine, or set "
            "run.gpus_per_worker=0 to compute on CPUs, slowly",
        ),
        (
            [],
            {"gpus_per_worker": 0},
            "a worker needs 1 CPU core(s) (run.cpus_per_worker); the cluster has no machine for workers; add "
            "such a machine",
        ),
    ],
)
def test_where_no_machine_can_hold_a_worker_the_message_names_the_resources_and_the_way_out(
    machines, settings, message
):
    assert (
        no_devices_message(RunConfig(**settings), resources(machines))
        == f"no machine can hold a worker: {message}"
    )
    assert planned(machines, **settings).shapes == ()


@given(st.integers(0, 300), st.integers(1, 300))
def test_a_limit_spreads_evenly_over_what_is_left(number, limit):
    chosen = spread_evenly(range(number), limit)
    assert len(chosen) == min(limit, number)
    assert list(chosen) == sorted(set(chosen))
    gaps = [right - left for left, right in itertools.pairwise([-0.5, *chosen, number - 0.5])]
    # the outer gaps are half of the inner ones
    assert not chosen or max(gaps) <= number / len(chosen) + 1


def test_without_a_limit_all_is_done():
    assert spread_evenly(["a", "b"], None) == ["a", "b"]
