"""Footers of an output folder's files, kept between calls in the user's cache folder.

Reading them again is most of the work of `legrad status`: two requests for each of a job's files. The cache
is outside of the output folder, readable by its user only, and may be deleted at any time. A file whose size
or time of change is another than before is read again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.output.schema import FOOTERS_SCHEMA, FootersRow
from pipeline.output.tables import open_table
from pipeline.storage import InputVersion

# a file may change twice within the resolution of a store's clock
SETTLED_AFTER_S = 60
ROWS_AT_A_TIME = 10_000
_log = logging.getLogger(__name__)


class FooterTexts(NamedTuple):
    """The footers of a shard's two files as they are in the files: JSON."""

    annotations: str
    errors: str


@dataclass
class FooterCache:
    """The footers that are known of an output folder's files.

    Attributes:
        path: the file of the cache; None where there can be none.
        versions: by shard id, the versions of its two files now.
        known: rows of the cache, by shard id.
        is_changed: whether the file has to be written again.
    """

    path: Path | None
    versions: Mapping[str, tuple[InputVersion, InputVersion]]
    known: dict[str, FootersRow] = field(default_factory=dict)
    is_changed: bool = False

    @classmethod
    def of(cls, output_url: str) -> FooterCache:
        """Return the cache of an output folder; empty where it is damaged, or there is none.

        Raises:
            OutputError: the folder cannot be listed.
        """
        path = _path_of(output_url)
        if path is None:
            return cls(None, {})
        annotations, errors = (
            storage.list_versions(storage.join_url(output_url, table)) for table in ("annotations", "errors")
        )
        versions = {
            name.removesuffix(".parquet"): (annotations[name], errors[name])
            for name in annotations.keys() & errors.keys()
        }
        rows = _read(path)
        known = {name: row for name, row in rows.items() if _is_of(row, versions.get(name))}
        return cls(path, versions, known, is_changed=len(known) != len(rows))

    def get(self, shard_id: str) -> FooterTexts | None:
        """Return the footers of a shard's files; None where they have to be read."""
        row = self.known.get(shard_id)
        return None if row is None else FooterTexts(row["annotations_footer"], row["errors_footer"])

    def add(self, shard_id: str, texts: FooterTexts) -> None:
        """Keep footers that were just read, if their files have not changed for a minute."""
        annotations, errors = self.versions.get(shard_id, (InputVersion(), InputVersion()))
        if not (_is_settled(annotations) and _is_settled(errors)):
            return
        self.is_changed = True
        self.known[shard_id] = {
            "shard_id": shard_id,
            "annotations_size_bytes": annotations.size_bytes or 0,
            "annotations_mtime_ns": annotations.mtime_ns or 0,
            "errors_size_bytes": errors.size_bytes or 0,
            "errors_mtime_ns": errors.mtime_ns or 0,
            "annotations_footer": texts.annotations,
            "errors_footer": texts.errors,
        }

    def save(self) -> None:
        """Write the cache, if it has changed and can be written."""
        if self.path is None or not self.is_changed:
            return
        with suppress(OSError, pa.ArrowException):
            _write(self.path, list(self.known.values()))


def _path_of(output_url: str) -> Path | None:
    """Return the file of a folder's cache; None if the user has no cache folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):
        # a relative path counts as none, as the specification of XDG wants it
        root = Path(given) if given.startswith("/") else Path.home() / ".cache"
        name = hashlib.sha256(storage.shard_name(storage.absolute(output_url)).encode()).hexdigest()[:32]
        return root / "legrad" / f"footers-{name}.parquet"
    return None


def _read(path: Path) -> dict[str, FootersRow]:
    if not path.is_file():
        return {}
    try:
        with open_table(str(path), "footers") as table:
            rows = cast("list[FootersRow]", list(table.rows(FOOTERS_SCHEMA.names, ROWS_AT_A_TIME)))
    except PipelineError as error:
        _log.warning("ignoring a cache that cannot be read: %s", error)
        return {}
    return {row["shard_id"]: row for row in rows}


def _write(path: Path, rows: list[FootersRow]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # only its user can read it
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=storage.TEMPORARY_SUFFIX)
    try:
        with os.fdopen(descriptor, "wb") as sink:
            table = pa.Table.from_pylist(rows, schema=FOOTERS_SCHEMA)
            pq.write_table(table, sink, compression="zstd", row_group_size=ROWS_AT_A_TIME)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _is_of(row: FootersRow, now: tuple[InputVersion, InputVersion] | None) -> bool:
    return now == (
        InputVersion(row["annotations_size_bytes"], row["annotations_mtime_ns"]),
        InputVersion(row["errors_size_bytes"], row["errors_mtime_ns"]),
    )


def _is_settled(version: InputVersion) -> bool:
    return version.mtime_ns is not None and version.mtime_ns < (time.time() - SETTLED_AFTER_S) * 1e9
