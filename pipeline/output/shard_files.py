"""Where an output folder keeps the rows of a shard: in two files of its own, as `legrad annotate` does.

A compacted folder keeps them in larger files instead (`pipeline.output.compacted`). Readers see no
difference: both offer what `ShardFiles` lists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import ValidationError

from pipeline import storage
from pipeline.errors import DamagedFileError
from pipeline.output.footer_cache import FooterCache, FooterTexts
from pipeline.output.records import FooterRecord
from pipeline.output.tables import ShardTable, TableFile, open_table

Tables = Literal["annotations", "errors"]
PARQUET = ".parquet"
# pyarrow keeps up to 25 connections to an object store open
FOOTER_READERS = 24


@dataclass(frozen=True)
class ShardFooters:
    """The footers of a shard's two files.

    Attributes:
        annotations: of its annotations.
        errors: of its errors.
        texts: both as they are in the files.
    """

    annotations: FooterRecord
    errors: FooterRecord
    texts: FooterTexts


class ShardFiles(Protocol):
    """The files in `annotations/` and `errors/` of an output folder."""

    def ids(self, table: Tables) -> frozenset[str]:
        """Return the ids of the shards whose rows are there; raises OutputError."""

    def sizes(self, table: Tables) -> Mapping[str, int]:
        """Return the compressed bytes of each shard's rows, by id; raises OutputError."""

    def annotation_names(self, shard_ids: Collection[str]) -> frozenset[str]:
        """Return the names of the files in `annotations/` that hold rows of these shards."""

    def file_url(self, table: Tables, shard_id: str) -> str:
        """Return the URL of the file that holds the rows of a shard."""

    def open(self, table: Tables, shard_id: str) -> AbstractContextManager[ShardTable]:
        """Open the annotations or errors of a shard; raises DamagedFileError."""

    def footers(
        self, shard_ids: Sequence[str], *, is_cached: bool = False
    ) -> Iterator[ShardFooters | DamagedFileError]:
        """Read the footers of several shards, in order; what cannot be read is returned as an error.

        Args:
            shard_ids: the shards.
            is_cached: whether footers of unchanged files are kept in the user's cache folder between calls.
        """


@dataclass(frozen=True)
class SeparateFiles:
    """Two files for each shard.

    Attributes:
        url: the output folder.
    """

    url: str

    def ids(self, table: Tables) -> frozenset[str]:
        """Return the ids of the shards that have a file; raises OutputError."""
        return frozenset(self.sizes(table))

    def sizes(self, table: Tables) -> Mapping[str, int]:
        """Return the size of each shard's file, by id; raises OutputError."""
        versions = storage.list_versions(storage.join_url(self.url, table))
        return {
            name.removesuffix(PARQUET): version.size_bytes or 0
            for name, version in versions.items()
            if name.endswith(PARQUET)
        }

    def annotation_names(self, shard_ids: Collection[str]) -> frozenset[str]:
        """Return the names of the files in `annotations/` that hold rows of these shards."""
        return frozenset(f"{shard_id}{PARQUET}" for shard_id in shard_ids)

    def file_url(self, table: Tables, shard_id: str) -> str:
        """Return the URL of a shard's file."""
        return storage.join_url(self.url, table, f"{shard_id}{PARQUET}")

    def open(self, table: Tables, shard_id: str) -> AbstractContextManager[TableFile]:
        """Open a file of a shard; raises DamagedFileError as `open_table` does."""
        return open_table(self.file_url(table, shard_id), table)

    def footers(
        self, shard_ids: Sequence[str], *, is_cached: bool = False
    ) -> Iterator[ShardFooters | DamagedFileError]:
        """Read the footers of several shards concurrently; see `ShardFiles.footers`."""
        cache = FooterCache.of(self.url) if is_cached else None

        def read(shard_id: str) -> ShardFooters | DamagedFileError:
            if cache is not None and (texts := cache.get(shard_id)) is not None:
                with suppress(ValidationError):
                    return _parsed(texts)
            try:
                found = self._read(shard_id)
            except DamagedFileError as error:
                return error
            if cache is not None:
                cache.add(shard_id, found.texts)
            return found

        if len(shard_ids) == 1:
            yield read(shard_ids[0])
        else:
            with ThreadPoolExecutor(FOOTER_READERS) as pool:
                yield from pool.map(read, shard_ids)
        if cache is not None:
            cache.save()

    def _read(self, shard_id: str) -> ShardFooters:
        with self.open("annotations", shard_id) as file:
            annotations, annotations_text = file.footer(), file.metadata().decode()
        with self.open("errors", shard_id) as file:
            errors, errors_text = file.footer(), file.metadata().decode()
        return ShardFooters(annotations, errors, FooterTexts(annotations_text, errors_text))


def _parsed(texts: FooterTexts) -> ShardFooters:
    annotations = FooterRecord.model_validate_json(texts.annotations)
    is_same = texts.errors == texts.annotations
    errors = annotations if is_same else FooterRecord.model_validate_json(texts.errors)
    return ShardFooters(annotations, errors, texts)
