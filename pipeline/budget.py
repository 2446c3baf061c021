"""When a hopeless job stops early."""

from __future__ import annotations

from pipeline.progress import RunState
from pipeline.settings import RunConfig

BUDGET_SAMPLES = 1000


def reason_to_stop(run: RunConfig, state: RunState) -> str:
    """Why a run should not go on; empty where it should.

    Samples of shards in hand count too, or a job of large shards would go on for long without hope.
    """
    counts, given_up = state.counts + state.live_counts, state.shards_failed
    if run.max_failed_shards is not None and given_up > run.max_failed_shards:
        return f"{given_up} shards given up; run.max_failed_shards is {run.max_failed_shards}"
    if counts.samples_in < BUDGET_SAMPLES or counts.failed <= run.error_budget * counts.samples_in:
        return ""
    kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(counts.errors_by_kind.items()))
    share = f"{counts.failed} of {counts.samples_in} samples failed"
    return f"{share}; run.error_budget is {run.error_budget:g} ({kinds})"
