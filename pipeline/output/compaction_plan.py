"""Plan a compacted copy of an output folder: which shards go into which file.

The plan follows from the old folder and the target size alone, so that an interrupted compaction continues
with the files that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.errors import DamagedFileError
from pipeline.output.counts import total_counts
from pipeline.output.folder import ANNOTATIONS, ERRORS, OutputFolder
from pipeline.output.records import LAYOUT, JobRecord
from pipeline.output.schema import ShardRow
from pipeline.output.shard_files import Tables
from pipeline.output.status import FolderState, read_state, shortfall
from pipeline.text import first_few

TABLES: tuple[Tables, Tables] = (ERRORS, ANNOTATIONS)
# of 10,000 shards of 50 rows, one is read in 24 ms from groups of 1,000 rows, in 7 ms from groups of 16,000:
# with fewer groups, the footer of a file is smaller
ROWS_PER_GROUP = 16_000
MIB = 1 << 20


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be copied.

    Attributes:
        shard_id: its id.
        attempt: the attempt that wrote its files.
        rows: by table, how many rows it has.
        part: by table, the number of the file that gets its rows.
        first_row: by table, where they begin in that file.
    """

    shard_id: str
    attempt: str
    rows: Mapping[Tables, int]
    part: Mapping[Tables, int]
    first_row: Mapping[Tables, int]


@dataclass(frozen=True)
class Plan:
    """What a compaction writes.

    Attributes:
        source: the folder that is compacted.
        job: its record of the job.
        listed: rows of its list of shards.
        state: its shards by state.
        shards: those that are copied, in the order of their ids.
        target_mib: size of the files that are written, in MiB.
        digest: identifies shards, files and target size.
        shortfall: why the job is not complete; empty if it is.
    """

    source: OutputFolder
    job: JobRecord
    listed: Sequence[ShardRow]
    state: FolderState
    shards: Sequence[PlannedShard]
    target_mib: int
    digest: str
    shortfall: str

    def parts(self, table: Tables) -> list[list[PlannedShard]]:
        """Return the shards of each file of a table, in order."""
        parts: list[list[PlannedShard]] = []
        for shard in self.shards:
            if shard.part[table] == len(parts):
                parts.append([])
            parts[-1].append(shard)
        return parts


def plan_compaction(out_dir: str, target_mib: int) -> Plan:
    """Decide which shards go into which file; reads the footers of all shards.

    Args:
        out_dir: output folder of a job.
        target_mib: size of the files that are written, in MiB; a larger shard gets a file of its own.

    Raises:
        UserError: the folder is not the output of a job, or of an older version of this program.
        DamagedFileError: its record of the job or its list of shards is damaged.
        OutputError: it cannot be listed.
    """
    source = OutputFolder(storage.absolute(out_dir))
    job, listed = source.job(), source.shard_rows()
    # read first: a folder whose configuration is invalid has no readers
    run = source.config(job).run
    state = read_state(source, listed, job.config_hash, is_cached=True)
    shards = _planned(source, sorted([*state.done, *state.damaged]), target_mib * MIB)
    return Plan(
        source=source,
        job=job,
        listed=listed,
        state=state,
        shards=shards,
        target_mib=target_mib,
        digest=_digest(shards, target_mib),
        shortfall=_shortfall(run, state),
    )


def _shortfall(run: RunConfig, state: FolderState) -> str:
    counts = total_counts((state.counts or {}).values())
    if state.mismatched:
        return f"{len(state.mismatched):,} shard(s) are damaged: {first_few(list(state.mismatched.values()))}"
    if state.left or state.failed:
        return f"{len(state.left):,} shard(s) are left, {len(state.failed):,} failed"
    return shortfall(run, counts, state)


def _planned(source: OutputFolder, shard_ids: Sequence[str], target_bytes: int) -> list[PlannedShard]:
    sizes = {table: source.files.sizes(table) for table in TABLES}
    part, part_bytes, part_rows = (dict.fromkeys(TABLES, 0) for _ in range(3))
    planned = []
    for shard_id, footer in zip(shard_ids, source.files.footers(shard_ids, is_cached=True), strict=True):
        if isinstance(footer, DamagedFileError):
            raise footer
        rows: dict[Tables, int] = {
            ANNOTATIONS: footer.annotations.rows,
            ERRORS: footer.annotations.error_rows,
        }
        for table in TABLES:
            size_bytes = sizes[table].get(shard_id, 0)
            if part_bytes[table] and part_bytes[table] + size_bytes > target_bytes:
                part[table] += 1
                part_bytes[table] = part_rows[table] = 0
            part_bytes[table] += size_bytes
        planned.append(PlannedShard(shard_id, footer.annotations.attempt, rows, dict(part), dict(part_rows)))
        for table in TABLES:
            part_rows[table] += rows[table]
    return planned


def _digest(shards: Sequence[PlannedShard], target_mib: int) -> str:
    digest = hashlib.sha256(f"{LAYOUT} {ROWS_PER_GROUP} {target_mib}".encode())
    for shard in shards:
        numbers = [[shard.rows[table], shard.part[table]] for table in TABLES]
        digest.update(json.dumps([shard.shard_id, shard.attempt, numbers]).encode())
    return digest.hexdigest()
