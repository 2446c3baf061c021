"""Plan workers that fit on the machines of a cluster."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import RunConfig
from pipeline.errors import UserError
from pipeline.output.survey import spread_evenly
from pipeline.run.plan import plan_workers

EIGHT_GPUS = {"CPU": 64, "GPU": 8}


@pytest.mark.parametrize(
    ("machines", "settings", "planned"),
    [
        ([EIGHT_GPUS], {}, (8, 8, 1.0)),
        ([{"CPU": 16, "GPU": 8}], {}, (8, 2, 1.0)),
        ([EIGHT_GPUS], {"gpus_per_worker": 0.5}, (16, 4, 0.5)),
        ([EIGHT_GPUS], {"workers": 3}, (3, 8, 1.0)),
        ([EIGHT_GPUS], {"gpus_per_worker": 0, "cpus_per_worker": 4, "workers": 4}, (4, 4, 0.0)),
        ([{"CPU": 4}], {}, (1, 4, 0.0)),
        ([{"CPU": 32}], {}, (4, 8, 0.0)),
        ([{"CPU": 8}], {"workers": 99, "cpus_per_worker": 2}, (4, 2, 0.0)),
        ([{"CPU": 4}, {"CPU": 4}], {}, (1, 4, 0.0)),
        ([{"CPU": 32}] + 4 * [{"CPU": 4, "GPU": 1}], {}, (4, 4, 1.0)),
        ([{"CPU": 64, "GPU": 1}, {"CPU": 64, "GPU": 1}], {}, (2, 8, 1.0)),
        ([{"CPU": 64, "GPU": 3}, {"CPU": 64, "GPU": 3}], {"gpus_per_worker": 2}, (2, 8, 2.0)),
    ],
)
def test_no_worker_is_planned_that_no_machine_can_hold(machines, settings, planned):
    plan = plan_workers(RunConfig(**settings), machines, shards=100)
    assert (plan.workers, plan.cpus, plan.gpus) == planned


def test_no_more_workers_than_shards_are_planned():
    assert plan_workers(RunConfig(), [EIGHT_GPUS], shards=2).workers == 2


def test_the_device_follows_the_plan():
    assert plan_workers(RunConfig(), [EIGHT_GPUS], shards=1).device == "cuda"
    assert plan_workers(RunConfig(), [{"CPU": 2}], shards=1).device == "cpu"


@pytest.mark.parametrize(
    ("machines", "settings", "message"),
    [
        (
            [{"CPU": 4}, {"CPU": 4}],
            {"cpus_per_worker": 8},
            "cpus_per_worker is 8; the largest machine has 4",
        ),
        (
            [{"CPU": 4, "GPU": 2}] * 2,
            {"gpus_per_worker": 4},
            "gpus_per_worker is 4; the largest machine has 2",
        ),
    ],
)
def test_a_worker_larger_than_any_machine_is_refused(machines, settings, message):
    with pytest.raises(UserError, match=message):
        plan_workers(RunConfig(**settings), machines, shards=1)


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
