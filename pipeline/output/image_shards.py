"""Find the image shards of a job: by its list of shards, by what the user names, or at their new place."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from pipeline.config.marks import MarkEntry, require_marked_shards
from pipeline.errors import MismatchError, UserError
from pipeline.output.records import FooterRecord
from pipeline.output.schema import ShardRow
from pipeline.storage import (
    READAHEAD_BYTES,
    DigestingStream,
    InputVersion,
    ShardSource,
    absolute,
    join_url,
    list_shards,
    open_shard,
    shard_name,
    shown_url,
    version_now,
)
from pipeline.storage.pipes import is_command
from pipeline.storage.urls import ID_DIGITS, LONG_ID_DIGITS, file_url, id_of_name, is_local, local_path

DIGEST = re.compile(rf"-[0-9a-f]{{{ID_DIGITS}}}(?:[0-9a-f]{{{LONG_ID_DIGITS - ID_DIGITS}}})?$")


@dataclass(frozen=True)
class LocatedShards:
    """Where the images of annotated shards can be read.

    Attributes:
        sources: the shard to open, by the job's shard id.
        missing: by shard id, why it is unknown where the images are.
    """

    sources: Mapping[str, ShardSource]
    missing: Mapping[str, str]


def locate_shards(listed: Sequence[ShardRow], given: Sequence[str] = ()) -> LocatedShards:
    """Find the tars of a job's shards.

    Args:
        listed: the rows of OUT/shards.parquet: shard_id, shard (its name), size_bytes.
        given: paths, URLs and patterns of tars, matched by name, else by stem if that is unique; or OLD=NEW
            for a folder or file that moved from OLD to NEW. If empty, the job's own URLs are used.

    Raises:
        UserError: a pattern matches nothing, no shard lies in an OLD, or both kinds are given.
    """
    parsed = [(text, parse_move(text, listed)) for text in given]
    patterns = [text for text, mapping in parsed if mapping is None]
    mappings = [mapping for _, mapping in parsed if mapping is not None]
    if not patterns:
        return _own(listed, mappings)
    if mappings:
        shown = ", ".join(map(shown_url, given))
        raise UserError(f"expected either shards or OLD=NEW, received both: {shown}")
    found = _matched(
        list_shards(patterns, named="--shards"), {row["shard_id"]: row["shard"] for row in listed}
    )
    absent = [row["shard_id"] for row in listed if row["shard_id"] not in found]
    return LocatedShards(found, dict.fromkeys(absent, "is not among the shards given"))


def require_annotated_version(shard: ShardSource, footer: FooterRecord) -> None:
    """Check that a shard at the place where it was annotated has not changed since.

    Other images in its place may have the same keys and sizes, but other masks. If only time or ETag differ,
    the content decides. Copies in other places may be repacked, and are joined by key.

    Args:
        shard: the shard that is going to be read.
        footer: of its annotations.

    Raises:
        MismatchError: it has changed.
        ShardError: it cannot be looked up or read.
    """
    if shard.canonical_url != footer.shard:
        return
    annotated, now = footer.version, version_now(shard)
    # web servers were asked when the shards were listed; for local files, this is newer than the list
    now = shard.version if now == InputVersion() else now
    if not now.differs_from(annotated):
        return
    if now.differs_in_size_from(annotated) or content_digest(shard) != footer.content_digest:
        raise MismatchError(
            shard.canonical_url,
            "changed since it was annotated, so its masks are of other images: annotate again",
        )


def content_digest(shard: ShardSource) -> str:
    """Return the digest of all bytes of a shard, as footers hold it; raises ShardError."""
    with open_shard(shard) as stream:
        digested = DigestingStream(stream)
        while digested.read(READAHEAD_BYTES):
            pass
    return digested.digest()


def name_in_rows(listed: ShardRow) -> str:
    """Return the name of a shard in its annotation rows: the first one, where it has moved since."""
    return listed["moved_from"] or listed["shard"]


def marks_of_job(marks: Sequence[MarkEntry], listed: Collection[ShardRow]) -> tuple[MarkEntry, ...]:
    """Return marks with the names that shards have in rows, wherever the shards are now.

    Args:
        marks: as read from a file.
        listed: the rows of OUT/shards.parquet.

    Raises:
        UserError: none of the marks is about any of the shards.
    """
    names = {row["shard"]: name_in_rows(row) for row in listed}
    named = tuple(mark.model_copy(update={"shard": names.get(mark.shard, mark.shard)}) for mark in marks)
    require_marked_shards(named, set(names.values()))
    return named


def parse_move(text: str, listed: Sequence[ShardRow]) -> tuple[str, str] | None:
    """Split OLD=NEW: OLD as the start of shard names, and NEW; None for a path or URL, which may hold a =."""
    old, _, new = text.partition("=")
    if not (old and new) or "?" in old or Path(text).exists():
        return None
    for start in _beginnings(old):
        if any(lies_in(row["shard"], start) for row in listed):
            return start, absolute(new)
    known = f"; the first is {listed[0]['shard']}" if listed else ""
    raise UserError(
        f"{shown_url(old)}=...: expected as OLD of OLD=NEW a folder or a file of the job's shards{known}"
    )


def _beginnings(old: str) -> list[str]:
    """Return possible starts of the names of shards in OLD: its real path, and the path as written."""
    real = shard_name(old).rstrip("/")
    return [real, file_url(str(local_path(old))).rstrip("/")] if is_local(old) else [real]


def _is_no_regular_file(url: str) -> bool:
    """Return whether a local URL names a pipe, device or folder; missing files are reported later."""
    if not is_local(url):
        return False
    try:
        path = local_path(url)
    except UserError:
        return True
    # unlike the methods of Path, these functions never raise
    return os.path.exists(path) and not os.path.isfile(path)  # noqa: PTH110, PTH113


def _own(listed: Sequence[ShardRow], mappings: Sequence[tuple[str, str]]) -> LocatedShards:
    sources, missing = {}, {}
    for row in listed:
        shard_id, name = row["shard_id"], row["shard"]
        mapping = next(((old, new) for old, new in mappings if lies_in(name, old)), None)
        if is_command(name) and mapping is None:
            missing[shard_id] = "came from a command, which is not recorded"
        elif "?" in name and (mapping is None or mapping[0] != name):
            missing[shard_id] = "has a query in its URL, which is not recorded: name the shards as in the job"
        elif mapping is None and not is_local(name):
            missing[shard_id] = "is not on this machine, and is read only if you name it: name the shards"
        elif mapping is None and _is_no_regular_file(name):
            missing[shard_id] = "is no regular file"
        elif mapping is None:
            sources[shard_id] = ShardSource(shard_id, name, name, row["size_bytes"])
        else:
            moved = moved_url(name, *mapping)
            # the copy has a size of its own
            sources[shard_id] = ShardSource(shard_id, moved, shard_name(moved), None)
    return LocatedShards(sources, missing)


def lies_in(url: str, start: str) -> bool:
    """Return whether a shard's name is that of a folder or file, or of something in it."""
    return url == start or url.startswith(f"{start}/")


def moved_url(url: str, old: str, new: str) -> str:
    """Return the URL of a shard after its folder or file moved from OLD to NEW."""
    rest = url[len(old) + 1 :]
    return join_url(new, *filter(None, [unquote(rest) if url.startswith("file://") else rest]))


def match_annotations(shards: Sequence[ShardSource], shard_ids: Collection[str]) -> dict[str, str]:
    """Find each shard's annotations: by its URL, else by its stem if that is unique.

    Args:
        shards: the tars.
        shard_ids: ids of the shards that have annotations.

    Returns:
        `canonical_url` of a shard to the id of its annotations; shards without annotations are omitted.
    """
    matched = _matched(shards, dict.fromkeys(shard_ids))
    return {shard.canonical_url: shard_id for shard_id, shard in matched.items()}


def _matched(shards: Sequence[ShardSource], known: Mapping[str, str | None]) -> dict[str, ShardSource]:
    """Return shards by the job's id for them; `known` has those ids with the shard's name, if known."""
    by_name = {name: shard_id for shard_id, name in known.items() if name is not None}
    exact = {}
    for shard in shards:
        # a job whose other shards would have had the same id gave it a longer one
        longer = id_of_name(shard.canonical_url, digits=LONG_ID_DIGITS)
        own = by_name.get(shard.canonical_url)
        for shard_id in (own, longer, shard.shard_id):
            if shard_id is not None and shard_id in known:
                exact[shard_id] = shard
                break
    matched = {shard.canonical_url for shard in exact.values()}
    moved = [shard for shard in shards if shard.canonical_url not in matched]
    free = [shard_id for shard_id in known if shard_id not in exact]
    free_stems, moved_stems = Counter(map(stem_of, free)), Counter(stem_of(shard.shard_id) for shard in moved)
    by_stem = {stem_of(shard_id): shard_id for shard_id in free}
    return exact | {
        by_stem[stem]: shard
        for shard in moved
        if free_stems[stem := stem_of(shard.shard_id)] == 1 and moved_stems[stem] == 1
    }


def stem_of(shard_id: str) -> str:
    """Return the part of a shard's id that does not depend on its place."""
    return DIGEST.sub("", shard_id)
