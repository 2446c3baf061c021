"""How a run ended, and whether the job is complete with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.errors import DamagedFileError, UserError
from pipeline.output.budget import reason_at_end
from pipeline.output.counts import ShardCounts, total_counts
from pipeline.output.folder import ANNOTATIONS, SUCCESS_FILE, stray_annotations
from pipeline.output.footers import checked_footers
from pipeline.output.reading import FooterRecord, damage_of, read_job_record, read_shard_rows
from pipeline.output.run_state import RunState
from pipeline.run import job as jobs
from pipeline.run.job import Job
from pipeline.text import printable


@dataclass(frozen=True)
class JobResult:
    """How a run ended.

    Attributes:
        state: shard and sample counts of this run.
        failed: URL and last error of every shard given up.
        damaged: URL and reason of every shard whose archive was not read to a sound end.
        damaged_accepted: whether the job is complete all the same, by `run.accept_damaged`.
        stopped: why the run stopped early, or is not complete though it came to its end; empty otherwise.
        torn: URLs of shards whose two files did not belong together and that are to be done again.
        totals: outcomes of all samples of the job; None where shards are left or given up.
    """

    state: RunState
    failed: tuple[tuple[str, str], ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()
    damaged_accepted: bool = False
    stopped: str = ""
    torn: tuple[str, ...] = ()
    totals: ShardCounts | None = None

    @property
    def complete(self) -> bool:
        """Whether every shard of the job is done, or damaged where that is accepted."""
        return self.settled and (self.damaged_accepted or not self.damaged)

    @property
    def settled(self) -> bool:
        """Whether every shard of the job is published and nothing speaks against its end."""
        return not self.stopped and not self.state.shards_failed and not self.state.shards_left


def first_state(job: Job) -> RunState:
    """Where a run begins: with what earlier runs have done."""
    given_up = sum(shard.shard_id in job.given_up for shard in job.shards)
    return RunState(
        shards_total=len(job.shards),
        shards_skipped=len(job.shards) - len(job.todo) - given_up - len(job.damaged),
        shards_damaged=len(job.damaged),
    )


def concluded(job: Job, result: JobResult) -> JobResult:
    """Close a run: count what earlier runs left, and write OUT/_SUCCESS where the job is complete.

    Without completeness there is no OUT/_SUCCESS, whatever an earlier run found.
    """
    given_up = [
        (shard.canonical_url, "given up in an earlier run")
        for shard in job.shards
        if shard.shard_id in job.given_up
    ]
    damaged = [
        (shard.canonical_url, damage_of(job.folder.url, shard.shard_id))
        for shard in job.shards
        if shard.shard_id in job.damaged
    ]
    result = replace(
        result,
        state=replace(result.state, shards_failed=result.state.shards_failed + len(given_up)),
        failed=(*result.failed, *given_up),
        damaged=(*damaged, *result.damaged),
        damaged_accepted=job.config.run.accept_damaged,
    )
    if result.settled:
        result = _checked_to_the_end(job, result)
    if not result.complete:
        job.folder.remove(SUCCESS_FILE)
    return result


def _checked_to_the_end(job: Job, result: JobResult) -> JobResult:
    """Hold every footer against the list of shards, look at the error budget, and write OUT/_SUCCESS."""
    if others := _work_of_others(job):
        return replace(result, stopped=others)
    footers = checked_footers(job.folder.url, job.listed, job.stamp.config_hash)
    torn = [shard for shard in job.shards if _is_torn(footers[shard.shard_id], shard.shard_id in job.done)]
    if torn:
        job.folder.remove(SUCCESS_FILE)
        job.folder.set_aside(shard.shard_id for shard in torn)
        names = ", ".join(shard.canonical_url for shard in torn)
        return replace(
            result,
            state=replace(result.state, shards_skipped=result.state.shards_skipped - len(torn)),
            stopped=f"files of different attempts, configurations or inputs; run the same command again to "
            f"redo: {names}",
            torn=tuple(shard.canonical_url for shard in torn),
        )
    total = total_counts(footer.counts() for footer in footers.values() if isinstance(footer, FooterRecord))
    result = replace(result, totals=total, stopped=reason_at_end(job.config.run, total))
    if result.complete:
        jobs.record_success(job.folder, len(job.shards), len(result.damaged), total)
    return result


def _work_of_others(job: Job) -> str:
    """What another job has done to the folder since this one began; empty where it is this job's alone."""
    try:
        record, rows = read_job_record(job.folder.url), read_shard_rows(job.folder.url)
    except (UserError, DamagedFileError) as error:
        return f"the folder is not as this job left it: {error}; run the same command again"
    if record.config_hash != job.stamp.config_hash or rows != list(job.rows):
        what = "configuration" if record.config_hash != job.stamp.config_hash else "list of shards"
        return (
            f"another job has written into this folder meanwhile, with another {what}: let one job end, then "
            "run the one that counts again, or choose another output.dir"
        )
    if foreign := stray_annotations(job.folder.url, job.listed):
        return (
            f"{len(foreign):,} file(s) of no listed shard came into {ANNOTATIONS}/ meanwhile, "
            f"such as {printable(foreign[0])}: let other jobs on this folder end, then run this command again"
        )
    return ""


def _is_torn(footer: FooterRecord | DamagedFileError, is_listed_as_done: bool) -> bool:
    """Whether files do not belong together; also those of a damaged archive whose record was lost."""
    return isinstance(footer, DamagedFileError) or (is_listed_as_done and footer.state != "done")
