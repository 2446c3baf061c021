"""Where the images of a job are: in its own list of shards, in what the user names, or where they moved."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.errors import UserError
from pipeline.storage import (
    ShardSource,
    absolute,
    canonical_url,
    join_url,
    list_shards,
    shown_url,
)
from pipeline.storage.commands import is_command

DIGEST = re.compile(r"-[0-9a-f]{8}$")


@dataclass(frozen=True)
class LocatedShards:
    """Where to read the images of annotated shards.

    Attributes:
        sources: what to open, by the shard id of the job.
        missing: ids of the shards of which that is not known, and why.
    """

    sources: Mapping[str, ShardSource]
    missing: Mapping[str, str]


def locate_shards(listed: Sequence[Mapping[str, Any]], given: Sequence[str] = ()) -> LocatedShards:
    """Find the tars of a job's shards.

    Args:
        listed: the rows of OUT/shards.parquet: shard_id, shard (canonical URL), size_bytes.
        given: what the user names: paths, URLs and patterns of tars, joined by canonical URL, else by stem
            where that leaves no doubt; or OLD=NEW, which says that what lay in OLD, a folder or a file, lies
            in NEW. Without any, the job's own URLs hold.

    Raises:
        UserError: a pattern matches nothing, no shard lies in an OLD, or both kinds are given.
    """
    parsed = [(text, parse_move(text, listed)) for text in given]
    patterns = [text for text, mapping in parsed if mapping is None]
    mappings = [mapping for _, mapping in parsed if mapping is not None]
    if not patterns:
        return _own(listed, mappings)
    if mappings:
        raise UserError(f"expected either shards or OLD=NEW, received both: {', '.join(given)}")
    names = {f"{row['shard_id']}.parquet" for row in listed}
    shards = list_shards(patterns)
    matched = match_annotations(shards, names)
    found = {
        matched[shard.canonical_url].removesuffix(".parquet"): shard
        for shard in shards
        if shard.canonical_url in matched
    }
    absent = [row["shard_id"] for row in listed if row["shard_id"] not in found]
    return LocatedShards(found, dict.fromkeys(absent, "is not among the shards given"))


def parse_move(text: str, listed: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Split OLD=NEW into OLD, as shown URLs begin, and NEW; None for a path or a URL, which may hold a =."""
    old, _, new = text.partition("=")
    if not (old and new) or "?" in old or Path(text).exists():
        return None
    start = canonical_url(old).rstrip("/")
    if any(lies_in(row["shard"], start) for row in listed):
        return start, absolute(new)
    known = f"; the first is {listed[0]['shard']}" if listed else ""
    raise UserError(
        f"{shown_url(old)}=...: expected as OLD of OLD=NEW a folder or a file of the job's shards{known}"
    )


def _own(listed: Sequence[Mapping[str, Any]], mappings: Sequence[tuple[str, str]]) -> LocatedShards:
    sources, missing = {}, {}
    for row in listed:
        shard_id, url = row["shard_id"], row["shard"]
        moved = next((moved_url(url, old, new) for old, new in mappings if lies_in(url, old)), None)
        if moved is not None:
            # the copy has a size of its own
            sources[shard_id] = ShardSource(shard_id, moved, canonical_url(moved), None)
        elif is_command(url):
            missing[shard_id] = "was written by a command, which is not kept"
        else:
            sources[shard_id] = ShardSource(shard_id, url, url, row["size_bytes"])
    return LocatedShards(sources, missing)


def lies_in(url: str, start: str) -> bool:
    """Whether a shown URL is that of a folder or file, or of something in it."""
    return url == start or url.startswith(f"{start}/")


def moved_url(url: str, old: str, new: str) -> str:
    """Where a shard lies now that what lay in OLD lies in NEW."""
    rest = url[len(old) + 1 :]
    return join_url(new, *filter(None, [unquote(rest) if url.startswith("file://") else rest]))


def match_annotations(shards: Sequence[ShardSource], names: Collection[str]) -> dict[str, str]:
    """Find each shard's annotations file: by its URL, else by its stem where that leaves no doubt.

    Args:
        shards: the tars.
        names: names of the annotations files.

    Returns:
        Canonical URL of a shard to the name of its file; shards without one are left out.
    """
    exact = {shard.canonical_url: f"{shard.shard_id}.parquet" for shard in shards}
    exact = {url: name for url, name in exact.items() if name in names}
    moved = [shard for shard in shards if shard.canonical_url not in exact]
    free_stems = Counter(stem_of(name.removesuffix(".parquet")) for name in set(names) - set(exact.values()))
    moved_stems = Counter(stem_of(shard.shard_id) for shard in moved)
    by_stem = {stem_of(name.removesuffix(".parquet")): name for name in set(names) - set(exact.values())}
    return exact | {
        shard.canonical_url: by_stem[stem]
        for shard in moved
        if free_stems[stem := stem_of(shard.shard_id)] == 1 and moved_stems[stem] == 1
    }


def stem_of(shard_id: str) -> str:
    """The part of a shard's id that does not depend on where the shard is."""
    return DIGEST.sub("", shard_id)
