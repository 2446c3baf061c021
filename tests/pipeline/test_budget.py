"""A job with too many failures stops early and reports why."""

import pytest

from pipeline.config.schema import RunConfig
from pipeline.output.counts import ShardCounts
from pipeline.output.runs import RunState
from pipeline.output.status import reason_at_end, reason_to_stop


def counts(annotated=0, failed=0, **kinds):
    named = {f"decode/{kind}": number for kind, number in kinds.items()}
    return ShardCounts(annotated=annotated, failed=failed, errors_by_kind=named)


NOTHING = ShardCounts()


def state(done=NOTHING, in_flight=NOTHING, shards_failed=0):
    return RunState(10, 0, shards_failed=shards_failed, counts=done, live_counts=in_flight)


def test_a_share_of_failed_samples_above_the_budget_stops_the_job_and_names_the_kinds():
    reason = reason_to_stop(RunConfig(error_budget=0.2), state(counts(799, 201, truncated=150, too_large=51)))
    assert reason == (
        "201 of 1000 samples failed; run.error_budget is 0.2 (decode/truncated 150; decode/too_large 51)"
    )


@pytest.mark.parametrize("done", [counts(800, 200), counts(0, 999), counts()])
def test_within_the_budget_or_before_a_thousand_samples_the_job_goes_on(done):
    assert reason_to_stop(RunConfig(error_budget=0.2), state(done)) == ""


def test_only_finished_shards_count_so_one_bad_shard_at_the_front_stops_nothing():
    assert reason_to_stop(RunConfig(error_budget=0.5), state(counts(600), counts(0, 3000))) == ""


@pytest.mark.parametrize(
    ("found", "complete"),
    [(counts(0, 60), False), (counts(26, 91), False), (counts(8, 2), True), (counts(), False)],
)
def test_at_the_end_the_budget_holds_whatever_the_size_of_the_job(found, complete):
    assert (reason_at_end(RunConfig(error_budget=0.2), found) == "") is complete


def test_the_reason_names_a_key_of_each_kind():
    failed = ShardCounts(
        failed=3, errors_by_kind={"decode/cut": 3}, error_examples={"decode/cut": "000007"}, error_rows=3
    )
    assert "decode/cut 3, for example 000007" in reason_at_end(RunConfig(), failed)


def test_a_budget_of_one_never_stops():
    assert reason_to_stop(RunConfig(error_budget=1.0), state(counts(0, 5000))) == ""


@pytest.mark.parametrize(("allowed", "given_up", "stops"), [(None, 99, False), (2, 2, False), (2, 3, True)])
def test_more_shards_given_up_than_allowed_stop_the_job(allowed, given_up, stops):
    reason = reason_to_stop(RunConfig(max_failed_shards=allowed), state(shards_failed=given_up))
    assert bool(reason) == stops
