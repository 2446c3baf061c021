"""Read files of an output folder that may be damaged or foreign: JSON records and Parquet tables.

Parquet files are checked against `pipeline.output.schema` before their rows are read. Every fault of a file
becomes a `DamagedFileError` that names the file in one line.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from pipeline import storage
from pipeline.errors import DamagedFileError, OutputError, UserError
from pipeline.output import schema
from pipeline.output.records import FooterRecord
from pipeline.output.schema import ShardRow
from pipeline.storage.urls import local_path, split_url, without_secrets
from pipeline.text import printable

MAX_JSON_BYTES = 64 << 20
MAX_FOOTER_BYTES = 16 << 20
# the writer's groups have 1,000 rows; other programs may have joined some
MAX_GROUP_ROWS = 1 << 20
MAX_GROUP_BYTES = 1 << 30
MAX_REASON_CHARACTERS = 300
READ_BUFFER_BYTES = 1 << 20
ROWS_AT_A_TIME = 256

Table = Literal["annotations", "errors", "shards", "compacted", "footers"]
SCHEMAS: dict[Table, pa.Schema] = {
    "annotations": schema.ANNOTATION_SCHEMA,
    "errors": schema.ERROR_SCHEMA,
    "shards": schema.SHARDS_SCHEMA,
    "compacted": schema.COMPACTED_SCHEMA,
    "footers": schema.FOOTERS_SCHEMA,
}
REQUIRED: dict[Table, frozenset[str]] = {
    "annotations": schema.ANNOTATION_REQUIRED,
    "errors": schema.ERROR_REQUIRED,
    "shards": schema.SHARDS_REQUIRED,
    "compacted": schema.COMPACTED_REQUIRED,
    "footers": schema.FOOTERS_REQUIRED,
}
_AT_LEAST = {"sample_index": 0, "prompt_index": 0, "image_height": 1, "image_width": 1, "area": 0}
_AT_LEAST |= {"size_bytes": 0, "heatmap_height": 0, "heatmap_width": 0, "rows": 0, "error_rows": 0}
_AT_LEAST |= {f"{table}_{name}": 0 for table in ("annotations", "errors") for name in ("part", "first_row")}

Model = TypeVar("Model", bound=BaseModel)
Row = dict[str, Any]


def schema_with(table: Table, column_names: Sequence[str]) -> pa.Schema:
    """Return the columns of a table with these columns: annotations of some jobs have further ones.

    Args:
        table: the table.
        column_names: of a file.
    """
    if table == "annotations":
        return schema.annotation_schema_of(column_names)
    return SCHEMAS[table]


class ShardTable(Protocol):
    """The annotations or errors of one shard, whichever file holds them."""

    @property
    def url(self) -> str:
        """The file, for messages."""

    @property
    def row_count(self) -> int:
        """Rows of the shard."""

    @property
    def group_row_counts(self) -> list[int]:
        """Rows of each group that `read_group` reads."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, also of those that the schema does not know."""

    def footer(self) -> FooterRecord:
        """Return what was counted when the shard was written; raises DamagedFileError."""

    def rows(self, columns: Sequence[str], rows_at_a_time: int = ROWS_AT_A_TIME) -> Iterator[Row]:
        """Iterate over the rows as dictionaries, a few in memory at a time; raises DamagedFileError."""

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Iterate over the rows as tables, a row group in memory at a time; raises DamagedFileError."""

    def read_group(
        self, number: int, columns: Sequence[str], offsets: Sequence[int] | None = None
    ) -> pa.Table:
        """Read columns of a group: all rows, or those at the offsets; raises DamagedFileError."""


@dataclass(frozen=True)
class TableFile:
    """An open Parquet file of an output folder, whose columns and row groups were checked.

    Attributes:
        url: the file.
        table: the table that its columns make.
        source: the open file.
        file: the same, as Parquet.
    """

    url: str
    table: Table
    source: pa.NativeFile
    file: pq.ParquetFile

    @property
    def row_count(self) -> int:
        """Rows of the file."""
        return int(self.file.metadata.num_rows)

    @property
    def group_row_counts(self) -> list[int]:
        """Rows of each row group."""
        groups = range(self.file.metadata.num_row_groups)
        return [self.file.metadata.row_group(number).num_rows for number in groups]

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, also of those that the schema does not know."""
        return list(self.file.schema_arrow.names)

    def metadata(self) -> bytes:
        """Return this package's metadata in the footer: JSON, not yet checked.

        Raises:
            DamagedFileError: the file was not written by this package.
        """
        found = self.file.metadata.metadata or {}
        if schema.METADATA_KEY not in found:
            raise DamagedFileError(storage.shown_url(self.url), "its footer is not of this package")
        return bytes(found[schema.METADATA_KEY])

    def footer(self) -> FooterRecord:
        """Return this package's metadata in the footer of a shard's file.

        Raises:
            DamagedFileError: the file was not written by this package, or has other rows than counted.
        """
        with damage(self.url):
            footer = FooterRecord.model_validate_json(self.metadata())
            counted = footer.error_rows if self.table == "errors" else footer.rows
            if self.row_count != counted:
                raise ValueError(f"has {self.row_count} rows; its footer counts {counted}")
            return footer

    def rows(self, columns: Sequence[str], rows_at_a_time: int = ROWS_AT_A_TIME) -> Iterator[Row]:
        """Iterate over the rows as dictionaries, a few in memory at a time.

        Raises:
            DamagedFileError: the rows cannot be read, or have an impossible value.
        """
        with damage(self.url):
            read = 0
            for batch in self.file.iter_batches(rows_at_a_time, columns=list(columns), use_threads=False):
                read += batch.num_rows
                yield from checked_values(batch, self.table).to_pylist()
            require_rows(read, self.row_count)

    def tables(self, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[pa.Table]:
        """Iterate over the rows as tables, a row group in memory at a time; raises as `rows` does.

        Args:
            columns: the columns to read.
            groups: numbers of the row groups to read; None: all.
        """
        with damage(self.url):
            # few large requests to a store, instead of some for each column
            file = _parquet(self.source, pre_buffer=True, metadata=self.file.metadata)
            for number in range(self.file.metadata.num_row_groups) if groups is None else groups:
                found = file.read_row_group(number, columns=list(columns))
                require_rows(found.num_rows, self.group_row_counts[number])
                yield checked_values(found, self.table)

    def read_group(
        self, number: int, columns: Sequence[str], offsets: Sequence[int] | None = None
    ) -> pa.Table:
        """Read columns of one row group: all rows, or those at the offsets; raises as `rows` does."""
        with damage(self.url):
            table = self.file.read_row_group(number, columns=list(columns))
            require_rows(table.num_rows, self.group_row_counts[number])
            return checked_values(table if offsets is None else table.take(list(offsets)), self.table)


def require_rows(read: int, listed: int) -> None:
    """Raise a ValueError if not all rows were read: pyarrow silently omits some of a damaged page."""
    if read != listed:
        raise ValueError(f"{listed} rows are listed, and {read} can be read")


@contextmanager
def damage(url: str) -> Iterator[None]:
    """Turn every fault of a file of an output folder into an error that names the file.

    Raises:
        DamagedFileError: also for exhausted recursion or memory.
    """
    try:
        yield
    except (DamagedFileError, UserError, OutputError):
        raise
    except ValidationError as error:
        raise DamagedFileError(storage.shown_url(url), _first_problem(error)) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedFileError(storage.shown_url(url), _one_line(error, url)) from None
    except (RecursionError, MemoryError, pa.ArrowException) as error:
        raise DamagedFileError(storage.shown_url(url), _one_line(error, url)) from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return printable(f"{where}: {first['msg']}" if where else str(first["msg"]))[:MAX_REASON_CHARACTERS]


def _one_line(error: BaseException, url: str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = without_secrets(error, url) if isinstance(error, Exception) else ""
    return (text or type(error).__name__)[:MAX_REASON_CHARACTERS]


def require_regular(url: str) -> None:
    """Refuse pipes, devices and folders, which would block or never end; links are followed."""
    if split_url(url).scheme in ("", "file"):
        mode = local_path(url).stat().st_mode
        if not stat.S_ISREG(mode):
            raise DamagedFileError(storage.shown_url(url), "is no regular file")


def _read_bounded(url: str, max_bytes: int) -> bytes:
    require_regular(url)
    filesystem, path = storage.resolve(url)
    with filesystem.open_input_file(path) as file:
        size_bytes = file.size()
        if size_bytes > max_bytes:
            raise DamagedFileError(
                storage.shown_url(url), f"has {size_bytes} bytes; the limit is {max_bytes}"
            )
        return bytes(file.read())


def read_record(url: str, kind: type[Model]) -> Model:
    """Read and check a JSON record.

    Raises:
        DamagedFileError: the file cannot be read, or is no such record.
    """
    with damage(url):
        return kind.model_validate_json(_read_bounded(url, MAX_JSON_BYTES))


@contextmanager
def open_table(url: str, table: Table) -> Iterator[TableFile]:
    """Open a Parquet file of the output; its columns are checked against the schema of its table.

    Columns that the schema does not know are ignored. Missing columns, other types, and row groups larger
    than any that is written count as damage.

    Raises:
        DamagedFileError: the file cannot be read, or is no such table.
    """
    with damage(url):
        require_regular(url)
        filesystem, path = storage.resolve(url)
        source = filesystem.open_input_file(path)
    with source:
        with damage(url):
            file = _parquet(source, pre_buffer=False)
            _require_columns(file.schema_arrow, schema_with(table, file.schema_arrow.names))
            _require_bounded_groups(file.metadata)
        yield TableFile(url, table, source, file)


def _parquet(
    source: pa.NativeFile, *, pre_buffer: bool, metadata: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    return pq.ParquetFile(
        source,
        metadata=metadata,
        buffer_size=READ_BUFFER_BYTES,
        pre_buffer=pre_buffer,
        thrift_string_size_limit=MAX_FOOTER_BYTES,
        page_checksum_verification=True,
    )


def _require_columns(found: pa.Schema, expected: pa.Schema) -> None:
    for field in expected:
        places = found.get_all_field_indices(field.name)
        if len(places) != 1:
            raise ValueError(f"expected one column {field.name}, found {len(places)}")
        if not _is_same_type(found.field(places[0]).type, field.type):
            kind = printable(str(found.field(places[0]).type))[:80]
            raise ValueError(f"column {field.name}: expected {field.type}, found {kind}")


def _is_same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    """Return whether two types are equal but for the name of a list's elements, which differs by writer."""
    if pa.types.is_struct(expected):
        return pa.types.is_struct(found) and all(
            found.get_field_index(field.name) >= 0 and _is_same_type(found.field(field.name).type, field.type)
            for field in expected
        )
    if pa.types.is_list(expected):
        return pa.types.is_list(found) and _is_same_type(found.value_type, expected.value_type)
    return bool(found.equals(expected))


def _require_bounded_groups(metadata: pq.FileMetaData) -> None:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if not 0 <= group.num_rows <= MAX_GROUP_ROWS or group.total_byte_size > MAX_GROUP_BYTES:
            raise ValueError(
                f"row group {number} has {group.num_rows} rows of {group.total_byte_size} bytes; the limits "
                f"are {MAX_GROUP_ROWS} and {MAX_GROUP_BYTES}"
            )


def checked_values(batch: pa.RecordBatch | pa.Table, table: Table) -> pa.RecordBatch | pa.Table:
    """Return the same rows if all their values are possible; raises ValueError otherwise."""
    for name in batch.schema.names:
        column = batch.column(name)
        if name in REQUIRED[table] and column.null_count:
            raise ValueError(f"column {name}: a row has none")
        # pyarrow imports pandas to compare a column with a Python number
        smallest = pc.min(column).as_py() if name in _AT_LEAST else None
        if smallest is not None and smallest < _AT_LEAST[name]:
            raise ValueError(f"column {name}: {smallest}, expected {_AT_LEAST[name]} or more")
        if pa.types.is_floating(column.type) and pc.any(pc.invert(pc.is_finite(column))).as_py():
            raise ValueError(f"column {name}: a value is not finite")
    return batch


def shard_list_bytes(rows: Sequence[ShardRow]) -> bytes:
    """Return the content of OUT/shards.parquet."""
    sink = BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema.SHARDS_SCHEMA), sink, compression="zstd")
    return sink.getvalue()
