"""Which annotations file belongs to which image shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline import storage
from pipeline.errors import UserError
from pipeline.job import read_shard_list, shard_ids_in
from pipeline.storage import ShardSource
from pipeline.storage.commands import is_command
from pipeline.written_masks import match_annotations


@dataclass(frozen=True)
class ShardPair:
    """An image shard and the id that names its files in the job's output folder."""

    shard: ShardSource
    annotations_id: str


@dataclass(frozen=True)
class Pairing:
    """Shards with their annotations, in the shards' order, and the canonical URLs of those that have none."""

    pairs: tuple[ShardPair, ...]
    without_annotations: tuple[str, ...]


def pair_shards(
    out_dir: str, patterns: str | Sequence[str] | None = None, moved: Sequence[str] = ()
) -> Pairing:
    """Find the annotations of image shards: by canonical URL, else by stem where that leaves no doubt.

    Args:
        out_dir: output folder of a job.
        patterns: the shards, as `input.shards` takes them; None: those that the job lists.
        moved: `OLD=NEW` each: shards that were annotated under a URL that begins with OLD are now where NEW
            takes OLD's place. The first one that fits counts.

    Raises:
        UserError: nothing matches a pattern, `moved` is not of that form, or no shard has annotations.
    """
    moves = [_move(text) for text in moved]
    shards = _listed_shards(out_dir, moves) if patterns is None else _given_shards(patterns)
    was_at = {shard.canonical_url: _earlier(shard, moves) for shard in shards}
    names = [f"{shard_id}.parquet" for shard_id in shard_ids_in(out_dir, "annotations", ".parquet")]
    matched = match_annotations(list(was_at.values()), names)
    found = {
        url: matched[earlier.canonical_url]
        for url, earlier in was_at.items()
        if earlier.canonical_url in matched
    }
    if not found:
        where = storage.without_credentials(out_dir)
        raise UserError(f"{where}: of {len(names)} annotated shards none is among the {len(shards)} given")
    return Pairing(
        tuple(
            ShardPair(shard, found[shard.canonical_url].removesuffix(".parquet"))
            for shard in shards
            if shard.canonical_url in found
        ),
        tuple(shard.canonical_url for shard in shards if shard.canonical_url not in found),
    )


def _given_shards(patterns: str | Sequence[str]) -> list[ShardSource]:
    return storage.list_shards(patterns if isinstance(patterns, str) else [str(one) for one in patterns])


def _listed_shards(out_dir: str, moves: Sequence[tuple[str, str]]) -> list[ShardSource]:
    """The job's own list, where its shards are by now."""
    shards = []
    for row in read_shard_list(out_dir):
        if is_command(row["shard"]):
            raise UserError(
                f"{storage.without_credentials(out_dir)}: its shards come from commands, and a list that was "
                "found must run none: name the shards"
            )
        url = next(
            (new + row["shard"][len(old) :] for old, new in moves if row["shard"].startswith(old)), None
        )
        url = row["shard"] if url is None else url
        canonical = storage.canonical_url(url)
        shards.append(ShardSource(storage.shard_id(canonical), url, canonical, row["size_bytes"]))
    return shards


def _move(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not (old and separator and new):
        raise UserError(f"moved: expected OLD=NEW, the beginnings of URLs, got {text!r}")
    return _beginning(old), _beginning(new)


def _beginning(url: str) -> str:
    """The canonical form of a URL's beginning; a slash at its end stays."""
    canonical = storage.canonical_url(url)
    return canonical + "/" if url.endswith("/") and not canonical.endswith("/") else canonical


def _earlier(shard: ShardSource, moves: Sequence[tuple[str, str]]) -> ShardSource:
    """The shard as it was named when it was annotated."""
    for old, new in moves:
        if shard.canonical_url.startswith(new):
            url = old + shard.canonical_url[len(new) :]
            return replace(shard, shard_id=storage.shard_id(url), canonical_url=url)
    return shard
