"""Plan workers that fit on the machines of a cluster and use its GPUs."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import RunConfig
from pipeline.errors import UserError
from pipeline.output.survey import spread_evenly
from pipeline.run.plan import CORES_PER_GPU_NEEDED, MachineResources, plan_workers

EIGHT_GPUS = (64, 8)


def planned(machines, shards=100, **settings):
    machines = [MachineResources(*sizes, node_id=f"node{place}") for place, sizes in enumerate(machines)]
    return plan_workers(RunConfig(**settings), machines, shards)


def cpus_of(plan):
    return sorted(shape.cpus for shape in plan.shapes)


def notes_on_gpus(plan):
    return [note for note in plan.notes if "GPUs get no worker" in note]


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
        ([(4,)], {}, [4], 0.0),
        ([(12,)], {}, [12], 0.0),
        ([(32,)], {}, 4 * [8], 0.0),
        ([(32,)], {"cpus_per_worker": 4}, 8 * [4], 0.0),
        ([(8,)], {"workers": 99, "cpus_per_worker": 2}, 4 * [2], 0.0),
        ([(4,), (4,)], {}, 2 * [4], 0.0),
        ([(4,), (64,)], {}, [4, *(8 * [8])], 0.0),
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
    assert planned([(1,)]).notes == ()


def test_only_workers_that_differ_are_meant_for_one_machine():
    assert {shape.node_id for shape in planned([EIGHT_GPUS, EIGHT_GPUS]).shapes} == {""}
    mixed = planned([(16, 8), (64, 1)]).shapes
    assert {(shape.node_id, shape.cpus) for shape in mixed} == {("node0", 2), ("node1", 32)}


machine_sizes = st.lists(st.tuples(st.integers(0, 128), st.integers(0, 10)), min_size=1, max_size=6)


@given(
    machine_sizes,
    st.integers(1, 200),
    st.one_of(st.none(), st.integers(1, 40)),
    st.one_of(st.none(), st.integers(1, 40)),
    st.sampled_from([0, 0.1, 0.25, 0.3, 0.5, 1]),
)
def test_every_gpu_has_a_worker_or_is_named_and_no_machine_is_overbooked(
    machines, shards, workers, cpus, gpus
):
    settings = {"workers": workers, "cpus_per_worker": cpus, "gpus_per_worker": gpus}
    try:
        plan = planned(machines, shards, **settings)
    except UserError:
        usable = [size for size in machines if size[1] or not (gpus and any(gpu for _, gpu in machines))]
        assert max(size[0] for size in usable) < (cpus or 1)
        return
    assert 1 <= len(plan.shapes) <= min(shards, workers or shards)
    has_gpus = bool(gpus and any(gpu for _, gpu in machines))
    per_gpu = int(1 / gpus + 1e-9) if has_gpus else 0
    # as Ray does: a worker goes to its own machine, else to any with room
    free = [[cores, gpu * per_gpu] for cores, gpu in machines]
    for shape in plan.shapes:
        assert cpus is None or shape.cpus == cpus
        places = [int(shape.node_id.removeprefix("node"))] if shape.node_id else range(len(machines))
        place = next(
            place
            for place in places
            if free[place][0] >= shape.cpus and (not has_gpus or free[place][1] >= 1)
        )
        free[place][0] -= shape.cpus
        free[place][1] -= has_gpus
    named = sum(int(found) for note in plan.notes for found in re.findall(r"(\d+) of \d+ GPUs get", note))
    total = sum(gpu for _, gpu in machines)
    used = -(-len(plan.shapes) // per_gpu) if has_gpus else 0
    # workers on several machines may leave shares of several GPUs free
    assert used <= total - named <= len(plan.shapes) * has_gpus


def test_no_more_workers_than_shards_are_planned():
    assert len(planned([EIGHT_GPUS], shards=2).shapes) == 2


def test_the_device_follows_the_plan():
    assert planned([EIGHT_GPUS], shards=1).device == "cuda"
    assert planned([(2,)], shards=1).device == "cpu"


def test_the_cores_of_workers_are_shown_as_one_number_or_as_a_range():
    assert planned([EIGHT_GPUS]).cpus_text == "8"
    assert planned([(16, 8), (64, 1)]).cpus_text == "2 to 32"


@pytest.mark.parametrize(
    ("machines", "settings", "message"),
    [
        (
            [(4,), (4,)],
            {"cpus_per_worker": 8},
            "run.cpus_per_worker is 8; the largest machine has 4 CPU core",
        ),
        (
            [(64,), (4, 2)],
            {"cpus_per_worker": 8},
            "run.cpus_per_worker is 8; the largest machine with GPUs has 4 CPU core",
        ),
        ([(64,), (0, 2)], {}, "run.cpus_per_worker is 1; the largest machine with GPUs has 0 CPU core"),
    ],
)
def test_a_worker_larger_than_any_machine_is_refused(machines, settings, message):
    with pytest.raises(UserError, match=message):
        planned(machines, shards=1, **settings)


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
