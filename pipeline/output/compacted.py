"""Read a compacted folder: the rows of many shards in one file, and an index that says where each shard is.

`annotations/part-00000.parquet`, ... and `errors/part-00000.parquet`, ... hold the rows of shards in the
order of their ids; compacted.parquet has a row for each shard. `pipeline.output.compaction` writes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import DamagedFileError
from pipeline.output.footer_cache import FooterTexts
from pipeline.output.records import LAYOUT, CompactedRecord, FooterRecord, PartRecord
from pipeline.output.schema import COMPACTED_SCHEMA, CompactedRow
from pipeline.output.shard_files import PARQUET, ShardFooters, Tables
from pipeline.output.tables import (
    ROWS_AT_A_TIME,
    Row,
    TableFile,
    checked_values,
    damage,
    open_table,
    require_rows,
)

COMPACTED_FILE = "compacted.parquet"
COMPACTION_FILE = "compaction.json"
# as the files of single shards have them, so that a reader which samples groups samples the same rows
ROWS_PER_VIRTUAL_GROUP = 1000
INDEX_ROWS_AT_A_TIME = 1000
PLACE_COLUMNS = tuple(name for name in COMPACTED_SCHEMA.names if name != "footer")
PART_NAME = re.compile(r"part-(\d{5,7})\.parquet")

Data = TypeVar("Data", pa.RecordBatch, pa.Table)


def part_name(number: int) -> str:
    """Return the name of a part's file."""
    return f"part-{number:05d}{PARQUET}"


class Span(NamedTuple):
    """Rows of a part."""

    part: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Index:
    """Where the rows of each shard are, without the footers, of which the file keeps a copy.

    Attributes:
        url: compacted.parquet.
        record: its footer.
        spans: by table and shard id.
        row_numbers: by shard id, its row in the file.
    """

    url: str
    record: CompactedRecord
    spans: dict[Tables, dict[str, Span]]
    row_numbers: dict[str, int]

    @classmethod
    def read(cls, url: str) -> Index:
        """Read the index; raises DamagedFileError."""
        annotations: dict[str, Span] = {}
        errors: dict[str, Span] = {}
        with open_table(url, "compacted") as file, damage(url):
            record = CompactedRecord.model_validate_json(file.metadata())
            if record.layout != LAYOUT:
                raise ValueError(f"layout {record.layout}; this version reads layout {LAYOUT}")
            for row in cast("Iterator[CompactedRow]", file.rows(PLACE_COLUMNS, INDEX_ROWS_AT_A_TIME)):
                shard_id = row["shard_id"]
                annotations[shard_id] = Span(
                    row["annotations_part"], row["annotations_first_row"], row["rows"]
                )
                errors[shard_id] = Span(row["errors_part"], row["errors_first_row"], row["error_rows"])
            if len(annotations) != file.row_count:
                raise ValueError("shard_id: some shards are listed twice")
        numbers = {shard_id: number for number, shard_id in enumerate(annotations)}
        return cls(url, record, {"annotations": annotations, "errors": errors}, numbers)

    def footer_texts(self, shard_ids: Sequence[str]) -> Iterator[str]:
        """Iterate over the footers of shards, in order; fast where the order is that of the file.

        Raises:
            DamagedFileError: the index cannot be read.
        """
        with open_table(self.url, "compacted") as file:
            counts = file.group_row_counts
            group, texts, start = -1, pa.chunked_array([], pa.string()), 0
            for shard_id in shard_ids:
                number = self.row_numbers[shard_id]
                if not start <= number < start + len(texts):
                    group, start = _group_of(counts, number)
                    texts = file.read_group(group, ["footer"]).column("footer")
                yield texts[number - start].as_py()


def _group_of(row_counts: Sequence[int], row: int) -> tuple[int, int]:
    """Return the row group that holds a row, and the group's first row."""
    start = 0
    for group, count in enumerate(row_counts):
        if row < start + count:
            return group, start
        start += count
    raise ValueError(f"has no row {row}")


def _with_shard(columns: Sequence[str]) -> list[str]:
    """Return columns to read: those wanted, and the one that says whose rows they are."""
    return list(dict.fromkeys([*columns, "shard"]))


@dataclass(frozen=True)
class PartRows:
    """The rows of one shard in a part: a `ShardTable`.

    Attributes:
        part: the open file.
        span: which of its rows.
        record: the footer that the shard's own file had.
    """

    part: TableFile
    span: Span
    record: FooterRecord

    @property
    def url(self) -> str:
        """The file that holds the rows."""
        return self.part.url

    @property
    def row_count(self) -> int:
        """Rows of the shard."""
        return self.span.rows

    @property
    def group_row_counts(self) -> list[int]:
        """Rows of each group that `read_group` reads."""
        whole, rest = divmod(self.span.rows, ROWS_PER_VIRTUAL_GROUP)
        return [ROWS_PER_VIRTUAL_GROUP] * whole + ([rest] if rest else [])

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, also of those that the schema does not know."""
        return self.part.column_names

    def footer(self) -> FooterRecord:
        """Return the footer that the shard's own file had; raises DamagedFileError if it counts others."""
        counted = self.record.error_rows if self.part.table == "errors" else self.record.rows
        if self.span.rows != counted:
            problem = f"has {self.span.rows} rows of {self.record.shard}; its footer counts {counted}"
            raise DamagedFileError(storage.shown_url(self.url), problem)
        return self.record

    def rows(self, columns: Sequence[str], rows_at_a_time: int = ROWS_AT_A_TIME) -> Iterator[Row]:
        """Iterate over the rows as dictionaries, a few in memory at a time; raises DamagedFileError."""
        with damage(self.url):
            read = 0
            for group, start, stop in self._pieces(0, self.span.rows):
                batches = self.part.file.iter_batches(
                    rows_at_a_time, row_groups=[group], columns=_with_shard(columns), use_threads=False
                )
                for batch in _within(batches, start, stop):
                    read += batch.num_rows
                    yield from self._own(checked_values(batch, self.part.table), columns).to_pylist()
            require_rows(read, self.span.rows)

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Iterate over the rows as tables, a row group in memory at a time; raises DamagedFileError."""
        with damage(self.url):
            for group, start, stop in self._pieces(0, self.span.rows):
                for table in self.part.tables(_with_shard(columns), [group]):
                    yield self._own(table.slice(start, stop - start), columns)

    def read_group(
        self, number: int, columns: Sequence[str], offsets: Sequence[int] | None = None
    ) -> pa.Table:
        """Read columns of a group: all rows, or those at the offsets; raises DamagedFileError."""
        with damage(self.url):
            first = number * ROWS_PER_VIRTUAL_GROUP
            last = min(first + ROWS_PER_VIRTUAL_GROUP, self.span.rows)
            pieces = [
                self.part.read_group(group, _with_shard(columns)).slice(start, stop - start)
                for group, start, stop in self._pieces(first, last)
            ]
            table = self._own(pa.concat_tables(pieces), columns)
            return table if offsets is None else table.take(list(offsets))

    def _own(self, data: Data, columns: Sequence[str]) -> Data:
        """Return the columns that were wanted; raises ValueError if the rows are of another shard."""
        others = set(pc.unique(data.column("shard")).to_pylist()) - {self.record.shard}
        if others:
            raise ValueError(
                f"has rows of {sorted(map(str, others))[0]} where those of {self.record.shard} should be"
            )
        return data if "shard" in columns else data.drop_columns(["shard"])

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Iterate over the row groups that hold rows of the shard: each with a range of its rows."""
        first, last = first + self.span.first_row, last + self.span.first_row
        start = 0
        for group, count in enumerate(self.part.group_row_counts):
            if max(first, start) < min(last, start + count):
                yield group, max(first - start, 0), min(last - start, count)
            start += count


def _within(batches: Iterator[pa.RecordBatch], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Cut rows out of consecutive batches; what follows them is not read."""
    position = 0
    for batch in batches:
        begin, end = max(start - position, 0), min(stop - position, batch.num_rows)
        if begin < end:
            yield batch.slice(begin, end - begin)
        position += batch.num_rows
        if position >= stop:
            return


@dataclass(frozen=True)
class CompactedFiles:
    """The files of a compacted folder.

    Attributes:
        url: the folder.
    """

    url: str

    @cached_property
    def index(self) -> Index:
        """Where the rows of each shard are; raises DamagedFileError."""
        return Index.read(storage.join_url(self.url, COMPACTED_FILE))

    def ids(self, table: Tables) -> frozenset[str]:
        """Return the ids of the shards whose part is there; raises OutputError, DamagedFileError."""
        return frozenset(self.sizes(table))

    def sizes(self, table: Tables) -> Mapping[str, int]:
        """Return each shard's share of the size of its part, by id; raises as `ids` does."""
        versions = storage.list_versions(storage.join_url(self.url, table))
        part_bytes = {_part_number(name): version.size_bytes or 0 for name, version in versions.items()}
        spans = self.index.spans[table]
        part_rows = Counter[int]()
        for span in spans.values():
            part_rows[span.part] += span.rows
        return {
            shard_id: part_bytes[span.part] * span.rows // max(part_rows[span.part], 1)
            for shard_id, span in spans.items()
            if span.part in part_bytes
        }

    def annotation_names(self, shard_ids: Collection[str]) -> frozenset[str]:
        """Return the names of the files in `annotations/` that hold rows of these shards."""
        spans = self.index.spans["annotations"]
        return frozenset(part_name(spans[shard_id].part) for shard_id in shard_ids if shard_id in spans)

    def file_url(self, table: Tables, shard_id: str) -> str:
        """Return the URL of the part that holds the rows of a shard."""
        if (span := self.index.spans[table].get(shard_id)) is None:
            raise DamagedFileError(storage.shown_url(self.index.url), f"lists no shard {shard_id}")
        return self._part_url(table, span.part)

    @contextmanager
    def open(self, table: Tables, shard_id: str) -> Iterator[PartRows]:
        """Open the annotations or errors of a shard; raises DamagedFileError."""
        url = self.file_url(table, shard_id)
        with damage(self.index.url):
            (text,) = self.index.footer_texts([shard_id])
            record = FooterRecord.model_validate_json(text)
        with open_table(url, table) as part:
            span = self.index.spans[table][shard_id]
            self._require_own_part(part, span)
            yield PartRows(part, span, record)

    def footers(
        self, shard_ids: Sequence[str], *, is_cached: bool = False
    ) -> Iterator[ShardFooters | DamagedFileError]:
        """Read the footers of several shards from the index; each part is opened once, and not cached."""
        del is_cached
        faults = self._faults_of_parts(shard_ids)
        for shard_id, text in zip(shard_ids, self.index.footer_texts(shard_ids), strict=True):
            found: ShardFooters | DamagedFileError
            try:
                found = self._footers(shard_id, text)
            except DamagedFileError as error:
                found = error
            spans = [(table, spans[shard_id].part) for table, spans in self.index.spans.items()]
            yield next((faults[part] for part in spans if part in faults), found)

    def _footers(self, shard_id: str, text: str) -> ShardFooters:
        with damage(self.index.url):
            record = FooterRecord.model_validate_json(text)
            for table, counted in (("annotations", record.rows), ("errors", record.error_rows)):
                if (rows := self.index.spans[cast("Tables", table)][shard_id].rows) != counted:
                    raise ValueError(
                        f"lists {rows} rows of {table} of {shard_id}; the footer counts {counted}"
                    )
        return ShardFooters(record, record, FooterTexts(text, text))

    def _faults_of_parts(self, shard_ids: Sequence[str]) -> dict[tuple[Tables, int], DamagedFileError]:
        """Open each part of the shards once; return what is wrong with it."""
        last: dict[tuple[Tables, int], Span] = {}
        for table, spans in self.index.spans.items():
            for shard_id in shard_ids:
                span = spans[shard_id]
                last[table, span.part] = max(last.get((table, span.part), span), span)
        faults = {}
        for (table, number), span in last.items():
            try:
                with open_table(self._part_url(table, number), table) as part:
                    self._require_own_part(part, span)
            except DamagedFileError as error:
                faults[table, number] = error
        return faults

    def _require_own_part(self, part: TableFile, span: Span) -> None:
        """Check that a file is the part that the index describes, and has the rows that it lists."""
        with damage(part.url):
            record = PartRecord.model_validate_json(part.metadata())
            if (record.plan, record.part, record.layout) != (self.index.record.plan, span.part, LAYOUT):
                raise ValueError(f"is not the part {span.part} that {COMPACTED_FILE} describes")
            if span.first_row + span.rows > part.row_count:
                needed = f"{span.first_row + span.rows} or more"
                raise ValueError(f"has {part.row_count} rows; expected {needed}")

    def _part_url(self, table: Tables, number: int) -> str:
        return storage.join_url(self.url, table, part_name(number))


def _part_number(name: str) -> int | None:
    found = PART_NAME.fullmatch(name)
    return int(found[1]) if found and part_name(int(found[1])) == name else None
