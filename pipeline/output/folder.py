"""The places in an output folder, and how files come and go there without a reader seeing anything else.

`annotations/*.parquet` holds the committed files of listed shards and nothing else, at every moment: files
under construction are in `.tmp/<run-id>/`, and what is superseded or no longer listed is moved to `unlisted/`
under names that no pattern for Parquet files matches.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO

from pipeline import storage

ANNOTATIONS, ERRORS, FAILED, DAMAGED = "annotations", "errors", "failed", "damaged"
RUNS, UNLISTED, STAGING = "runs", "unlisted", ".tmp"
SUFFIXES = {ANNOTATIONS: ".parquet", ERRORS: ".parquet", FAILED: ".json", DAMAGED: ".json"}
JOB_FILE, SHARDS_FILE, SUCCESS_FILE = "job.json", "shards.parquet", "_SUCCESS"
# version of what is written and how; a folder of another one is refused
LAYOUT = 2
IDLE_RUN_S = 3600.0


def new_run_id() -> str:
    """A name for a run; sorted by name is sorted by time, and two runs never share one."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


@dataclass(frozen=True)
class OutputFolder:
    """An output folder, as one run writes into it.

    Attributes:
        url: local path or URL of an object store.
        run_id: names the run's temporary files and what it moves aside.
    """

    url: str
    run_id: str

    def publish(self, name: str, content: IO[bytes] | bytes, folder: str = "") -> None:
        """Make a file appear whole, or not at all; raises OutputError where it cannot be written."""
        staging_url = storage.join_url(self.url, STAGING, self.run_id)
        storage.publish(self._place(folder), name, content, staging_url=staging_url)

    def remove(self, name: str, folder: str = "") -> None:
        """Delete a file if it is there; raises OutputError where that is not allowed."""
        storage.remove(self._place(folder), name)

    def ids(self, folder: str) -> frozenset[str]:
        """Ids of the shards that have a file in one of the folders of `SUFFIXES`."""
        return ids_in(self.url, folder)

    def set_aside(self, shard_ids: Iterable[str]) -> None:
        """Move all files of shards to `unlisted/`, the annotations first; nothing is deleted.

        Raises:
            OutputError: a file cannot be moved.
        """
        unlisted = storage.join_url(self.url, UNLISTED)
        for shard_id in shard_ids:
            for folder, suffix in SUFFIXES.items():
                moved_name = f"{shard_id}.{folder}.{self.run_id}-{uuid.uuid4().hex[:6]}{suffix}.moved"
                storage.move(self._place(folder), f"{shard_id}{suffix}", unlisted, moved_name)

    def sweep(self) -> None:
        """Delete temporary files of runs that have written nothing for an hour."""
        storage.sweep_staging(storage.join_url(self.url, STAGING), idle_for_s=IDLE_RUN_S)

    def close(self) -> None:
        """Delete the temporary files of this run, whose workers have ended."""
        storage.remove_staging(storage.join_url(self.url, STAGING, self.run_id))

    def _place(self, folder: str) -> str:
        return storage.join_url(self.url, folder) if folder else self.url


def stray_annotations(output_dir: str, listed_ids: Collection[str]) -> list[str]:
    """Files among the annotations that readers of the folder take for some, and that are of no listed shard.

    Readers look into folders below as well, and some take a file for Parquet whatever the case of its name or
    what follows; they pass over names that begin with a dot or an underscore, and fail at other files.

    Args:
        output_dir: the job's output folder.
        listed_ids: ids of the job's shards.

    Returns:
        Their paths, relative to the folder of annotations, in order.

    Raises:
        OutputError: the folder cannot be listed.
    """
    own = {f"{shard_id}{SUFFIXES[ANNOTATIONS]}" for shard_id in listed_ids}
    found = storage.list_paths(storage.join_url(output_dir, ANNOTATIONS)) - own
    return sorted(
        path
        for path in found
        if ".parquet" in path.lower() and not any(part.startswith((".", "_")) for part in path.split("/"))
    )


def ids_in(output_dir: str, folder: str) -> frozenset[str]:
    """Ids of the shards that have a file in a folder; raises OutputError where it cannot be listed."""
    suffix = SUFFIXES[folder]
    names = storage.list_names(storage.join_url(output_dir, folder))
    return frozenset(name.removesuffix(suffix) for name in names if name.endswith(suffix))
