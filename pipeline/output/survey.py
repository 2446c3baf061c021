"""Compare the shards that are listed now with those in an output folder; no file is read here."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pipeline.output.folder import FolderIds, version_in
from pipeline.output.image_shards import stem_of
from pipeline.output.schema import ShardRow
from pipeline.storage import ShardSource

CONFIRMED_MOVES = 3

Shard = TypeVar("Shard")


@dataclass(frozen=True)
class Survey:
    """The shards that are listed now, by what an output folder holds of them.

    Attributes:
        shards: as listed now, each with the id by which the folder knows it.
        done: ids of shards with valid files.
        damaged: ids of shards with valid files whose archive could not be read to its end.
        failed: ids of shards that an earlier run gave up on.
        changed: shards that have changed since they were annotated or given up.
        unlisted: ids of shards that have files and are no longer listed.
        moved: shards that were listed under another URL; each with the earlier URL first.
    """

    shards: tuple[ShardSource, ...]
    done: frozenset[str]
    damaged: frozenset[str]
    failed: frozenset[str]
    changed: tuple[ShardSource, ...]
    unlisted: frozenset[str]
    moved: tuple[tuple[str, ShardSource], ...]

    def list_rows(self, earlier: Iterable[ShardRow]) -> list[ShardRow]:
        """Return the rows of OUT/shards.parquet, in order."""
        held = self.done | self.damaged
        moved_from = {shard.shard_id: old for old, shard in self.moved}
        # files of a shard that moved twice still name its first place
        moved_from |= {row["shard_id"]: row["moved_from"] for row in earlier if row["moved_from"] is not None}
        return [
            {
                "shard_id": shard.shard_id,
                "shard": shard.canonical_url,
                "size_bytes": shard.size_bytes,
                "mtime_ns": shard.mtime_ns,
                "etag": shard.etag,
                "moved_from": moved_from.get(shard.shard_id) if shard.shard_id in held else None,
            }
            for shard in self.shards
        ]


def survey(
    ids: FolderIds,
    earlier: Sequence[ShardRow],
    listing: Sequence[ShardSource],
    named_moves: Mapping[str, ShardRow],
    is_same_content: Callable[[ShardSource, str], bool],
) -> Survey:
    """Compare the shards that are listed now with those in an output folder.

    Args:
        ids: ids of the shards that have files in the folder.
        earlier: rows of its list of shards: the versions that its files were made from.
        listing: the shards that are listed now.
        named_moves: rows of shards that moved according to the user, by their URL now.
        is_same_content: returns whether the files of an id were made from a shard's bytes.

    Returns:
        The survey. A moved shard keeps its files if the user named the move and its size is the same, or if
        stem and size are unique and the content of some of them, read whole, is the same. If most files kept
        their modification time, each of the others is read.
    """
    known = {row["shard"]: row for row in earlier}
    fresh = [shard for shard in listing if shard.canonical_url not in known]
    listed_now = {shard.canonical_url for shard in listing}
    gone = [row for row in earlier if row["shard"] not in listed_now and row["shard_id"] in ids.annotations]
    moved = _named_moves(fresh, named_moves, gone)
    named_ids = {row["shard_id"] for row in moved.values()}
    moved |= _evident_moves(
        [shard for shard in fresh if shard.canonical_url not in moved],
        [row for row in gone if row["shard_id"] not in named_ids],
        is_same_content,
    )
    shards = _with_ids(listing, known, moved)
    by_id = {shard.shard_id: shard for shard in shards}
    changed = [shard for shard in shards if _has_changed(shard, known.get(shard.canonical_url), ids)]
    states = ids.states_of(set(by_id) - {shard.shard_id for shard in changed})
    return Survey(
        shards=tuple(shards),
        done=states.done,
        damaged=states.damaged,
        failed=states.failed,
        changed=tuple(changed),
        unlisted=frozenset(ids.all - set(by_id)),
        moved=tuple((row["shard"], by_id[row["shard_id"]]) for row in moved.values()),
    )


def _named_moves(
    fresh: Sequence[ShardSource], named_moves: Mapping[str, ShardRow], gone: Sequence[ShardRow]
) -> dict[str, ShardRow]:
    gone_ids = {row["shard_id"] for row in gone}
    return {
        shard.canonical_url: row
        for shard in fresh
        if (row := named_moves.get(shard.canonical_url)) is not None
        and row["shard_id"] in gone_ids
        and not version_in(row).differs_in_size_from(shard.version)
    }


def _evident_moves(
    fresh: Sequence[ShardSource],
    gone: Sequence[ShardRow],
    is_same_content: Callable[[ShardSource, str], bool],
) -> dict[str, ShardRow]:
    by_stem = {(stem_of(row["shard_id"]), row["size_bytes"]): row for row in gone}
    stems_gone = Counter(stem_of(row["shard_id"]) for row in gone)
    stems_fresh = Counter(stem_of(shard.shard_id) for shard in fresh)
    pairs = [
        (shard, row)
        for shard in fresh
        if shard.size_bytes is not None
        and stems_fresh[stem := stem_of(shard.shard_id)] == stems_gone[stem] == 1
        and (row := by_stem.get((stem, shard.size_bytes))) is not None
    ]
    untouched = [(shard, row) for shard, row in pairs if shard.mtime_ns == row["mtime_ns"] is not None]
    alike = untouched if 2 * len(untouched) > len(pairs) else pairs
    # tars are padded to whole blocks, so other content may well have the same size
    looked_into = spread_evenly(alike, CONFIRMED_MOVES)
    if not all(is_same_content(shard, row["shard_id"]) for shard, row in looked_into):
        return {}
    known = {shard.canonical_url for shard, _ in alike}
    return {
        shard.canonical_url: row
        for shard, row in pairs
        if shard.canonical_url in known or is_same_content(shard, row["shard_id"])
    }


def _with_ids(
    listing: Sequence[ShardSource], known: Mapping[str, ShardRow], moved: Mapping[str, ShardRow]
) -> list[ShardSource]:
    """Return each shard with the id of its files: of its own URL, or of the one that it moved from."""
    rows = {**known, **moved}
    kept = {url: row["shard_id"] for url, row in rows.items()}
    taken = {kept[shard.canonical_url] for shard in listing if shard.canonical_url in kept}
    shards = []
    for shard in listing:
        shard_id = kept.get(shard.canonical_url) or _free_id(shard.shard_id, taken)
        taken.add(shard_id)
        shards.append(replace(shard, shard_id=shard_id))
    return shards


def _free_id(shard_id: str, taken: set[str]) -> str:
    """Return an unused id: a moved shard keeps the id of its earlier URL, which may be in use again."""
    free = shard_id
    while free in taken:
        free = f"{stem_of(shard_id)}-{hashlib.sha256(free.encode()).hexdigest()[:8]}"
    return free


def _has_changed(shard: ShardSource, row: ShardRow | None, ids: FolderIds) -> bool:
    has_files = shard.shard_id in ids.annotations or shard.shard_id in ids.failed
    return row is not None and has_files and version_in(row).differs_from(shard.version)


def spread_evenly(shards: Sequence[Shard], limit: int | None) -> Sequence[Shard]:
    """Return at most `limit` shards, spread over the list, since a sorted corpus is not uniform."""
    if limit is None or limit >= len(shards):
        return shards
    return [shards[(2 * place + 1) * len(shards) // (2 * limit)] for place in range(limit)]
