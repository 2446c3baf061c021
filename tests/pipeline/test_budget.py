"""A job with too many failed samples stops early, if several shards are bad, and names the worst."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import RunConfig
from pipeline.output.counts import ShardCounts, total_counts
from pipeline.output.runs import MAX_WORST_SHARDS, RunState
from pipeline.output.status import BUDGET_SAMPLES, BUDGET_SHARDS, reason_at_end, reason_to_stop
from pipeline.run.job import prepare_job
from pipeline.run.outcome import RunTally
from pipeline.storage import ShardSource
from tests.helpers.corpus import demo_job

SHARDS = 12


def counts(annotated=0, failed=0, **kinds):
    named = {f"decode/{kind}": number for kind, number in kinds.items()}
    return ShardCounts(annotated=annotated, failed=failed, errors_by_kind=named)


class Silent:
    def update(self, state):
        pass

    def say(self, message):
        pass


@pytest.fixture(scope="module")
def state_after(tmp_path_factory):
    """Return a function that returns the state of a run after shards with some counts are published."""
    folder = tmp_path_factory.mktemp("job")
    paths = [folder / f"{number:02}.tar" for number in range(SHARDS)]
    for path in paths:
        path.touch()
    jobs = {}

    def after(run, shards):
        if run.error_budget not in jobs:
            settings = run.model_dump()
            out = folder / f"out-{len(jobs)}"
            jobs[run.error_budget] = prepare_job(demo_job(paths, out, run=settings))
        tally = RunTally(jobs[run.error_budget], Silent())
        for number, found in shards:
            url = f"s3://corpus/{number:02}.tar"
            tally.add_published(ShardSource(f"{number:02}", url, url, None), found, "")
        return tally.state

    return after


BUDGETS = st.sampled_from([0.0, 0.2, 0.5, 1.0])
COUNTS = st.builds(counts, annotated=st.integers(0, 900), failed=st.integers(0, 900))
FINISHED = st.lists(COUNTS, max_size=SHARDS).map(lambda found: list(enumerate(found)))


@given(budget=BUDGETS, shards=FINISHED, data=st.data())
def test_the_decision_and_the_named_shards_do_not_depend_on_the_order_of_shards(
    state_after, budget, shards, data
):
    run = RunConfig(error_budget=budget)
    state, other = state_after(run, shards), state_after(run, data.draw(st.permutations(shards)))
    assert reason_to_stop(run, state) == reason_to_stop(run, other)
    assert (state.worst_shards, state.shards_over_budget) == (other.worst_shards, other.shards_over_budget)


@given(budget=BUDGETS, shards=FINISHED)
def test_a_run_stops_early_only_if_enough_samples_and_shards_are_finished_and_bad(
    state_after, budget, shards
):
    run = RunConfig(error_budget=budget)
    total = total_counts(found for _, found in shards)
    bad = [found for _, found in shards if found.failed > budget * found.samples_in]
    stops = (
        total.samples_in >= BUDGET_SAMPLES
        and total.failed > budget * total.samples_in
        and len(bad) >= BUDGET_SHARDS
    )
    assert bool(reason_to_stop(run, state_after(run, shards))) is stops


@given(budget=BUDGETS, shards=FINISHED)
def test_at_most_five_shards_are_kept_and_none_that_is_dropped_is_worse(state_after, budget, shards):
    run = RunConfig(error_budget=budget)
    state = state_after(run, shards)
    shares = sorted((found.failed / found.samples_in for _, found in shards if found.failed), reverse=True)
    over = [share for share in shares if share > budget]
    assert state.shards_over_budget == len(over)
    assert [failed / samples for _, failed, samples in state.worst_shards] == over[:MAX_WORST_SHARDS]


@given(
    budget=BUDGETS,
    good=st.lists(st.integers(1, 900).map(counts), max_size=SHARDS),
    failed=st.lists(st.integers(1, 10**6), max_size=BUDGET_SHARDS - 1),
)
def test_one_or_two_bad_shards_of_any_size_stop_nothing_at_the_front_or_elsewhere(
    state_after, budget, good, failed
):
    run = RunConfig(error_budget=budget)
    bad = [counts(0, number) for number in failed]
    for shards in ([*bad, *good], [*good, *bad]):
        assert reason_to_stop(run, state_after(run, list(enumerate(shards)))) == ""


@given(budget=BUDGETS, shards=FINISHED)
def test_a_run_that_stops_early_could_not_have_been_complete_with_these_shards_alone(
    state_after, budget, shards
):
    run = RunConfig(error_budget=budget)
    by_url = {f"s3://corpus/{number:02}.tar": found for number, found in shards}
    early = reason_to_stop(run, state_after(run, shards))
    assert early in ("", reason_at_end(run, total_counts(by_url.values()), by_url))


def test_the_reason_names_the_kinds_of_errors_and_the_worst_shards(state_after):
    shards = [counts(700, 0), counts(99, 101, cut=101), counts(0, 50, cut=50), counts(20, 130, bomb=130)]
    run = RunConfig(error_budget=0.2)
    assert reason_to_stop(run, state_after(run, list(enumerate(shards)))) == (
        "281 of 1100 samples failed; run.error_budget is 0.2 (decode/cut 151; decode/bomb 130); "
        "3 shard(s) above it, worst first: s3://corpus/02.tar (50 of 50), s3://corpus/03.tar (130 of 150), "
        "s3://corpus/01.tar (101 of 200)"
    )


def test_where_many_shards_are_bad_five_are_named_and_the_others_counted(state_after):
    run = RunConfig(error_budget=0.2)
    shards = [(number, counts(0, 1000)) for number in range(8)]
    reason = reason_to_stop(run, state_after(run, shards))
    assert "8 shard(s) above it, worst first: s3://corpus/00.tar (1,000 of 1,000), " in reason
    assert reason.endswith("s3://corpus/04.tar (1,000 of 1,000), ...")


def test_shards_in_flight_do_not_count():
    state = RunState(10, 0, counts=counts(600), live_counts=counts(0, 3000), shards_over_budget=0)
    assert reason_to_stop(RunConfig(error_budget=0.5), state) == ""


@pytest.mark.parametrize(
    ("found", "complete"),
    [(counts(0, 60), False), (counts(26, 91), False), (counts(8, 2), True), (counts(), False)],
)
def test_at_the_end_the_budget_applies_whatever_the_size_of_the_job(found, complete):
    assert (reason_at_end(RunConfig(error_budget=0.2), found) == "") is complete


def test_at_the_end_the_worst_shards_are_named_even_if_there_is_only_one():
    by_url = {"s3://corpus/a.tar": counts(90), "s3://corpus/b.tar": counts(1, 60)}
    reason = reason_at_end(RunConfig(error_budget=0.2), total_counts(by_url.values()), by_url)
    assert reason.endswith("1 shard(s) above it, worst first: s3://corpus/b.tar (60 of 61)")


def test_the_reason_names_a_key_of_each_kind():
    failed = ShardCounts(
        failed=3, errors_by_kind={"decode/cut": 3}, error_examples={"decode/cut": "000007"}, error_rows=3
    )
    assert "decode/cut 3, for example 000007" in reason_at_end(RunConfig(), failed)


@pytest.mark.parametrize(("allowed", "given_up", "stops"), [(None, 99, False), (2, 2, False), (2, 3, True)])
def test_more_shards_given_up_than_allowed_stop_the_job(allowed, given_up, stops):
    reason = reason_to_stop(RunConfig(max_failed_shards=allowed), RunState(10, 0, shards_failed=given_up))
    assert bool(reason) == stops
