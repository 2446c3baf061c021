"""Check that a job's output folder outlives the job and can be shared by the machines of a cluster."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from rich.filesize import decimal

from pipeline import storage
from pipeline.errors import OutputError, UserError
from pipeline.output.folder import JOB_FILE
from pipeline.storage.urls import is_local
from pipeline.text import first_few

# Ray sets it for the command of `ray job submit`
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Ray's default
RAY_JOB_STOP_WAIT_S = 3.0
# for what follows: the workers are stopped, the record of the run is written
ENDING_S = 2.0
# the files of the smallest job, and of a shard that is being written
LEAST_FREE_BYTES = 16 << 20
NAMED_FILES = 3


def check_destination(output_dir: str, environ: Mapping[str, str]) -> None:
    """Refuse a relative output folder in a submitted job, and one in a working directory that Ray deletes.

    Args:
        output_dir: as the configuration names it.
        environ: environment variables.

    Raises:
        UserError: the results would be lost, or on a machine that the user did not choose.
    """
    job = _submitted_job(environ)
    if job is None or not is_local(output_dir):
        return
    folder = storage.absolute(output_dir)
    is_relative = not Path(output_dir).is_absolute() and folder == str(Path(output_dir).absolute())
    is_deleted = bool(job.get("working_dir")) and _is_in_working_directory(folder)
    if is_relative or is_deleted:
        where = (
            "in the job's working directory, which Ray deletes" if is_deleted else "on the driver's machine"
        )
        raise UserError(
            f"output.dir: {output_dir} is {folder} in this submitted job, {where}; give an absolute path to "
            "a folder that every machine of the cluster sees, or a URL such as s3://BUCKET/FOLDER"
        )


def destination_problem(output_dir: str) -> list[str]:
    """Return why nothing can be written to an output folder, as far as that is known without writing.

    Args:
        output_dir: as the configuration names it.

    Returns:
        The reason, in one line; none where the folder can be used, or made.
    """
    if not is_local(output_dir):
        return _problem_of_store(output_dir)
    folder = Path(storage.absolute(output_dir))
    present = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    where = f"output.dir: {storage.shown_url(output_dir)}"
    if not present.is_dir():
        return [f"{where}: {present} is a file, and a folder is expected; choose another folder"]
    if not os.access(present, os.W_OK | os.X_OK):
        return [f"{where}: there is no permission to write in {present}; choose another folder"]
    free_bytes = shutil.disk_usage(present).free
    if free_bytes < LEAST_FREE_BYTES:
        return [
            f"{where}: the disk of {present} has {decimal(free_bytes)} left; free some, or choose another"
        ]
    return []


def files_beside(output_dir: str) -> list[str]:
    """Return that a folder which holds no job yet holds something else, in one line; none where it does not.

    Args:
        output_dir: absolute path or URL.

    Raises:
        OutputError: it cannot be listed.
    """
    names = sorted(name for name in storage.list_entries(output_dir) if not name.startswith("."))
    if not names or JOB_FILE in names:
        return []
    return [
        f"output.dir: {storage.shown_url(output_dir)} holds {len(names):,} other file(s) and folder(s), "
        f"{first_few(names, NAMED_FILES)}; the results are written beside them"
    ]


def _problem_of_store(output_dir: str) -> list[str]:
    try:
        storage.list_names(output_dir)
        filesystem, path = storage.resolve(output_dir)
    except (OutputError, UserError) as error:
        return [f"output.dir: {error}"]
    bucket = path.partition("/")[0]
    # credentials for a folder alone may not ask for its bucket
    with suppress(OSError):
        if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
            return [f"output.dir: {storage.shown_url(output_dir)}: the bucket {bucket!r} does not exist"]
    return []


def drain_s_after_sigterm(drain_s: float, environ: Mapping[str, str]) -> float:
    """Return how long a run may take to end after SIGTERM, in seconds.

    `ray job stop` kills the command of a submitted job RAY_JOB_STOP_WAIT_TIME_S after its SIGTERM.

    Args:
        drain_s: `run.drain_s`.
        environ: environment variables.
    """
    if _submitted_job(environ) is None:
        return drain_s
    try:
        killed_after_s = float(environ.get("RAY_JOB_STOP_WAIT_TIME_S", RAY_JOB_STOP_WAIT_S))
    except ValueError:
        killed_after_s = RAY_JOB_STOP_WAIT_S
    return max(0.0, min(drain_s, killed_after_s - ENDING_S))


def _submitted_job(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the runtime environment of the submitted job that this process belongs to; None without one."""
    try:
        job = json.loads(environ[JOB_VARIABLE])
        runtime_env = job["runtime_env"] or {}
    except (KeyError, ValueError, TypeError):
        return None
    return runtime_env if isinstance(runtime_env, dict) else None


def _is_in_working_directory(folder: str) -> bool:
    return Path(folder).resolve().is_relative_to(Path().resolve())


def shared_folder_notes(output_dir: str, maps: str | None, machines: int) -> list[str]:
    """Return what the local folders of a job require of a cluster of several machines.

    Args:
        output_dir: output folder, an absolute path or URL.
        maps: folder with the stored maps that `legrad remask` reads, or None.
        machines: machines of the cluster.
    """
    if machines < 2:
        return []
    used = [(output_dir, "writes"), *([] if maps is None else [(maps, "reads")])]
    return [
        f"{folder} must be the same folder on each of the {machines:,} machines, such as a network file "
        f"system: every worker {use} there"
        for folder, use in used
        if is_local(folder)
    ]
