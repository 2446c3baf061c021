"""Files that an export writes for one shard: listed by name, and removed again if the shard fails."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from pipeline import storage
from pipeline.errors import OutputError, UserError

RECORDS_FOLDER = "export"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolygonFit:
    """How well polygons, read back as pixels, agree with the masks that they were made from.

    Attributes:
        polygons: number of masks compared.
        iou_sum: sum of their intersections over union.
        iou_min: the lowest one.
    """

    polygons: int = 0
    iou_sum: float = 0.0
    iou_min: float = 1.0

    def __add__(self, other: PolygonFit) -> PolygonFit:
        return PolygonFit(
            self.polygons + other.polygons,
            self.iou_sum + other.iou_sum,
            min(self.iou_min, other.iou_min),
        )


NO_POLYGONS = PolygonFit()


@dataclass
class ShardFiles:
    """The files of one shard in DEST, and what is counted while they are written.

    Attributes:
        dest: folder of the export: local path, s3:// or gs://.
        shard_id: of the shard.
        counts: takes what exporters skip, by reason.
        fit: takes the agreement of polygons with masks.
    """

    dest: str
    shard_id: str
    counts: Counter[str] = field(default_factory=Counter)
    fit: PolygonFit = NO_POLYGONS
    _published: list[tuple[str, str]] = field(default_factory=list)

    def publish(self, folder: str, name: str, content: IO[bytes] | bytes) -> None:
        """Write a file, whole or not at all; `folder` is below DEST, or empty for DEST itself."""
        url = storage.join_url(self.dest, folder) if folder else self.dest
        self._published.append((url, name))
        storage.publish(url, name, content)

    def publish_list(self, lines: Iterable[str]) -> None:
        """Write the lines that `joined_lists` joins over all shards."""
        content = "".join(f"{line}\n" for line in lines).encode()
        self.publish(RECORDS_FOLDER, f"{self.shard_id}.txt", content)

    def remove_all(self) -> None:
        """Remove the files written so far; one that cannot be removed is logged."""
        for folder, name in self._published:
            try:
                storage.remove(folder, name)
            except OutputError as error:
                _log.warning("cannot remove a file of the failed export: %s", error)
                return


@contextmanager
def removed_on_failure(dest: str, shard_id: str) -> Iterator[ShardFiles]:
    """Return the files of a shard that is being written; an exception removes them from DEST again."""
    files = ShardFiles(dest, shard_id)
    try:
        yield files
    except BaseException:
        files.remove_all()
        raise


def joined_lists(dest: str, shard_ids: Iterable[str], folder: str, name: str) -> None:
    """Write the lists of all shards as one file, folder/name below DEST.

    Raises:
        UserError: the list of a shard is missing.
        OutputError: the file cannot be written.
    """
    with storage.Spool() as spool:
        for shard_id in shard_ids:
            try:
                listed = storage.read_text(storage.join_url(dest, RECORDS_FOLDER, f"{shard_id}.txt"))
            except UserError as error:
                raise UserError(f"{error}; remove the folder and export again") from None
            spool.write(listed.encode())
        storage.publish(storage.join_url(dest, folder) if folder else dest, name, spool)
