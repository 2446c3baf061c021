"""The `annotate` command: prepare, run, and tell how it ended."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import storage
from pipeline.config.schema import JobConfig
from pipeline.console import PrintableConsole
from pipeline.output.counts import ShardCounts, told_kinds
from pipeline.output.runs import recorded_run
from pipeline.run import job as jobs
from pipeline.run.dispatcher import run_job
from pipeline.run.estimate import dry_run, told_dry_run, told_extrapolation
from pipeline.run.job import Job, prepare_job
from pipeline.run.outcome import JobResult
from pipeline.run.progress import Progress, SharedProgress, open_progress
from pipeline.storage import ShardSource
from pipeline.text import as_duration, as_share, first_few

DONE, INCOMPLETE = 0, 3
NAMED_SHARDS = 10


def annotate_with_config(
    config: JobConfig, console: PrintableConsole, *, max_shards: int | None = None, moves: Sequence[str] = ()
) -> int:
    """Run a job to its end, showing progress.

    Args:
        config: the job's configuration.
        console: takes progress and result.
        max_shards: stop after as many, and extrapolate from them; None: do all that is left.
        moves: OLD=NEW for each folder or file of shards that lies elsewhere now.

    Returns:
        The exit code: 0, or 3 where shards are damaged, failed or left, or too many samples failed.

    Raises:
        PipelineError: as `prepare_job` and `run_job` do.
    """
    job = prepare_job(config, moves)
    try:
        with (
            open_progress(console, config.run.progress_interval_s) as shown,
            recorded_run(job.folder) as recorder,
        ):
            result = _run(job, SharedProgress([shown, recorder]), max_shards)
            recorder.close(_ending(result))
    except KeyboardInterrupt:
        _say(console, "interrupted; run the same command again to resume")
        raise
    finally:
        job.folder.close()
    _tell(result, storage.shown_url(config.output.dir), console)
    if not result.complete and not result.stopped:
        _tell_left(job, result, max_shards, console)
    return DONE if result.complete else INCOMPLETE


def tell_dry_run(config: JobConfig, console: PrintableConsole, moves: Sequence[str] = ()) -> None:
    """List what a job would do; nothing is written or started.

    Raises:
        PipelineError: the shards or the output cannot be listed.
    """
    for line in told_dry_run(dry_run(config, moves)):
        _say(console, line)


def _run(job: Job, progress: Progress, max_shards: int | None) -> JobResult:
    for warning in job.warnings:
        progress.say(f"warning: {warning}")
    return run_job(job, progress, max_shards=max_shards)


def _ending(result: JobResult) -> str:
    if result.stopped:
        return f"stopped early: {result.stopped}"
    return "complete" if result.complete else "shards damaged, failed or left"


def _tell(result: JobResult, output_dir: str, console: PrintableConsole) -> None:
    state, counts = result.state, result.state.counts
    if result.stopped:
        _say(console, f"{'not complete' if result.totals else 'stopped early'}: {result.stopped}")
    _name_shards("damaged", result.damaged, f"{output_dir}/damaged", console)
    _name_shards("given up", result.failed, f"{output_dir}/failed", console)
    if not state.shards_done and not state.shards_left and not state.shards_failed and result.totals:
        counts = result.totals
        _say(
            console,
            f"nothing to do: all {state.shards_total:,} shard(s) were annotated before; see {output_dir}\n"
            f"{_samples_line(counts)}",
        )
    else:
        _say(
            console,
            f"shards: {state.shards_done} done, {state.shards_skipped} done before, "
            f"{state.shards_damaged} damaged, {state.shards_failed} failed, {state.shards_left} left\n"
            f"samples: {counts.samples_in:,} in {as_duration(state.elapsed_s)} ({state.samples_per_s:,.1f}/s "
            f"once a model was loaded): "
            f"{counts.annotated:,} annotated, {counts.empty:,} empty, {counts.failed:,} failed\n"
            f"images: {state.measures.images_decoded:,} decoded; "
            f"device busy {as_share(state.measures.device_busy_share)} of the time\n"
            f"rows: {counts.rows:,} in {output_dir}/annotations",
        )
    if counts.error_rows:
        _say(console, f"errors: {counts.error_rows:,} in {output_dir}/errors: {told_kinds(counts)}")


def _samples_line(counts: ShardCounts) -> str:
    return (
        f"samples: {counts.samples_in:,}: {counts.annotated:,} annotated, {counts.empty:,} empty, "
        f"{counts.failed:,} failed"
    )


def _name_shards(
    what: str, shards: Sequence[tuple[str, str]], records: str, console: PrintableConsole
) -> None:
    for url, message in shards[:NAMED_SHARDS]:
        _say(console, f"{what}: {url}: {message}")
    if len(shards) > NAMED_SHARDS:
        _say(console, f"... and {len(shards) - NAMED_SHARDS:,} more {what}; see {records}/")


def _tell_left(job: Job, result: JobResult, max_shards: int | None, console: PrintableConsole) -> None:
    ids = jobs.ids_of(job.folder)
    settled = ids.annotations | ids.failed
    left = [shard.canonical_url for shard in job.shards if shard.shard_id not in settled]
    if left:
        _say(console, f"left: {first_few(left, NAMED_SHARDS)}; run the same command again to resume")
    if max_shards is not None:
        newly_done: list[ShardSource] = [shard for shard in job.todo if shard.shard_id in ids.annotations]
        for line in told_extrapolation(job, result.state, newly_done):
            _say(console, line)


def _say(console: PrintableConsole, message: str) -> None:
    console.print(message, soft_wrap=True)
