"""Scores of a bounded random sample of the rows of an output folder; only small columns are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from legrad.masks.rle import Rle, mask_area
from pipeline.errors import DamagedFileError
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.output.schema import ACCEPTED
from pipeline.output.tables import damage

SCORE_COLUMNS = ("sample_index", "status", "class_id", "similarity", "peak", "threshold", "area")
FRAME_COLUMN = "mask.size"
IGNORE_COLUMN = "ignore"
READERS = 16
MAX_FILES = 64
MAX_ROWS = 200_000

Group = tuple[str, int]


@dataclass(frozen=True)
class ScoredRows:
    """Scores of rows; every array has one entry for each row.

    Attributes:
        groups: (shard id, row group) that were read.
        group: index into `groups`.
        offset: index of the row in its group.
        sample_index: ordinal of the sample in its shard.
        status: ``ok``, ``empty_mask``, or why the row was rejected.
        class_id: -1 where the row has none.
        similarity: cosine.
        peak: maximum of the raw grid.
        threshold: NaN where the row has none.
        area_share: share of the mask in its frame, 0 to 1; NaN without a mask.
        ignored_share: share of ignored pixels; NaN without an ignore mask. Prompts that competed share one
            ignore mask, which counts for the first row of the sample only.
        files_read: number of annotation files that were read.
        files_total: number of annotation files.
        damaged: shard id of each file that could not be read, and the reason.
    """

    groups: tuple[Group, ...]
    group: Int[np.ndarray, " rows"]
    offset: Int[np.ndarray, " rows"]
    sample_index: Int[np.ndarray, " rows"]
    status: np.ndarray
    class_id: Int[np.ndarray, " rows"]
    similarity: Float[np.ndarray, " rows"]
    peak: Float[np.ndarray, " rows"]
    threshold: Float[np.ndarray, " rows"]
    area_share: Float[np.ndarray, " rows"]
    ignored_share: Float[np.ndarray, " rows"]
    files_read: int
    files_total: int
    damaged: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.status)

    @property
    def accepted(self) -> Bool[np.ndarray, " rows"]:
        """Which rows have a mask, even an empty one."""
        accepted: np.ndarray = np.isin(self.status.astype(str), ACCEPTED)
        return accepted

    def shard_id(self, row: int) -> str:
        """Return the id of the shard of a row."""
        shard_id, _ = self.groups[int(self.group[row])]
        return shard_id


def read_scores(
    folder: OutputFolder,
    shard_ids: Sequence[str],
    generator: np.random.Generator,
    *,
    max_files: int = MAX_FILES,
    max_rows: int = MAX_ROWS,
) -> ScoredRows:
    """Read the scores of a random sample of row groups, from a random sample of files.

    Args:
        folder: the job's output folder.
        shard_ids: shards with an annotations file.
        generator: of the random choice.
        max_files: limit of files that are opened.
        max_rows: limit of rows; the last row group is read to its end.
    """
    chosen = [shard_ids[position] for position in generator.permutation(len(shard_ids))[:max_files]]
    with ThreadPoolExecutor(READERS) as pool:
        listed = list(pool.map(lambda shard_id: _group_rows(folder, shard_id), chosen))
        groups = [
            (shard_id, number, rows)
            for shard_id, row_counts in zip(chosen, listed, strict=True)
            if not isinstance(row_counts, DamagedFileError)
            for number, rows in enumerate(row_counts)
        ]
        wanted = _within([groups[position] for position in generator.permutation(len(groups))], max_rows)
        tables = list(pool.map(lambda group: _read_group(folder, group), wanted))
    found = [
        *zip(chosen, listed, strict=True),
        *((group[0], table) for group, table in zip(wanted, tables, strict=True)),
    ]
    damaged = {shard_id: str(error) for shard_id, error in found if isinstance(error, DamagedFileError)}
    read = [
        (group, table)
        for group, table in zip(wanted, tables, strict=True)
        if not isinstance(table, DamagedFileError) and group[0] not in damaged
    ]
    return _scored(read, len(chosen) - len(damaged), len(shard_ids), damaged)


def _group_rows(folder: OutputFolder, shard_id: str) -> list[int] | DamagedFileError:
    """Return the number of rows of each row group, or the damage of the file."""
    try:
        with folder.open(ANNOTATIONS, shard_id) as table:
            return table.group_row_counts
    except DamagedFileError as error:
        return error


def _within(groups: Sequence[tuple[str, int, int]], max_rows: int) -> list[Group]:
    chosen: list[Group] = []
    rows_so_far = 0
    for shard_id, number, rows in groups:
        if rows_so_far >= max_rows:
            break
        chosen.append((shard_id, number))
        rows_so_far += rows
    return chosen


def _read_group(folder: OutputFolder, group: Group) -> pa.Table | DamagedFileError:
    shard_id, number = group
    try:
        with folder.open(ANNOTATIONS, shard_id) as table, damage(table.url):
            return _with_shares(table.read_group(number, [*SCORE_COLUMNS, FRAME_COLUMN, IGNORE_COLUMN]))
    except DamagedFileError as error:
        return error


def _scored(
    read: Sequence[tuple[Group, pa.Table]], files_read: int, files_total: int, damaged: Mapping[str, str]
) -> ScoredRows:
    tables = [table for _, table in read]
    whole = pa.concat_tables(tables) if tables else _EMPTY
    lengths = [len(table) for table in tables]

    def numbers(name: str) -> np.ndarray:
        column: np.ndarray = whole.column(name).cast(pa.float64()).fill_null(float("nan")).to_numpy()
        return column

    frame = numbers("frame")
    accepted = np.isfinite(frame) & (frame > 0)
    return ScoredRows(
        groups=tuple(group for group, _ in read),
        group=np.repeat(np.arange(len(read)), lengths),
        offset=np.concatenate([np.arange(length) for length in lengths]) if lengths else np.zeros(0, int),
        sample_index=whole.column("sample_index").fill_null(-1).to_numpy(),
        status=np.array(whole.column("status").fill_null("?").to_pylist(), dtype=object),
        class_id=whole.column("class_id").fill_null(-1).to_numpy(),
        similarity=numbers("similarity"),
        peak=numbers("peak"),
        threshold=numbers("threshold"),
        area_share=np.divide(numbers("area"), frame, out=np.full(len(frame), np.nan), where=accepted),
        ignored_share=numbers("ignored"),
        files_read=files_read,
        files_total=files_total,
        damaged=damaged,
    )


def _with_shares(table: pa.Table) -> pa.Table:
    """Return the score columns, the number of pixels in the frame of the mask, and the ignored share."""
    sizes = pc.struct_field(table.column("mask").combine_chunks(), "size")
    height, width = (pc.cast(pc.list_element(sizes, side), pa.int64()) for side in (0, 1))
    ignored = _ignored_shares(table.select(["sample_index", "threshold", IGNORE_COLUMN]).to_pylist())
    scores = table.select(SCORE_COLUMNS).append_column("frame", pc.multiply(height, width))
    return scores.append_column("ignored", pa.array(ignored, pa.float32())).cast(_SCHEMA)


def _ignored_shares(rows: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, " rows"]:
    """Return the share of each ignore mask in its frame, from run lengths; NaN for rows without their own."""
    own_masks: list[tuple[int, Rle]] = []
    image: int | None = None
    for number, row in enumerate(rows):
        ignore, is_shared = row[IGNORE_COLUMN], row["threshold"] is None
        is_repeated = is_shared and image == row["sample_index"]
        if ignore is not None and not is_repeated:
            own_masks.append((number, ignore))
        if is_shared and ignore is not None:
            image = row["sample_index"]
    shares = np.full(len(rows), np.nan)
    areas = mask_area([rle for _, rle in own_masks])
    pixels = np.array([max(1, rle["size"][0] * rle["size"][1]) for _, rle in own_masks], dtype=np.int64)
    shares[[number for number, _ in own_masks]] = areas / pixels
    return shares


_SCHEMA = pa.schema(
    [
        ("sample_index", pa.int32()),
        ("status", pa.string()),
        ("class_id", pa.int32()),
        ("similarity", pa.float32()),
        ("peak", pa.float32()),
        ("threshold", pa.float32()),
        ("area", pa.int64()),
        ("frame", pa.int64()),
        ("ignored", pa.float32()),
    ]
)
_EMPTY = _SCHEMA.empty_table()
