"""What the files of an output folder say, parsed and checked once; a foreign or damaged folder is met here.

JSON records are models; Parquet files are held against `pipeline.output.schema` before their rows are read.
Whatever is wrong with a file becomes a `DamagedFileError` that names it in one line.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import storage
from pipeline.errors import DamagedFileError, OutputError, UserError
from pipeline.output.counts import ShardCounts
from pipeline.output.folder import DAMAGED, FAILED, JOB_FILE, LAYOUT, SHARDS_FILE, SUCCESS_FILE
from pipeline.output.schema import ANNOTATION_SCHEMA, ERROR_SCHEMA, METADATA_KEY
from pipeline.output.shard_list import SHARDS_SCHEMA
from pipeline.storage import InputVersion
from pipeline.storage.urls import local_path, split_url, without_secrets
from pipeline.text import printable

MAX_JSON_BYTES = 64 << 20
MAX_FOOTER_BYTES = 16 << 20
# the writer's groups have 1,000 rows; others may have joined some
MAX_GROUP_ROWS = 1 << 20
MAX_GROUP_BYTES = 1 << 30
MAX_SHARDS = 10_000_000
MAX_REASON_CHARACTERS = 300
READ_BUFFER_BYTES = 1 << 20
# what a shard id is made of, so that it names a file and nothing else
SHARD_ID = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,200}")

Table = Literal["annotations", "errors", "shards"]
TABLE_SCHEMAS: dict[Table, pa.Schema] = {
    "annotations": ANNOTATION_SCHEMA,
    "errors": ERROR_SCHEMA,
    "shards": SHARDS_SCHEMA,
}
_NEVER_NULL = frozenset(
    [
        *("shard_id", "shard", "key", "sample_index", "prompt_index", "prompt", "status", "image_height"),
        *("image_width", "similarity", "peak", "area", "stage", "kind", "message"),
    ]
)
# an error may be of a whole shard, or of a whole sample
_MAY_BE_NULL_IN_ERRORS = frozenset(("key", "sample_index", "prompt_index"))
_AT_LEAST = {"sample_index": 0, "prompt_index": 0, "image_height": 1, "image_width": 1, "area": 0}
_AT_LEAST |= {"size_bytes": 0, "heatmap_height": 0, "heatmap_width": 0}

Count = Annotated[int, Field(ge=0, le=2**53)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Model = TypeVar("Model", bound=BaseModel)
Row = dict[str, Any]


class _Record(BaseModel):
    """A JSON object of ours; what later versions add is left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class JobRecord(_Record):
    """OUT/job.json.

    Attributes:
        config_hash: hash of what changes the rows.
        config: the configuration, to be parsed by `pipeline.config.load.parse_config`.
        weights_digest: of the model.
        versions: of the installed packages.
        started: when the newest run began.
        layout: version of what is written and how.
    """

    layout: int = 1
    config_hash: str
    config: dict[str, Any]
    weights_digest: str = "unknown"
    versions: dict[str, str] = {}
    started: str = "unknown"


class CountsRecord(_Record):
    """Outcomes of samples, as footers and OUT/_SUCCESS hold them."""

    annotated: Count
    empty: Count
    failed: Count
    rows: Count
    error_rows: Count
    dropped_prompts: Count
    errors_by_kind: dict[str, Count]
    error_examples: dict[str, str] = {}

    def counts(self) -> ShardCounts:
        """The same as the pipeline's own type."""
        return ShardCounts(**{name: getattr(self, name) for name in CountsRecord.model_fields})


class _VersionRecord(_Record):
    size: Count | None
    mtime_ns: int | None
    etag: str | None


class FooterRecord(CountsRecord):
    """The footer of a shard's annotations or errors.

    Attributes:
        layout: version of what is written and how.
        attempt: that wrote the file; the two files of a shard must agree.
        config_hash: of the job.
        shard: the shard, as it was named.
        state: done, or damaged: the archive was not read to a sound end.
        input: which version of the shard was read.
        content_digest: of all bytes of the shard.
    """

    layout: int
    attempt: str
    config_hash: str
    shard: str
    state: Literal["done", "damaged"]
    input: _VersionRecord
    content_digest: str

    @property
    def version(self) -> InputVersion:
        """Which version of the shard was read."""
        return InputVersion(self.input.size, self.input.mtime_ns, self.input.etag)


class SuccessRecord(CountsRecord):
    """OUT/_SUCCESS."""

    shards: Count
    damaged: Count


class FailureRecord(_Record):
    """OUT/failed/SHARD.json."""

    shard_id: str
    shard: str
    attempts: Count
    last_error: str
    when: str = "unknown"


class DamageRecord(_Record):
    """OUT/damaged/SHARD.json."""

    shard_id: str
    shard: str
    reason: str
    when: str = "unknown"


class _MeasuresRecord(_Record):
    images_decoded: Count
    device_busy_s: Seconds
    ready_s: Seconds


class RunFile(_Record):
    """OUT/runs/TIME.json, as `pipeline.output.runs.RunRecord` writes it."""

    started: str
    updated: str
    ended: str
    elapsed_s: Seconds
    shards_done: Count
    samples: Count
    samples_per_s: Seconds
    measures: _MeasuresRecord
    workers: Count
    history: Annotated[list[tuple[Seconds, Count]], Field(max_length=100_000)] = []


@contextmanager
def damage(url: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file of an output folder into an error that names it.

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
    told = without_secrets(error, url) if isinstance(error, Exception) else ""
    return (told or type(error).__name__)[:MAX_REASON_CHARACTERS]


def _require_regular(url: str) -> None:
    """Refuse what would block or never end: pipes, devices, folders; a link counts as what it leads to."""
    if split_url(url).scheme in ("", "file"):
        mode = local_path(url).stat().st_mode
        if not stat.S_ISREG(mode):
            raise DamagedFileError(storage.shown_url(url), "is no regular file")


def _read_bounded(url: str, max_bytes: int) -> bytes:
    _require_regular(url)
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
        DamagedFileError: it cannot be read, or is no such record.
    """
    with damage(url):
        return kind.model_validate_json(_read_bounded(url, MAX_JSON_BYTES))


def read_job_record(out_dir: str) -> JobRecord:
    """OUT/job.json.

    Raises:
        UserError: the folder has none.
        DamagedFileError: it is none of ours.
    """
    url = storage.join_url(out_dir, JOB_FILE)
    if JOB_FILE not in storage.list_names(out_dir):
        folder = storage.shown_url(out_dir)
        if _is_there(url):
            raise DamagedFileError(storage.shown_url(url), "is no regular file")
        raise UserError(f"{folder}: holds no {JOB_FILE}; is it the output folder of `legrad annotate`?")
    record = read_record(url, JobRecord)
    if record.layout != LAYOUT:
        raise UserError(
            f"{storage.shown_url(url)}: written by another version of this program (layout {record.layout}; "
            f"this one reads layout {LAYOUT}): choose another output.dir, or install that version"
        )
    return record


def _is_there(url: str) -> bool:
    return split_url(url).scheme in ("", "file") and os.path.lexists(local_path(url))


def read_success(out_dir: str) -> SuccessRecord:
    """OUT/_SUCCESS; raises DamagedFileError where it is missing or none of ours."""
    return read_record(storage.join_url(out_dir, SUCCESS_FILE), SuccessRecord)


def read_failure(out_dir: str, shard_id: str) -> FailureRecord:
    """OUT/failed/SHARD.json; raises DamagedFileError where it is missing or none of ours."""
    return read_record(storage.join_url(out_dir, FAILED, f"{shard_id}.json"), FailureRecord)


def read_damage(out_dir: str, shard_id: str) -> DamageRecord:
    """OUT/damaged/SHARD.json; raises DamagedFileError where it is missing or none of ours."""
    return read_record(storage.join_url(out_dir, DAMAGED, f"{shard_id}.json"), DamageRecord)


def read_shard_rows(out_dir: str) -> list[Row]:
    """The rows of OUT/shards.parquet: shard_id, shard (canonical URL), size_bytes; ids safe and unlike.

    Raises:
        UserError: the folder has none.
        DamagedFileError: it is none of ours.
    """
    url = storage.join_url(out_dir, SHARDS_FILE)
    if SHARDS_FILE not in storage.list_names(out_dir) and not _is_there(url):
        raise UserError(f"{storage.shown_url(out_dir)}: holds no {SHARDS_FILE}")
    rows: list[Row] = []
    with open_table(url, "shards") as file, damage(url):
        if file.metadata.num_rows > MAX_SHARDS:
            raise ValueError(f"lists {file.metadata.num_rows} shards; the limit is {MAX_SHARDS}")
        for batch in file.iter_batches(10_000, columns=SHARDS_SCHEMA.names, use_threads=False):
            rows += checked_rows(batch, "shards")
        _require_safe_ids([row["shard_id"] for row in rows])
    return rows


def _require_safe_ids(shard_ids: Sequence[str]) -> None:
    for shard_id in shard_ids:
        if not SHARD_ID.fullmatch(shard_id):
            raise ValueError(f"shard_id: {printable(shard_id)[:80]} cannot be the name of a file")
    if len(set(shard_ids)) != len(shard_ids):
        raise ValueError("shard_id: some shards are listed twice")


@contextmanager
def open_table(url: str, table: Table) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of the output; its columns are checked against the schema of its table.

    Columns that the schema does not know are tolerated; missing ones and other types are damage, and so are
    row groups larger than any that is written.

    Raises:
        DamagedFileError: it cannot be read, or is no such table.
    """
    with damage(url):
        _require_regular(url)
        filesystem, path = storage.resolve(url)
        source = filesystem.open_input_file(path)
    with source:
        with damage(url):
            file = pq.ParquetFile(
                source,
                buffer_size=READ_BUFFER_BYTES,
                pre_buffer=False,
                thrift_string_size_limit=MAX_FOOTER_BYTES,
            )
            _require_columns(file.schema_arrow, TABLE_SCHEMAS[table])
            _require_bounded_groups(file.metadata)
        yield file


def _require_columns(found: pa.Schema, expected: pa.Schema) -> None:
    for field in expected:
        places = found.get_all_field_indices(field.name)
        if len(places) != 1:
            raise ValueError(f"expected one column {field.name}, found {len(places)}")
        if not _is_same_type(found.field(places[0]).type, field.type):
            kind = printable(str(found.field(places[0]).type))[:80]
            raise ValueError(f"column {field.name}: expected {field.type}, found {kind}")


def _is_same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    """Equal, whatever the name of a list's elements, which other writers choose otherwise."""
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


def read_footer_record(url: str, table: Table) -> FooterRecord:
    """This package's metadata in a Parquet file's footer; only the footer is read.

    Raises:
        DamagedFileError: it cannot be read, is no such table, or was not written by this package.
    """
    with open_table(url, table) as file:
        return footer_of(file, url)


def footer_of(file: pq.ParquetFile, url: str) -> FooterRecord:
    """The same of an open file."""
    with damage(url):
        metadata = file.metadata.metadata or {}
        if METADATA_KEY not in metadata:
            raise ValueError("its footer is not of this package")
        footer = FooterRecord.model_validate_json(metadata[METADATA_KEY])
        # the two tables are told apart by a column that errors have alone
        counted = footer.error_rows if "stage" in file.schema_arrow.names else footer.rows
        if file.metadata.num_rows != counted:
            raise ValueError(f"has {file.metadata.num_rows} rows; its footer counts {counted}")
        return footer


def checked_batch(batch: pa.RecordBatch | pa.Table, table: Table) -> pa.RecordBatch | pa.Table:
    """The same rows, once their values have shown to be possible ones; raises ValueError otherwise."""
    for name in batch.schema.names:
        column = batch.column(name)
        if name in _NEVER_NULL and column.null_count and not _may_be_null(name, table):
            raise ValueError(f"column {name}: a row has none")
        # pyarrow imports pandas to compare a column with a Python number
        smallest = pc.min(column).as_py() if name in _AT_LEAST else None
        if smallest is not None and smallest < _AT_LEAST[name]:
            raise ValueError(f"column {name}: {smallest}, expected {_AT_LEAST[name]} or more")
        if pa.types.is_floating(column.type) and pc.any(pc.invert(pc.is_finite(column))).as_py():
            raise ValueError(f"column {name}: a value is not finite")
    return batch


def _may_be_null(name: str, table: Table) -> bool:
    return table == "errors" and name in _MAY_BE_NULL_IN_ERRORS


def checked_rows(batch: pa.RecordBatch | pa.Table, table: Table) -> list[Row]:
    """Rows as dictionaries, their values checked; raises ValueError, also for text that is not UTF-8."""
    rows: list[Row] = checked_batch(batch, table).to_pylist()
    return rows


def iter_rows(
    file: pq.ParquetFile, url: str, table: Table, columns: Sequence[str], rows_at_a_time: int = 256
) -> Iterator[Row]:
    """The rows of an open file, a few of them in memory at a time.

    Raises:
        DamagedFileError: they cannot be read, or a value is impossible.
    """
    with damage(url):
        batches = file.iter_batches(rows_at_a_time, columns=list(columns), use_threads=False)
        for batch in batches:
            yield from checked_rows(batch, table)


def read_rows(url: str, table: Table, columns: Sequence[str]) -> list[Row]:
    """All rows of a file; raises as `open_table` and `iter_rows` do."""
    with open_table(url, table) as file:
        return list(iter_rows(file, url, table, columns))


def damage_of(output_dir: str, shard_id: str) -> str:
    """Why a shard is damaged, as OUT/damaged/<shard-id>.json says."""
    try:
        return read_damage(output_dir, shard_id).reason
    except DamagedFileError as error:
        return f"its record cannot be read: {error}"
