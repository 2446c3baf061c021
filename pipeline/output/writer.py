"""Write the two Parquet files of a shard: first to temporary files, then published, errors first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ScratchError
from pipeline.output.counts import ShardCounts, sample_outcome
from pipeline.output.folder import ANNOTATIONS, DAMAGED, ERRORS, OutputFolder, new_run_id
from pipeline.output.records import LAYOUT, counts_as_metadata
from pipeline.output.schema import (
    ANNOTATION_SCHEMA,
    ERROR_SCHEMA,
    METADATA_KEY,
    AnnotationRow,
    annotation_schema,
)
from pipeline.shards.sample_error import SampleError
from pipeline.storage import ShardSource
from pipeline.text import printable

ROWS_PER_GROUP = 1000
# readers refuse groups of more than a gigabyte
MAX_WAITING_BYTES = 128 << 20
_SHARD_COLUMN = ANNOTATION_SCHEMA.get_field_index("shard")


def rows_schema(*, with_instances: bool = False, with_maps: bool = False) -> pa.Schema:
    """Return the columns that the annotator makes of samples, without knowing their shard."""
    schema = annotation_schema(with_instances=with_instances, with_maps=with_maps)
    return schema.remove(_SHARD_COLUMN)


ROWS_SCHEMA = rows_schema()


class TableSpool:
    """A Parquet file under construction."""

    def __init__(self, schema: pa.Schema, rows_per_group: int = ROWS_PER_GROUP) -> None:
        self._rows_per_group = rows_per_group
        self._waiting: list[pa.Table] = []
        self._waiting_rows = self._waiting_bytes = 0
        self.file = storage.Spool()
        dictionary_columns = [name for name in ("shard", "prompt") if name in schema.names]
        self._writer = pq.ParquetWriter(
            self.file,
            schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=dictionary_columns,
            write_page_checksum=True,
        )

    def add(self, rows: pa.Table) -> None:
        """Add rows of the schema."""
        self._waiting.append(rows)
        self._waiting_rows += rows.num_rows
        self._waiting_bytes += rows.nbytes
        if self._waiting_rows >= self._rows_per_group:
            self._flush(self._waiting_rows // self._rows_per_group * self._rows_per_group)
        elif self._waiting_bytes >= MAX_WAITING_BYTES:
            self._flush(self._waiting_rows)

    def _flush(self, rows: int) -> None:
        waiting = pa.concat_tables(self._waiting)
        self._writer.write_table(waiting.slice(0, rows), row_group_size=self._rows_per_group)
        self._waiting = [waiting.slice(rows)]
        self._waiting_rows -= rows
        self._waiting_bytes = self._waiting[0].nbytes

    def finish(self, metadata: Mapping[str, Any]) -> IO[bytes]:
        """Write what is left and the footer, which gets the metadata; return the file."""
        if self._waiting_rows:
            self._flush(self._waiting_rows)
        self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(metadata)})
        self._writer.close()
        self.file.flush()
        return cast(IO[bytes], self.file)

    def close(self) -> None:
        """Delete the file."""
        # the writer first: it would write its footer into a closed file when it is collected
        with suppress(ScratchError):
            self._writer.close()
        self.file.close()


@dataclass(frozen=True)
class Published:
    """The committed outcome of a shard.

    Attributes:
        counts: outcomes of its samples.
        damage: why its archive could not be read to its end; empty if it was.
    """

    counts: ShardCounts
    damage: str = ""


class ShardWriter:
    """Collect a shard's rows and errors, count outcomes, and commit both files.

    Args:
        shard: its URL is written into every row, and its version into both footers.
        metadata: written into both footers with the counts: config hash, versions, ids of run and attempt.
        with_instances: whether rows have the column `instances`.
        with_maps: whether rows have the columns of jobs that store maps.
    """

    def __init__(
        self,
        shard: ShardSource,
        metadata: Mapping[str, Any],
        *,
        with_instances: bool = False,
        with_maps: bool = False,
    ) -> None:
        self._shard = shard
        self._metadata = metadata
        schema = annotation_schema(with_instances=with_instances, with_maps=with_maps)
        self._annotations = TableSpool(schema)
        self._rows_schema = schema.remove(_SHARD_COLUMN)
        self._errors = TableSpool(ERROR_SCHEMA)
        self._tally: Counter[str] = Counter()
        self._errors_by_kind: Counter[str] = Counter()
        self._error_examples: dict[str, str] = {}
        self._damage = ""

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._annotations.close()
        self._errors.close()

    def add(self, rows: pa.Table, errors: Sequence[SampleError], outcomes: Mapping[str, int]) -> None:
        """Add some samples.

        Args:
            rows: their annotation rows, of `rows_schema`.
            errors: their error rows, and perhaps errors that belong to no sample.
            outcomes: how many of them are `annotated`, `empty` and `failed`, and how many `dropped_prompts`.

        Raises:
            ScratchError: this machine's disk for temporary files is full.
        """
        self._tally.update(outcomes)
        self._tally["rows"] += rows.num_rows
        if rows.num_rows:
            shard = pa.repeat(self._shard.canonical_url, rows.num_rows)
            self._annotations.add(rows.add_column(_SHARD_COLUMN, "shard", shard))
        self._add_errors(errors)

    def add_sample(
        self, rows: Sequence[AnnotationRow], errors: Sequence[SampleError], dropped_prompts: int = 0
    ) -> None:
        """Add a sample: annotated if it has rows, failed if it has only errors, empty if it has neither."""
        table = pa.Table.from_pylist(list(rows), schema=self._rows_schema)
        self.add(table, errors, {sample_outcome(rows, errors): 1, "dropped_prompts": dropped_prompts})

    def add_error(self, error: SampleError) -> None:
        """Add an error, which need not belong to a sample."""
        self._add_errors([error])

    def _add_errors(self, errors: Sequence[SampleError]) -> None:
        if not errors:
            return
        for error in errors:
            self._count_error(error)
        rows = [error.as_row(self._shard.canonical_url) for error in errors]
        self._errors.add(pa.Table.from_pylist(rows, schema=ERROR_SCHEMA))

    def _count_error(self, error: SampleError) -> None:
        self._tally["error_rows"] += 1
        kind = f"{error.stage}/{error.kind}"
        self._errors_by_kind[kind] += 1
        self._error_examples.setdefault(
            kind, self._shard.canonical_url if error.key is None else printable(error.key)
        )
        if error.damages_shard:
            self._damage = f"{kind}: {printable(error.message)}"

    def counts(self) -> ShardCounts:
        """Return the outcomes so far."""
        return ShardCounts(
            **self._tally,
            errors_by_kind=dict(self._errors_by_kind),
            error_examples=dict(self._error_examples),
        )

    def publish(self, output_dir: str, content_digest: str = "") -> Published:
        """Commit the errors file, then the annotations file, whose presence marks the shard as published.

        The record of a damaged shard in `damaged/` is written before its annotations.

        Args:
            output_dir: the job's output folder.
            content_digest: digest of all bytes of the shard, which identifies it if it moves.

        Raises:
            OutputError: a file cannot be written.
            ScratchError: this machine's disk for temporary files is full.
        """
        folder = OutputFolder(output_dir, str(self._metadata.get("run") or new_run_id()))
        counts, shard_id = self.counts(), self._shard.shard_id
        metadata = {
            **self._metadata,
            "layout": LAYOUT,
            "shard": self._shard.canonical_url,
            "state": "damaged" if self._damage else "done",
            "input": self._shard.version.as_metadata(),
            "content_digest": content_digest,
            **counts_as_metadata(counts),
        }
        folder.publish(f"{shard_id}.parquet", self._errors.finish(metadata), ERRORS)
        if self._damage:
            record = {"shard_id": shard_id, "shard": self._shard.canonical_url, "reason": self._damage}
            folder.publish(f"{shard_id}.json", json.dumps(record, ensure_ascii=False).encode(), DAMAGED)
        else:
            folder.remove(f"{shard_id}.json", DAMAGED)
        folder.publish(f"{shard_id}.parquet", self._annotations.finish(metadata), ANNOTATIONS)
        return Published(counts, self._damage)
