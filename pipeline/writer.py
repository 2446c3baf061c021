"""The two Parquet files of a shard: built privately, published errors first."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.records import ANNOTATION_SCHEMA, ERROR_SCHEMA, SampleError, ShardCounts

ROWS_PER_GROUP = 1000
FOOTER_READERS = 16
METADATA_KEY = b"legrad"


class _TableSpool:
    """A Parquet file under construction, in memory up to IN_MEMORY_BYTES."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self.file = cast(IO[bytes], tempfile.SpooledTemporaryFile(max_size=storage.IN_MEMORY_BYTES))  # noqa: SIM115 (the writer closes it)
        dictionary_columns = [name for name in ("shard", "prompt") if name in schema.names]
        self._writer = pq.ParquetWriter(
            self.file, schema, compression="zstd", compression_level=3, use_dictionary=dictionary_columns
        )

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows.extend(rows)
        while len(self._rows) >= ROWS_PER_GROUP:
            self._flush(ROWS_PER_GROUP)

    def _flush(self, rows: int) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows[:rows], schema=self._schema))
        del self._rows[:rows]

    def finish(self, metadata: Mapping[str, Any]) -> IO[bytes]:
        if self._rows:
            self._flush(len(self._rows))
        self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(metadata)})
        self._writer.close()
        return self.file

    def close(self) -> None:
        # the writer first: it would write its footer into a closed file when it is collected
        with suppress(OSError):
            self._writer.close()
        self.file.close()


class ShardWriter:
    """Collects a shard's rows and errors, counts outcomes, and commits both files.

    Args:
        shard_url: canonical URL, written into every row.
        metadata: written into both files beside the counts (config hash, versions, attempt id).
    """

    def __init__(self, shard_url: str, metadata: Mapping[str, Any]) -> None:
        self._shard_url = shard_url
        self._metadata = metadata
        self._annotations = _TableSpool(ANNOTATION_SCHEMA)
        self._errors = _TableSpool(ERROR_SCHEMA)
        self._tally: Counter[str] = Counter()
        self._errors_by_kind: Counter[str] = Counter()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._annotations.close()
        self._errors.close()

    def add_sample(
        self, rows: Sequence[dict[str, Any]], errors: Sequence[SampleError], dropped_prompts: int = 0
    ) -> None:
        """Record one sample's outcome: rows make it annotated, else errors failed, else it is empty."""
        self._tally["annotated" if rows else "failed" if errors else "empty"] += 1
        self._tally["dropped_prompts"] += dropped_prompts
        self._tally["rows"] += len(rows)
        self._annotations.add([row | {"shard": self._shard_url} for row in rows])
        for error in errors:
            self.add_error(error)

    def add_error(self, error: SampleError) -> None:
        """Record an error row, also one that belongs to no sample."""
        self._tally["error_rows"] += 1
        self._errors_by_kind[f"{error.stage}/{error.kind}"] += 1
        self._errors.add([error.as_row(self._shard_url)])

    def counts(self) -> ShardCounts:
        """The outcomes recorded so far."""
        return ShardCounts(**self._tally, errors_by_kind=dict(self._errors_by_kind))

    def publish(self, output_dir: str, shard_id: str) -> ShardCounts:
        """Commit: the errors file first, then the annotations, whose presence says that the shard is done.

        Raises:
            OutputError: one of them cannot be written.
        """
        counts = self.counts()
        metadata = {**self._metadata, "shard": self._shard_url, **counts_as_metadata(counts)}
        name = f"{shard_id}.parquet"
        storage.publish(storage.join_url(output_dir, "errors"), name, self._errors.finish(metadata))
        storage.publish(storage.join_url(output_dir, "annotations"), name, self._annotations.finish(metadata))
        return counts


def counts_as_metadata(counts: ShardCounts) -> dict[str, Any]:
    """Counts as they stand in Parquet footers and in ``_SUCCESS``."""
    return {
        "samples_in": counts.samples_in,
        "annotated": counts.annotated,
        "empty": counts.empty,
        "failed": counts.failed,
        "rows": counts.rows,
        "error_rows": counts.error_rows,
        "dropped_prompts": counts.dropped_prompts,
        "errors_by_kind": dict(counts.errors_by_kind),
    }


def counts_from_metadata(metadata: Mapping[str, Any]) -> ShardCounts:
    """The inverse of `counts_as_metadata`."""
    return ShardCounts(
        **{
            name: metadata[name]
            for name in (
                "annotated",
                "empty",
                "failed",
                "rows",
                "error_rows",
                "dropped_prompts",
                "errors_by_kind",
            )
        }
    )


def read_footer(url: str) -> dict[str, Any]:
    """This package's metadata in a Parquet file's footer; only the footer is read.

    Raises:
        OSError: the file cannot be read.
        pyarrow.ArrowInvalid: it is not a Parquet file.
        KeyError: it was not written by this package.
    """
    filesystem, path = storage.resolve(url)
    with filesystem.open_input_file(path) as file:
        metadata = pq.ParquetFile(file).metadata.metadata
    return cast("dict[str, Any]", json.loads(metadata[METADATA_KEY]))


def published_counts(output_dir: str, shard_id: str) -> ShardCounts:
    """The counts in the footer of a shard's published annotations; raises like `read_footer`."""
    return counts_from_metadata(
        read_footer(storage.join_url(output_dir, "annotations", f"{shard_id}.parquet"))
    )


def checked_counts(
    output_dir: str, shard_ids: Sequence[str], config_hash: str
) -> dict[str, ShardCounts | None]:
    """The counts of published shards, footers read concurrently.

    Args:
        output_dir: the job's output folder.
        shard_ids: whose files are looked at.
        config_hash: of the job; two that start together may each have found the folder empty.

    Returns:
        By shard id; None where the two files are not of the same attempt, or of another configuration, or
        one of them cannot be read.
    """
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        found = pool.map(lambda shard_id: _checked(output_dir, f"{shard_id}.parquet", config_hash), shard_ids)
        return dict(zip(shard_ids, found, strict=True))


def _checked(output_dir: str, name: str, config_hash: str) -> ShardCounts | None:
    try:
        annotations = read_footer(storage.join_url(output_dir, "annotations", name))
        errors = read_footer(storage.join_url(output_dir, "errors", name))
        belong_together = annotations["attempt"] == errors["attempt"]
        as_configured = annotations["config_hash"] == config_hash
        return counts_from_metadata(annotations) if belong_together and as_configured else None
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowInvalid):
        return None
