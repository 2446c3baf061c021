"""What the footers of a shard's two Parquet files say: whose they are, of which input, and the counts."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline import storage
from pipeline.errors import DamagedFileError, MismatchError
from pipeline.output.counts import ShardCounts
from pipeline.output.folder import ANNOTATIONS, ERRORS
from pipeline.output.reading import FooterRecord, read_footer_record
from pipeline.storage import InputVersion

FOOTER_READERS = 16
COUNTS = ("annotated", "empty", "failed", "rows", "error_rows", "dropped_prompts")

Row = Mapping[str, Any]


def counts_as_metadata(counts: ShardCounts) -> dict[str, Any]:
    """Counts as they are written in Parquet footers and in ``_SUCCESS``."""
    return {
        "samples_in": counts.samples_in,
        **{name: getattr(counts, name) for name in COUNTS},
        "errors_by_kind": dict(counts.errors_by_kind),
        "error_examples": dict(counts.error_examples),
    }


def checked_footers(
    output_dir: str, listed: Mapping[str, Row], config_hash: str
) -> dict[str, FooterRecord | DamagedFileError]:
    """The footers of published shards, read concurrently.

    Args:
        output_dir: the job's output folder.
        listed: rows of OUT/shards.parquet by shard id: whose files are looked at.
        config_hash: of the job; two that start together may each have found the folder empty.

    Returns:
        By shard id the footer of its annotations, or why its two files are not what the job wrote.
    """

    def checked(shard_id: str) -> FooterRecord | DamagedFileError:
        try:
            return checked_footer(output_dir, shard_id, listed[shard_id], config_hash)
        except DamagedFileError as error:
            return error

    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        return dict(zip(listed, pool.map(checked, listed), strict=True))


def own_footer(output_dir: str, shard_id: str, config_hash: str) -> FooterRecord:
    """The footer of a shard's annotations, once its two files have shown to belong together and to the job.

    Raises:
        DamagedFileError: one of them cannot be read, or does not hold the rows that its footer counts.
        MismatchError: they are not of the same attempt, or are of another configuration.
    """
    name = f"{shard_id}.parquet"
    url, errors_url = (storage.join_url(output_dir, folder, name) for folder in (ANNOTATIONS, ERRORS))
    footer, errors = read_footer_record(url, "annotations"), read_footer_record(errors_url, "errors")
    if footer.attempt != errors.attempt:
        raise MismatchError(storage.shown_url(url), "is not of the same attempt as its errors file")
    if footer.config_hash != config_hash:
        raise MismatchError(storage.shown_url(url), "is of another configuration than the job")
    return footer


def checked_footer(output_dir: str, shard_id: str, row: Row, config_hash: str) -> FooterRecord:
    """The same, once the files have shown to be of the shard that the job lists.

    Raises:
        DamagedFileError: as `own_footer`.
        MismatchError: as `own_footer`; or they are of another shard, or of another version of the input than
            the one listed.
    """
    footer = own_footer(output_dir, shard_id, config_hash)
    url = storage.join_url(output_dir, ANNOTATIONS, f"{shard_id}.parquet")
    if footer.shard not in (row["shard"], row["moved_from"]):
        raise MismatchError(storage.shown_url(url), f"holds the rows of another shard: {footer.shard}")
    if not _is_of_listed_version(footer, row):
        raise MismatchError(storage.shown_url(url), "is of another version of its input than is listed")
    return footer


def _is_of_listed_version(footer: FooterRecord, row: Row) -> bool:
    listed = version_in(row)
    if footer.shard == row["moved_from"]:
        return not listed.differs_in_size_from(footer.version)
    return not listed.differs_from(footer.version)


def version_in(row: Row) -> InputVersion:
    """The version of a shard's input in a row of OUT/shards.parquet."""
    return InputVersion(row["size_bytes"], row["mtime_ns"], row["etag"])
