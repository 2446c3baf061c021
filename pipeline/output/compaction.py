"""Write a compacted copy of an output folder: the same rows in fewer, larger Parquet files.

The old folder is only read. Each file appears whole or not at all; an interrupted compaction continues with
the files that are missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from pipeline import storage
from pipeline.errors import DamagedFileError, MismatchError, OutputError, UserError
from pipeline.output.compacted import COMPACTED_FILE, COMPACTION_FILE, part_name
from pipeline.output.compaction_plan import ROWS_PER_GROUP, TABLES, Plan, PlannedShard
from pipeline.output.folder import (
    ANNOTATIONS,
    DAMAGED,
    ERRORS,
    FAILED,
    JOB_FILE,
    RUNS,
    SHARDS_FILE,
    STAGING,
    SUCCESS_FILE,
    OutputFolder,
)
from pipeline.output.image_shards import lies_in
from pipeline.output.records import (
    LAYOUT,
    CompactionRecord,
    DamageRecord,
    FailureRecord,
    JobRecord,
    PartRecord,
    SuccessRecord,
    as_json,
    utc_now,
)
from pipeline.output.runs import RunRecord
from pipeline.output.schema import COMPACTED_SCHEMA, CompactedRow
from pipeline.output.shard_files import Tables
from pipeline.output.status import read_state
from pipeline.output.tables import (
    MAX_JSON_BYTES,
    SCHEMAS,
    ShardTable,
    damage,
    open_table,
    read_record,
    require_regular,
    schema_with,
    shard_list_bytes,
)
from pipeline.output.writer import TableSpool
from pipeline.storage.urls import is_local
from pipeline.text import printable

INDEX_ROWS_PER_GROUP = 1000
# files that are written at a time; each is read from shard by shard, which waits for a store most of the time
WRITERS = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A file of a compacted folder, and the shards whose rows it holds."""

    table: Tables
    number: int
    shards: Sequence[PlannedShard]

    @property
    def path(self) -> str:
        """The file, relative to the folder."""
        return f"{self.table}/{part_name(self.number)}"

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows[self.table] for shard in self.shards)


# called with a file after it is published, how many are published, and how many there will be
OnPart = Callable[[Part, int, int], None]


def write_compaction(plan: Plan, new_dir: str, *, on_part: OnPart = lambda *_: None) -> tuple[Part, ...]:
    """Write a compacted folder, or what an interrupted compaction has not yet written of it.

    Args:
        plan: what is written.
        new_dir: the new folder: none, an empty one, or one of an interrupted compaction with the same plan.
        on_part: see `OnPart`.

    Returns:
        All files in `annotations/` and `errors/` of the new folder.

    Raises:
        UserError: the new folder holds something else, or one of the two folders lies in the other.
        DamagedFileError: rows of the old folder cannot be read, or the new folder does not hold the same.
        MismatchError: the old folder changed in the meantime.
        OutputError: something cannot be written.
    """
    new = OutputFolder(storage.absolute(new_dir))
    _require_apart(plan.source.url, new.url)
    _claim(plan, new)
    new.sweep()
    parts = tuple(
        Part(table, number, shards) for table in TABLES for number, shards in enumerate(plan.parts(table))
    )
    try:
        _write_parts(plan, new, parts, on_part)
        _copy_records(plan, new)
        new.publish(SHARDS_FILE, shard_list_bytes(plan.listed))
        _publish_index(plan, new, len(plan.parts(ANNOTATIONS)), len(plan.parts(ERRORS)))
        _copy_record(plan.source, new, "", JOB_FILE, JobRecord)
        _require_same(plan, new)
        if not plan.shortfall and plan.source.has_success():
            _copy_record(plan.source, new, "", SUCCESS_FILE, SuccessRecord)
    finally:
        new.close()
    return parts


def _require_apart(out: str, new: str) -> None:
    names = [_place(url) for url in (out, new)]
    if lies_in(*names) or lies_in(*reversed(names)):
        raise UserError(
            f"{storage.shown_url(new)}: lies in {storage.shown_url(out)}, or the other way round: choose a "
            "folder outside"
        )


def _place(url: str) -> str:
    """Return what identifies a folder, with links resolved."""
    if is_local(url):
        return storage.shard_name(url).rstrip("/")
    filesystem, path = storage.resolve(url)
    return f"{filesystem.type_name}://{path}".rstrip("/")


def _claim(plan: Plan, new: OutputFolder) -> None:
    """Write compaction.json into an empty folder; refuse a folder that holds something else."""
    _require_own_folders(new)
    present = storage.list_entries(new.url) - {STAGING}
    shown = storage.shown_url(new.url)
    if not present:
        record = {
            "source": storage.shown_url(plan.source.url),
            "plan": plan.digest,
            "target_mib": plan.target_mib,
            "started": utc_now(),
        }
        new.publish(COMPACTION_FILE, as_json(record))
        return
    if COMPACTION_FILE not in present:
        raise UserError(
            f"{shown}: expected an empty folder or an interrupted compaction, found "
            f"{printable(min(present))}; choose another folder"
        )
    earlier = read_record(storage.join_url(new.url, COMPACTION_FILE), CompactionRecord)
    if earlier.plan != plan.digest:
        raise UserError(
            f"{shown}: holds a compaction of {printable(earlier.source)} to files of {earlier.target_mib} "
            "MiB, and is not what this command would write: choose another folder, or delete this one"
        )


def _require_own_folders(new: OutputFolder) -> None:
    """Refuse links in place of subfolders, through which files elsewhere would be replaced."""
    for name in (*TABLES, FAILED, DAMAGED, RUNS, STAGING):
        if _place(storage.join_url(new.url, name)) != f"{_place(new.url)}/{name}":
            raise UserError(f"{storage.shown_url(new.url)}: {name} is a link; choose another folder")


def _write_parts(plan: Plan, new: OutputFolder, parts: Sequence[Part], on_part: OnPart) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        pending = {pool.submit(_write_part, plan, new, part): part for part in parts}
        try:
            for done, future in enumerate(as_completed(pending), start=1):
                future.result()
                on_part(pending[future], done, len(parts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_part(plan: Plan, new: OutputFolder, part: Part) -> None:
    """Write a file, unless an interrupted compaction has written it, and check how many rows it has."""
    if not _is_written(plan, new, part):
        spool = TableSpool(_schema_of(plan, part), ROWS_PER_GROUP)
        with closing(spool):
            for shard in part.shards:
                _copy_rows(plan.source, part.table, shard, spool)
            record = PartRecord(layout=LAYOUT, plan=plan.digest, part=part.number)
            new.publish(part_name(part.number), spool.finish(record.model_dump()), part.table)
        if not _is_written(plan, new, part):
            raise OutputError(
                f"{storage.shown_url(new.url)}/{part.path}: does not hold the {part.rows} rows that were "
                "written"
            )


def _is_written(plan: Plan, new: OutputFolder, part: Part) -> bool:
    url = storage.join_url(new.url, part.table, part_name(part.number))
    if not storage.exists(storage.join_url(new.url, part.table), part_name(part.number)):
        return False
    try:
        with open_table(url, part.table) as file, damage(url):
            record = PartRecord.model_validate_json(file.metadata())
            return (record.plan, record.part, file.row_count) == (plan.digest, part.number, part.rows)
    except DamagedFileError:
        return False


def _schema_of(plan: Plan, part: Part) -> pa.Schema:
    """Return the columns of a file: those of its shards, which are all of one job."""
    if not part.shards:
        return SCHEMAS[part.table]
    with plan.source.open(part.table, part.shards[0].shard_id) as file:
        return schema_with(part.table, file.column_names)


def _copy_rows(source: OutputFolder, table: Tables, shard: PlannedShard, spool: TableSpool) -> None:
    with source.open(table, shard.shard_id) as file:
        schema = schema_with(table, file.column_names)
        if (file.footer().attempt, file.row_count) != (shard.attempt, shard.rows[table]):
            raise MismatchError(
                storage.shown_url(file.url), "changed while it was compacted: run the same command again"
            )
        _require_known_columns(file, schema)
        copied = 0
        for rows in file.tables(schema.names):
            with damage(file.url):
                spool.add(rows.select(schema.names).cast(schema))
            copied += rows.num_rows
    if copied != shard.rows[table]:
        problem = f"{copied} rows could be read; its footer counts {shard.rows[table]}"
        raise DamagedFileError(storage.shown_url(file.url), problem)


def _require_known_columns(file: ShardTable, schema: pa.Schema) -> None:
    if unknown := sorted(set(file.column_names) - set(schema.names)):
        raise UserError(
            f"{storage.shown_url(file.url)}: column {printable(unknown[0])} would be lost, because this "
            "version does not know it: compact the folder with the version that wrote it"
        )


def _publish_index(plan: Plan, new: OutputFolder, annotations_parts: int, errors_parts: int) -> None:
    with closing(TableSpool(COMPACTED_SCHEMA, INDEX_ROWS_PER_GROUP)) as spool:
        waiting: list[CompactedRow] = []
        for row in _index_rows(plan):
            waiting.append(row)
            if len(waiting) == INDEX_ROWS_PER_GROUP:
                spool.add(pa.Table.from_pylist(waiting, schema=COMPACTED_SCHEMA))
                waiting = []
        spool.add(pa.Table.from_pylist(waiting, schema=COMPACTED_SCHEMA))
        metadata = {
            "layout": LAYOUT,
            "plan": plan.digest,
            "annotations_parts": annotations_parts,
            "errors_parts": errors_parts,
        }
        new.publish(COMPACTED_FILE, spool.finish(metadata))


def _index_rows(plan: Plan) -> Iterator[CompactedRow]:
    shard_ids = [shard.shard_id for shard in plan.shards]
    footers = plan.source.files.footers(shard_ids, is_cached=True)
    for shard, found in zip(plan.shards, footers, strict=True):
        if isinstance(found, DamagedFileError):
            raise found
        if found.annotations.attempt != shard.attempt:
            url = plan.source.files.file_url(ANNOTATIONS, shard.shard_id)
            raise MismatchError(
                storage.shown_url(url), "changed while it was compacted: run the same command again"
            )
        yield {
            "shard_id": shard.shard_id,
            "annotations_part": shard.part[ANNOTATIONS],
            "annotations_first_row": shard.first_row[ANNOTATIONS],
            "rows": shard.rows[ANNOTATIONS],
            "errors_part": shard.part[ERRORS],
            "errors_first_row": shard.first_row[ERRORS],
            "error_rows": shard.rows[ERRORS],
            "footer": found.texts.annotations,
        }


def _copy_records(plan: Plan, new: OutputFolder) -> None:
    """Copy what is recorded of failed and damaged shards, and of runs."""
    names: list[tuple[str, str, type[BaseModel]]]
    names = [(FAILED, f"{shard_id}.json", FailureRecord) for shard_id in plan.state.failed]
    names += [(DAMAGED, f"{shard_id}.json", DamageRecord) for shard_id in plan.state.damaged]
    runs = sorted(storage.list_names(storage.join_url(plan.source.url, RUNS)))
    names += [(RUNS, name, RunRecord) for name in runs if name.endswith(".json")]
    for subfolder, name, kind in names:
        try:
            _copy_record(plan.source, new, subfolder, name, kind)
        except DamagedFileError as error:
            _log.warning("not copied: %s", error)


def _copy_record(
    source: OutputFolder, new: OutputFolder, subfolder: str, name: str, kind: type[BaseModel]
) -> None:
    """Copy a JSON file as it is; one that is no such record, such as a link to a private file, is refused."""
    url = storage.join_url(source.url, *filter(None, [subfolder, name]))
    with damage(url):
        require_regular(url)
        content = storage.read_bytes(url, max_bytes=MAX_JSON_BYTES)
        kind.model_validate_json(content)
    new.publish(name, content, subfolder)


def _require_same(plan: Plan, new: OutputFolder) -> None:
    """Read the new folder as every reader does, and compare it with the old one."""
    copy = OutputFolder(new.url)
    state = read_state(copy, copy.shard_rows(), copy.job().config_hash)
    expected: dict[str, Any] = {
        "done": plan.state.done,
        "damaged": plan.state.damaged,
        "strays": (),
        "mismatched": {},
        "counts": plan.state.counts,
    }
    found = {name: getattr(state, name) for name in expected}
    if differing := [name for name in expected if found[name] != expected[name]]:
        raise OutputError(
            f"{storage.shown_url(new.url)}: differs from {storage.shown_url(plan.source.url)} in "
            f"{', '.join(differing)}: delete it and compact again"
        )
