"""When a hopeless job stops early, and when one that came to its end is not complete."""

from __future__ import annotations

from pipeline.config.schema import RunConfig
from pipeline.output.counts import ShardCounts, told_kinds
from pipeline.output.run_state import RunState

BUDGET_SAMPLES = 1000


def reason_to_stop(run: RunConfig, state: RunState) -> str:
    """Why a run should not go on; empty where it should. Only finished shards count."""
    if run.max_failed_shards is not None and state.shards_failed > run.max_failed_shards:
        return f"{state.shards_failed} shards given up; run.max_failed_shards is {run.max_failed_shards}"
    return reason_at_end(run, state.counts) if state.counts.samples_in >= BUDGET_SAMPLES else ""


def reason_at_end(run: RunConfig, counts: ShardCounts) -> str:
    """Why a job with these counts is not complete; empty where it is. Holds whatever the job's size."""
    if not counts.samples_in and counts.error_rows:
        return f"not one sample could be read ({told_kinds(counts)})"
    if counts.failed <= run.error_budget * counts.samples_in:
        return ""
    share = f"{counts.failed} of {counts.samples_in} samples failed"
    return f"{share}; run.error_budget is {run.error_budget:g} ({told_kinds(counts)})"
