"""Read the rows of a Parquet file one by one, in memory of a few pages; damage costs rows, not the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from pipeline import storage
from pipeline.errors import SampleFailure, ShardError, UserError
from pipeline.shards.file_kinds import HEAD_BYTES, kind_of
from pipeline.storage.urls import is_local, raised_as, short_url

# a batch of images is held at once
BATCH_ROWS = 16
PAGE_BUFFER_BYTES = 1 << 20
TAR_MAGIC_AT = 257

Values = dict[str, Any]


@contextmanager
def opened_parquet(url: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, of which pages are read one after another.

    Args:
        url: local path, s3:// or gs://.

    Raises:
        UserError: there is no such file, or it is not Parquet.
    """
    filesystem, path = storage.resolve(url)
    with raised_as(UserError, url, "cannot be opened"):
        stream = filesystem.open_input_file(path)
    with stream:
        try:
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=PAGE_BUFFER_BYTES)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{short_url(url)}: {_why_not_parquet(stream, error)}") from None
        if file.metadata.num_rows > stream.size():
            rows = f"{file.metadata.num_rows} rows in {stream.size()} bytes"
            raise UserError(f"{short_url(url)}: is not a Parquet file: its footer claims {rows}")
        yield file


def _why_not_parquet(stream: pa.NativeFile, error: Exception) -> str:
    """Return what a file is that cannot be opened as Parquet, with the way out."""
    try:
        stream.seek(0)
        head = stream.read(HEAD_BYTES)
    except (pa.ArrowException, OSError):
        head = b"?"
    if head.startswith(b"PAR1"):
        return f"is a damaged or cut Parquet file; copy it again: {error}"
    if head[TAR_MAGIC_AT:].startswith(b"ustar"):
        return "is a tar, and a Parquet file is expected; a tar is a shard already: name it in input.shards"
    kind = kind_of(head)
    if kind is not None:
        return f"is {kind.name}, and a Parquet file is expected; {kind.way_out}"
    return f"is not a Parquet file: {error}"


def rows_of_parquet(
    url: str, columns: Sequence[str], start: int = 0
) -> Iterator[tuple[int, Callable[[], Values]]]:
    """Yield each row's number and a function that returns its values.

    The function raises SampleFailure: of kind `damaged_file` for rows that cannot be read, which are the rest
    of a row group, and of kind `row_not_utf8` where a text is not UTF-8.

    Args:
        url: local path, s3:// or gs://.
        columns: names of the columns to read.
        start: first row; row groups before it are not read.

    Raises:
        ShardError: an object store failed.
    """
    with opened_parquet(url) as file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > start:
                for index, values in _rows_of_group(url, file, group, columns):
                    if first + index >= start:
                        yield first + index, values
            first += rows


def _rows_of_group(
    url: str, file: pq.ParquetFile, group: int, columns: Sequence[str]
) -> Iterator[tuple[int, Callable[[], Values]]]:
    index, rows = 0, file.metadata.row_group(group).num_rows
    try:
        for batch in file.iter_batches(BATCH_ROWS, [group], list(columns), use_threads=False):
            for row in range(min(batch.num_rows, rows - index)):
                yield index + row, partial(_values, batch, row)
            index += batch.num_rows
        problem = "it has fewer rows than the footer states"
    # Arrow raises OSError for damaged pages, too
    except (pa.ArrowException, OSError) as error:
        if not is_local(url) and not isinstance(error, pa.ArrowException):
            raise ShardError(f"{short_url(url)}: cannot be read: {error}") from None
        problem = str(error)
    for missing in range(index, rows):
        message = f"row group {group} cannot be read from its row {index} on: {problem}"
        yield missing, partial(_raise_damage, message)


def _values(batch: pa.RecordBatch, row: int) -> Values:
    try:
        return {name: _value(batch.column(name), row) for name in batch.schema.names}
    except UnicodeDecodeError as error:
        raise SampleFailure("read", "row_not_utf8", f"a text is not UTF-8: {error.reason}") from error


def _value(column: pa.Array, row: int) -> Any:
    return _spelled_out(column.slice(row, 1)) if _is_spelled_out(column.type) else column[row].as_py()


def _spelled_out(value: pa.Array) -> str | None:
    """Return a time or decimal as text; a time of an unknown time zone in UTC."""
    try:
        text: str | None = pc.cast(value, pa.string())[0].as_py()
    except pa.ArrowInvalid:
        if not types.is_timestamp(value.type):
            raise
        text = pc.cast(pc.cast(value, pa.timestamp(value.type.unit, "UTC")), pa.string())[0].as_py()
    return text


def _raise_damage(message: str) -> Values:
    raise SampleFailure("read", "damaged_file", message)


def scalar_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns of texts, numbers, truth values, times and nulls."""
    return [column.name for column in schema if is_text(column.type) or _is_number(column.type)]


def is_text(column: pa.DataType) -> bool:
    """Return whether the values of a column are texts."""
    if types.is_dictionary(column):
        return is_text(column.value_type)
    return bool(types.is_string(column) or types.is_large_string(column) or types.is_string_view(column))


def is_text_list(column: pa.DataType) -> bool:
    """Return whether the values of a column are lists of texts."""
    is_list = types.is_list(column) or types.is_large_list(column) or types.is_fixed_size_list(column)
    return bool(is_list and is_text(column.value_type))


def is_bytes(column: pa.DataType) -> bool:
    """Return whether the values of a column are bytes."""
    if types.is_dictionary(column):
        return is_bytes(column.value_type)
    return bool(
        types.is_binary(column)
        or types.is_large_binary(column)
        or types.is_binary_view(column)
        or types.is_fixed_size_binary(column)
    )


def _is_number(column: pa.DataType) -> bool:
    return bool(
        types.is_integer(column)
        or types.is_floating(column)
        or types.is_boolean(column)
        or types.is_null(column)
        or _is_spelled_out(column)
    )


def _is_spelled_out(column: pa.DataType) -> bool:
    """Return whether JSON has no such values, so that they become texts."""
    return bool(types.is_temporal(column) or types.is_decimal(column))
