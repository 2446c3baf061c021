"""Count the outcomes of a run's shards, and decide at its end whether the job is complete."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config.schema import RunConfig
from pipeline.errors import DamagedFileError, OutputError, UserError
from pipeline.output.counts import ShardCounts, total_counts
from pipeline.output.folder import ANNOTATIONS, SUCCESS_FILE
from pipeline.output.runs import RunState
from pipeline.output.status import FolderState, exceeds_budget, read_state, reason_at_end, worst_first
from pipeline.run import job as jobs
from pipeline.run.job import Job
from pipeline.run.progress import Progress
from pipeline.run.shard_queue import GivenUp
from pipeline.storage import ShardSource
from pipeline.text import first_few, printable


@dataclass(frozen=True)
class JobResult:
    """How a run ended.

    Attributes:
        state: shard and sample counts of this run.
        failed: URL and last error of every shard given up.
        damaged: URL and reason of every shard whose archive could not be read to its end.
        damaged_accepted: whether damaged shards do not keep the job from being complete
            (`run.accept_damaged`).
        stopped: why the run stopped early, or why the job is not complete although the run reached its end;
            empty otherwise.
        torn: URLs of shards whose two files did not belong together and that must be annotated again.
        totals: outcomes of all samples of the job; None while shards are left or given up.
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
        """Whether every shard of the job is published and nothing stopped the run."""
        return not self.stopped and not self.state.shards_failed and not self.state.shards_left


def first_state(job: Job) -> RunState:
    """Return the state at the start of a run: what earlier runs did."""
    ids = {shard.shard_id for shard in job.shards}
    return RunState(
        shards_total=len(job.shards),
        shards_skipped=len(ids & job.done),
        shards_damaged=len(job.damaged),
    )


def _with_counts(run: RunConfig, state: RunState, shard: ShardSource, counts: ShardCounts) -> RunState:
    """Return the state with the samples of one more finished shard."""
    state = replace(state, counts=state.counts + counts)
    if not exceeds_budget(run, counts):
        return state
    shards = [*state.worst_shards, (shard.canonical_url, counts.failed, counts.samples_in)]
    return replace(state, shards_over_budget=state.shards_over_budget + 1, worst_shards=worst_first(shards))


class RunTally:
    """Count the shards of a run by outcome, and record failures in the output folder.

    Args:
        job: the job.
        progress: receives a message about each damaged or failed shard.

    Attributes:
        state: counts of shards, and of the samples in finished ones.
    """

    def __init__(self, job: Job, progress: Progress) -> None:
        self.state = first_state(job)
        self._job = job
        self._progress = progress
        self._listed = job.listed
        self._failed: list[tuple[str, str]] = []
        self._damaged: list[tuple[str, str]] = []

    def add_published(self, shard: ShardSource, counts: ShardCounts, damage: str) -> None:
        """Count a published shard; `damage` says what is wrong with its archive, or is empty."""
        if shard.shard_id in self._job.failed:
            jobs.forget_failure(self._job.folder, shard.shard_id)
        state = _with_counts(self._job.config.run, self.state, shard, counts)
        if damage:
            self._damaged.append((shard.canonical_url, damage))
            self._progress.say(f"{shard.canonical_url}: damaged: {damage}; its intact samples are annotated")
            self.state = replace(state, shards_damaged=state.shards_damaged + 1)
        else:
            self.state = replace(state, shards_done=state.shards_done + 1)

    def add_if_published(self, shard: ShardSource) -> bool:
        """Count a lost worker's shard if both its files exist, of one attempt at the listed input.

        Returns:
            Whether the shard was published.
        """
        folder, shard_id = self._job.folder, shard.shard_id
        try:
            footer = folder.checked_footer(self._listed[shard_id], self._job.stamp.config_hash)
        except (DamagedFileError, OutputError):
            # redone where it cannot be read either
            return False
        damage = folder.damage_reason(shard_id) if footer.state == "damaged" else ""
        self.add_published(shard, footer.counts(), damage)
        return True

    def add_given_up(self, given_up: GivenUp) -> None:
        """Count a shard that is given up, and record it in OUT/failed/."""
        shard = given_up.shard
        jobs.record_failure(self._job.folder, shard, given_up.attempts, given_up.message)
        self._failed.append((shard.canonical_url, given_up.message))
        self.state = replace(self.state, shards_failed=self.state.shards_failed + 1)
        self._progress.say(
            f"{shard.canonical_url}: given up after {given_up.attempts} attempt(s): {given_up.message}"
        )

    def result(self, state: RunState, stopped: str) -> JobResult:
        """Return the result of the run, given its last state and why it stopped early, if it did."""
        return JobResult(state, tuple(self._failed), tuple(self._damaged), stopped=stopped)


def concluded(job: Job, result: JobResult) -> JobResult:
    """Add the failed and damaged shards of earlier runs to a result, and write or remove OUT/_SUCCESS.

    OUT/_SUCCESS exists afterwards if and only if the job is complete.
    """
    given_up = [
        (shard.canonical_url, "given up in an earlier run")
        for shard in job.shards
        if shard.shard_id in job.given_up
    ]
    damaged = [
        (shard.canonical_url, job.folder.damage_reason(shard.shard_id))
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
    """Check every footer against the list of shards, apply the error budget, and write OUT/_SUCCESS."""
    state = read_state(job.folder, job.rows, job.stamp.config_hash)
    if others := _work_of_others(job, state):
        return replace(result, stopped=others)
    # the archive of a shard that had no record of damage at the start may be damaged all the same
    sound = {*state.done, *(set(state.damaged) - job.done)}
    torn = [shard for shard in job.shards if shard.shard_id not in sound]
    if torn:
        job.folder.remove(SUCCESS_FILE)
        job.folder.set_aside(shard.shard_id for shard in torn)
        urls = tuple(shard.canonical_url for shard in torn)
        return replace(
            result,
            state=replace(result.state, shards_skipped=result.state.shards_skipped - len(torn)),
            stopped="shards with files of different attempts, configurations or inputs; run the same command "
            f"again to redo them: {first_few(urls)}",
            torn=urls,
        )
    total = total_counts((state.counts or {}).values())
    result = replace(result, totals=total, stopped=reason_at_end(job.config.run, total, state.counts_by_url))
    if result.complete:
        jobs.record_success(job.folder, len(job.shards), len(result.damaged), total)
    return result


def _work_of_others(job: Job, state: FolderState) -> str:
    """Return what another job changed in the folder since this one began; empty if nothing."""
    try:
        record, rows = job.folder.job(), job.folder.shard_rows()
    except (UserError, DamagedFileError) as error:
        return f"the output folder changed during the run: {error}; run the same command again"
    if record.config_hash != job.stamp.config_hash or rows != list(job.rows):
        what = "configuration" if record.config_hash != job.stamp.config_hash else "list of shards"
        return (
            f"another job with another {what} wrote to this folder during the run; wait until it ends and "
            "run the command whose results you want again, or choose another output.dir"
        )
    if state.strays:
        return (
            f"{ANNOTATIONS}/ received {len(state.strays):,} file(s) that belong to no shard of this job, "
            f"such as {printable(state.strays[0])}; wait until other jobs on this folder end, then run this "
            "command again"
        )
    return ""
