"""The `annotate` command: prepare, run, and tell how it ended."""

from __future__ import annotations

from rich.console import Console

from pipeline.config import JobConfig
from pipeline.job import prepare_job
from pipeline.progress import as_duration, open_progress
from pipeline.result import JobResult
from pipeline.run import run_job

DONE, INCOMPLETE = 0, 3
NAMED_FAILURES = 10


def annotate_with_config(config: JobConfig, console: Console) -> int:
    """Run a job to its end, showing progress.

    Returns:
        The exit code: 0, or 3 where shards failed or are left.

    Raises:
        PipelineError: as `prepare_job` and `run_job` do.
    """
    job = prepare_job(config)
    try:
        with open_progress(console, config.run.progress_interval_s) as progress:
            for warning in job.warnings:
                progress.say(f"warning: {warning}")
            result = run_job(job, progress)
    except KeyboardInterrupt:
        _say(console, f"interrupted; the same command goes on where {config.output.dir} ends")
        raise
    _tell(result, config.output.dir, console)
    return DONE if result.complete else INCOMPLETE


def _tell(result: JobResult, output_dir: str, console: Console) -> None:
    state = result.state
    if result.stopped:
        _say(console, f"stopped early: {result.stopped}")
    for url, message in result.failed[:NAMED_FAILURES]:
        _say(console, f"given up: {url}: {message}")
    if len(result.failed) > NAMED_FAILURES:
        _say(console, f"... and {len(result.failed) - NAMED_FAILURES} more; see {output_dir}/failed/")
    if result.complete and not state.shards_done:
        _say(console, f"nothing to do: all {state.shards_total} shard(s) were done before; see {output_dir}")
        return
    counts = state.counts
    rate = counts.samples_in / state.elapsed_s if state.elapsed_s else 0.0
    _say(
        console,
        f"shards: {state.shards_done} done, {state.shards_skipped} done before, "
        f"{state.shards_failed} failed, {state.shards_left} left\n"
        f"samples: {counts.samples_in:,} in {as_duration(state.elapsed_s)} ({rate:,.1f}/s): "
        f"{counts.annotated:,} annotated, {counts.empty:,} empty, {counts.failed:,} failed\n"
        f"rows: {counts.rows:,} in {output_dir}/annotations",
    )


def _say(console: Console, message: str) -> None:
    console.print(message, markup=False, highlight=False, soft_wrap=True)
