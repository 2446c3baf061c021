"""Which version of an object was read, as far as its store tells without sending it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.storage.urls import ShardSource


@dataclass(frozen=True)
class InputVersion:
    """What a store tells of an object; None for what it does not tell.

    Attributes:
        size_bytes: its size.
        mtime_ns: when it was last changed, in nanoseconds since the epoch.
        etag: the store's own name of this version.
    """

    size_bytes: int | None = None
    mtime_ns: int | None = None
    etag: str | None = None

    def differs_from(self, other: InputVersion) -> bool:
        """Whether the two are certainly not the same version: by size, else by ETag, else by time."""
        if _differ(self.size_bytes, other.size_bytes):
            return True
        if self.etag is not None and other.etag is not None:
            return self.etag != other.etag
        return _differ(self.mtime_ns, other.mtime_ns)

    def differs_in_size_from(self, other: InputVersion) -> bool:
        """The same for an object that moved, which takes another time and ETag with it."""
        return _differ(self.size_bytes, other.size_bytes)

    def as_metadata(self) -> dict[str, Any]:
        """For the footers of Parquet files."""
        return {"size": self.size_bytes, "mtime_ns": self.mtime_ns, "etag": self.etag}


def version_of(shard: ShardSource) -> InputVersion:
    """The version of a shard that was listed."""
    return InputVersion(shard.size_bytes, shard.mtime_ns, shard.etag)


def _differ(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one != other
