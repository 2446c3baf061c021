"""A shard as it was listed, and the version of it that a store announces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class InputVersion:
    """What a store reports about a version of an object; None for what it does not report.

    Attributes:
        size_bytes: the size.
        mtime_ns: the time of the last change, in nanoseconds since the epoch.
        etag: the store's own name of this version.
    """

    size_bytes: int | None = None
    mtime_ns: int | None = None
    etag: str | None = None

    def differs_from(self, other: InputVersion) -> bool:
        """Return whether the two are certainly different: by size, else by ETag, else by time."""
        if _differ(self.size_bytes, other.size_bytes):
            return True
        if self.etag is not None and other.etag is not None:
            return self.etag != other.etag
        return _differ(self.mtime_ns, other.mtime_ns)

    def differs_in_size_from(self, other: InputVersion) -> bool:
        """Compare sizes only, for an object that moved: its time and ETag change with the place."""
        return _differ(self.size_bytes, other.size_bytes)

    def as_metadata(self) -> dict[str, Any]:
        """Return the version as it is recorded in the footers of Parquet files."""
        return {"size": self.size_bytes, "mtime_ns": self.mtime_ns, "etag": self.etag}


@dataclass(frozen=True)
class ShardSource:
    """One input tar.

    Attributes:
        shard_id: names the output files: the stem, reduced to [A-Za-z0-9._-], and a digest of the URL.
        url: the URL to open; it may carry a signature, so it is never stored or logged.
        canonical_url: the shard's identity as `shard_name` returns it, which is logged and stored.
        size_bytes: size of the object; None if the server does not report it.
        mtime_ns: time of the last change, in nanoseconds since the epoch; None if it is not reported.
        etag: the store's own name of this version of the object; None if it is not reported.
    """

    shard_id: str
    url: str = field(repr=False)
    canonical_url: str
    size_bytes: int | None
    mtime_ns: int | None = None
    etag: str | None = None

    @property
    def version(self) -> InputVersion:
        """The version that was listed."""
        return InputVersion(self.size_bytes, self.mtime_ns, self.etag)


def _differ(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one != other
