"""Which annotations file belongs to which image shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.output.folder import ANNOTATIONS, ids_in
from pipeline.output.image_shards import locate_shards
from pipeline.output.reading import read_job_record, read_shard_rows
from pipeline.storage import ShardSource


@dataclass(frozen=True)
class ShardPair:
    """An image shard, and what its files in the job's output folder must be.

    Attributes:
        shard: the images.
        annotations_id: names its files.
        listed: its row in the job's list of shards.
        config_hash: of the job.
    """

    shard: ShardSource
    annotations_id: str
    listed: Mapping[str, Any]
    config_hash: str


@dataclass(frozen=True)
class Pairing:
    """Shards that can be trained on, and the ids of the job's others, with the reason.

    Attributes:
        pairs: in the order of their ids.
        left_out: by shard id: without annotations, or it is not known where the images are.
    """

    pairs: tuple[ShardPair, ...]
    left_out: Mapping[str, str]


def pair_shards(out_dir: str, given: Sequence[str] = ()) -> Pairing:
    """Find annotations and images of a job's shards.

    Args:
        out_dir: output folder of the job.
        given: see `pipeline.output.image_shards.locate_shards`.

    Raises:
        UserError: as `locate_shards`; the folder has no list of shards; nothing is left to train on.
    """
    listed = read_shard_rows(out_dir)
    located = locate_shards(listed, given)
    annotated = ids_in(out_dir, ANNOTATIONS)
    left_out = {
        row["shard_id"]: "has no annotations" for row in listed if row["shard_id"] not in annotated
    } | dict(located.missing)
    usable = sorted(set(located.sources) - set(left_out))
    if not usable:
        reasons = "; ".join(sorted(set(left_out.values())))
        raise UserError(
            f"{storage.shown_url(out_dir)}: none of the {len(listed)} shards can be used: {reasons}"
        )
    rows, config_hash = {row["shard_id"]: row for row in listed}, read_job_record(out_dir).config_hash
    pairs = tuple(ShardPair(located.sources[name], name, rows[name], config_hash) for name in usable)
    return Pairing(pairs, left_out)
