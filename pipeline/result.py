"""How a run ended, and whether the job is complete with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline import job as jobs
from pipeline import storage
from pipeline.job import Job
from pipeline.progress import RunState
from pipeline.records import total_counts
from pipeline.writer import checked_counts


@dataclass(frozen=True)
class JobResult:
    """How a run ended.

    Attributes:
        state: shard and sample counts of this run.
        failed: canonical URL and last error of every shard given up.
        stopped: why the run stopped early; empty where it did not.
        torn: canonical URLs of shards whose two files did not belong together and that are to be done again.
    """

    state: RunState
    failed: tuple[tuple[str, str], ...] = ()
    stopped: str = ""
    torn: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every shard of the job is done."""
        return not self.stopped and not self.state.shards_failed and not self.state.shards_left


def first_state(job: Job) -> RunState:
    """Where a run begins: with what earlier runs have done."""
    given_up = sum(shard.shard_id in job.given_up for shard in job.shards)
    return RunState(shards_total=len(job.shards), shards_skipped=len(job.shards) - len(job.todo) - given_up)


def concluded(job: Job, result: JobResult) -> JobResult:
    """Close a run: count what earlier runs gave up, and write OUT/_SUCCESS where every shard is done."""
    left_alone = [
        (shard.canonical_url, "given up in an earlier run")
        for shard in job.shards
        if shard.shard_id in job.given_up
    ]
    result = replace(
        result,
        state=replace(result.state, shards_failed=result.state.shards_failed + len(left_alone)),
        failed=(*result.failed, *left_alone),
    )
    return _succeeded(job, result) if result.complete else result


def _succeeded(job: Job, result: JobResult) -> JobResult:
    """Write OUT/_SUCCESS, unless files do not belong together or not one sample could be read."""
    out = job.config.output.dir
    counts = checked_counts(out, [shard.shard_id for shard in job.shards], job.stamp.config_hash)
    torn = [shard for shard in job.shards if counts[shard.shard_id] is None]
    for shard in torn:
        storage.remove(storage.join_url(out, "annotations"), f"{shard.shard_id}.parquet")
    if torn:
        storage.remove(out, jobs.SUCCESS_FILE)
        names = ", ".join(shard.canonical_url for shard in torn)
        state = replace(result.state, shards_skipped=result.state.shards_skipped - len(torn))
        return replace(
            result,
            state=state,
            stopped=f"files of different attempts or configurations; the same command redoes: {names}",
            torn=tuple(shard.canonical_url for shard in torn),
        )
    total = total_counts(found for found in counts.values() if found is not None)
    if not total.samples_in and total.error_rows:
        kinds = ", ".join(sorted(total.errors_by_kind))
        return replace(result, stopped=f"not one sample could be read ({kinds}); see {out}/errors")
    if not storage.exists(out, jobs.SUCCESS_FILE):
        jobs.record_success(out, len(job.shards), total)
    return result
