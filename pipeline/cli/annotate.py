"""The `annotate` command: prepare a job, run it with its progress shown, and report how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import INCOMPLETE, open_console
from pipeline.cli.completion import complete_override
from pipeline.errors import UserError
from pipeline.text import as_duration, first_few

if TYPE_CHECKING:
    from pipeline.config.schema import JobConfig
    from pipeline.console import PrintableConsole
    from pipeline.output.counts import ShardCounts
    from pipeline.run.job import Job
    from pipeline.run.outcome import JobResult

NAMED_SHARDS = 10


def annotate(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG.yaml", help="The job's configuration: a path or a URL.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys to set in place of the file's, such as run.batch_size=8.",
            autocompletion=complete_override,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List the shards, estimate the work, and check names, fields and output folder on the first "
            "samples of three shards; nothing is loaded, started or written. Exit code 1: the job would "
            "annotate nothing.",
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Annotate only N shards, spread evenly, and extrapolate to all of them."
        ),
    ] = None,
    moved: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="The shards of folder OLD are in folder NEW now; those annotated before are not annotated "
            "again. Repeatable.",
        ),
    ] = None,
) -> None:
    """Annotate shards: the main job. Runs on this machine, or on the Ray cluster that RAY_ADDRESS names."""
    from pipeline.config.load import load_config

    settings, moves, console = load_config(config, overrides or ()), moved or (), open_console()
    if not dry_run:
        raise typer.Exit(annotate_with_config(settings, console, max_shards=limit, moves=moves))
    from pipeline.run import estimate
    from pipeline.storage import with_plain_paths

    found = estimate.dry_run(settings, moves)
    for line in estimate.dry_run_lines(found):
        console.print(with_plain_paths(line), soft_wrap=True)
    if found.problems:
        problems = "\n".join(f"  {problem}" for problem in found.problems)
        raise UserError(f"the job would annotate nothing: {len(found.problems)} problem(s)\n{problems}")


def annotate_with_config(
    config: JobConfig, console: PrintableConsole, *, max_shards: int | None = None, moves: Sequence[str] = ()
) -> int:
    """Run a job to its end, showing its progress and its result.

    Args:
        config: the job's configuration.
        console: shows progress and result.
        max_shards: stop after so many shards, and extrapolate from them; None: annotate all that are left.
        moves: OLD=NEW for each folder or file of shards that has moved since it was annotated.

    Returns:
        The exit code: 0, or 3 where shards are damaged, failed or left, or too many samples failed.

    Raises:
        PipelineError: as `prepare_job` and `run_job` do.
    """
    from pipeline.run.job import prepare_job

    return run_shown(prepare_job(config, moves), console, max_shards=max_shards)


def run_shown(job: Job, console: PrintableConsole, *, max_shards: int | None = None) -> int:
    """Run a prepared job to its end; see `annotate_with_config`."""
    from pipeline.output.runs import recorded_run
    from pipeline.run.progress import SharedProgress, open_progress
    from pipeline.run.runner import run_job
    from pipeline.storage import shown_url, with_plain_paths

    try:
        with (
            open_progress(console, job.config.run.progress_interval_s) as shown,
            recorded_run(job.folder) as recorder,
        ):
            progress = SharedProgress([shown, recorder])
            progress.say(f"Results go to {shown_url(job.config.output.dir)}")
            for warning in job.warnings:
                progress.say(with_plain_paths(f"warning: {warning}"))
            result = run_job(job, progress, max_shards=max_shards)
            recorder.close(_ending(result))
    except KeyboardInterrupt:
        console.print("interrupted; run the same command again to resume", soft_wrap=True)
        raise
    finally:
        job.folder.close()
    for line in _result_lines(job, result, max_shards):
        console.print(with_plain_paths(line), soft_wrap=True)
    return 0 if result.complete else INCOMPLETE


def _ending(result: JobResult) -> str:
    if result.stopped:
        return f"stopped early: {result.stopped}"
    return "complete" if result.complete else "shards damaged, failed or left"


def _result_lines(job: Job, result: JobResult, max_shards: int | None) -> Iterator[str]:
    from pipeline.output.counts import error_kinds_text
    from pipeline.storage import shown_url

    output_dir, state = shown_url(job.config.output.dir), result.state
    if result.stopped:
        yield f"{'not complete' if result.totals else 'stopped early'}: {result.stopped}"
    for place in state.left_alone[:NAMED_SHARDS]:
        yield f"place left alone: {place}"
    if len(state.left_alone) > NAMED_SHARDS:
        yield f"... and {len(state.left_alone) - NAMED_SHARDS:,} more; see legrad status {output_dir}"
    yield from _shard_lines("damaged", result.damaged, f"{output_dir}/damaged")
    yield from _shard_lines("failed", result.failed, f"{output_dir}/failed")
    newly_damaged = state.shards_damaged - len(job.damaged)
    nothing_to_do = not (state.shards_done or state.shards_left or state.shards_failed or newly_damaged)
    counts = result.totals if nothing_to_do and result.totals else state.counts
    if counts is result.totals:
        yield f"nothing to do: all {state.shards_total:,} shard(s) were annotated before; see {output_dir}"
        yield f"samples: {counts.samples_in:,}: {_samples(counts)}"
    else:
        yield from _summary_lines(job, result, output_dir)
    if counts.error_rows:
        yield f"errors: {counts.error_rows:,} in {output_dir}/errors: {error_kinds_text(counts)}"
    if counts.samples_in and not counts.annotated:
        yield "no sample was annotated; run the command again with --dry-run to see why"
    if not result.complete and not result.stopped:
        yield from _lines_on_shards_left(job, result, max_shards)


def _summary_lines(job: Job, result: JobResult, output_dir: str) -> Iterator[str]:
    from pipeline.output.measures import pace_text
    from pipeline.output.runs import workers_text

    state, counts, measures = result.state, result.state.counts, result.state.measures
    yield (
        f"shards: {state.shards_done} done, {state.shards_skipped} done before, "
        f"{state.shards_damaged} damaged, {state.shards_failed} failed, {state.shards_left} left"
    )
    yield (
        f"samples: {counts.samples_in:,} in {as_duration(state.elapsed_s)} "
        f"({state.samples_per_s:,.1f}/s after {_ready(job)}): {_samples(counts)}"
    )
    yield f"images: {measures.images_decoded:,} decoded; {pace_text(measures, state.workers_ready)}"
    yield f"workers: {workers_text(state.workers_ready, state.workers_wanted, state.workers_lost)}"
    yield f"rows: {counts.rows:,} in {output_dir}/annotations"


def _ready(job: Job) -> str:
    return "the model was loaded" if job.config.input.maps is None else "the first worker was ready"


def _samples(counts: ShardCounts) -> str:
    return f"{counts.annotated:,} annotated, {counts.empty:,} empty, {counts.failed:,} failed"


def _shard_lines(what: str, shards: Sequence[tuple[str, str]], records: str) -> Iterator[str]:
    for url, message in shards[:NAMED_SHARDS]:
        yield f"{what}: {url}: {message}"
    if len(shards) > NAMED_SHARDS:
        yield f"... and {len(shards) - NAMED_SHARDS:,} more {what}; see {records}/"


def _lines_on_shards_left(job: Job, result: JobResult, max_shards: int | None) -> Iterator[str]:
    from pipeline.run.estimate import extrapolation_lines

    ids = job.folder.all_ids()
    left_ids = ids.states_of([shard.shard_id for shard in job.shards]).left
    left = [shard.canonical_url for shard in job.shards if shard.shard_id in left_ids]
    if left:
        how = "the same command again" if max_shards is None else "the command again without --limit"
        yield f"left: {first_few(left, NAMED_SHARDS)}; run {how} to resume"
    if max_shards is not None:
        newly_done = [shard for shard in job.todo if shard.shard_id in ids.annotations]
        yield from extrapolation_lines(job, result.state, newly_done)
