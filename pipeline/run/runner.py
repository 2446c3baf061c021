"""Run a job on Ray: connect or start it, dispatch the remaining shards, and conclude."""

from __future__ import annotations

import os

from ray.util import metrics as ray_metrics

from pipeline import storage
from pipeline.errors import UserError
from pipeline.output.survey import spread_evenly
from pipeline.process import SIGTERM_EXIT_CODE, sigterm_noted
from pipeline.run import cluster
from pipeline.run import job as jobs
from pipeline.run.destination import drain_s_after_sigterm, shared_folder_notes
from pipeline.run.dispatcher import Dispatcher
from pipeline.run.job import Job
from pipeline.run.outcome import JobResult, RunTally, concluded, first_state
from pipeline.run.progress import Progress, SharedProgress
from pipeline.run.prometheus import RunMetrics
from pipeline.run.ray_host import RayHost
from pipeline.run.worker import AnnotatorFactory, build_annotator
from pipeline.text import first_few

MAX_REDOS = 3


def run_job(
    job: Job,
    progress: Progress,
    factory: AnnotatorFactory = build_annotator,
    *,
    max_shards: int | None = None,
) -> JobResult:
    """Annotate the remaining shards of a job, on this machine or on the cluster that RAY_ADDRESS names.

    Args:
        job: a prepared job.
        progress: receives the state of the run and messages.
        factory: builds the annotator inside each worker.
        max_shards: stop after this many shards, spread evenly over the remaining ones; None: all.

    Returns:
        The counts of the run; shards given up are listed, and recorded in OUT/failed/.

    Raises:
        UserError: workers cannot load with this configuration, or the machines that it asks for do not join.
        OutputError: the output cannot be written.
        WorkersLost: no worker can be kept.
        SystemExit: after SIGTERM; what was nearly done is finished.
    """
    try:
        result = _run_once(job, progress, factory, max_shards)
        for _ in range(MAX_REDOS):
            if not result.torn:
                break
            # two jobs on one folder may each have written one file of a shard
            progress.say(f"Found files of different attempts; annotating again: {first_few(result.torn)}")
            job = jobs.looked_at_again(job)
            result = _run_once(job, progress, factory, max_shards)
        return result
    finally:
        job.folder.close()


def _run_once(job: Job, progress: Progress, factory: AnnotatorFactory, max_shards: int | None) -> JobResult:
    if not job.todo:
        return concluded(job, JobResult(first_state(job)))
    run = job.config.run
    with cluster.ray_session() as session, sigterm_noted() as is_terminated:
        shards = spread_evenly(job.todo, max_shards)
        machines = cluster.machines_alive()
        for note in shared_folder_notes(job.config.output.dir, job.config.input.maps, len(machines)):
            progress.say(note)
        cpus_only = cluster.cpus_only(session, machines, run)
        check_precision(job, cpus_only=cpus_only)
        progress.say(
            f"{_task(job, len(shards))}, {first_state(job).shards_skipped:,} done before, "
            f"on {'CPUs' if cpus_only else 'GPUs'}"
            + (f" in {job.config.model.precision}" if job.config.input.maps is None else "")
        )
        metrics = RunMetrics(storage.shown_url(job.config.output.dir), ray_metrics.Counter, ray_metrics.Gauge)
        shown = SharedProgress([progress, metrics])
        tally = RunTally(job, shown)
        host = RayHost(job.config, job.metadata, job.folder.run_id, factory)
        dispatcher = Dispatcher(
            run,
            shards,
            host,
            tally,
            shown,
            cpus_only=cpus_only,
            can_grow=not session.is_own,
            is_terminated=is_terminated,
            drain_s_after_sigterm=drain_s_after_sigterm(run.drain_s, os.environ),
        )
        ended = dispatcher.run()
    if ended.terminated:
        raise SystemExit(SIGTERM_EXIT_CODE)
    return concluded(job, tally.result(ended.state, ended.stopped))


def _task(job: Job, shards: int) -> str:
    maps = job.config.input.maps
    if maps is None:
        return f"Annotating {shards:,} shard(s)"
    return f"Making masks of {shards:,} shard(s) from the maps in {storage.shown_url(maps)}"


def check_precision(job: Job, *, cpus_only: bool) -> None:
    """Refuse CPUs, on which auto would be fp32, for a job that auto made bf16."""
    precision = job.config.model.precision
    if job.precision_is_auto and cpus_only and precision != "fp32":
        raise UserError(
            f"{storage.shown_url(job.config.output.dir)}: the results there are in {precision}, and this run "
            f"has no GPU: resume where there is one; or set model.precision={precision} to continue on CPUs, "
            "slowly; or choose another output.dir"
        )
