"""OUT/job.json: which configuration, model and versions the files of an output folder come from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import braceexpand

from pipeline import storage
from pipeline.config.schema import JobConfig
from pipeline.output.folder import LAYOUT

VERSIONED_PACKAGES = ("legrad-pipeline", "torch", "open_clip_torch", "ray", "pyarrow", "pillow", "webdataset")


@dataclass(frozen=True)
class JobStamp:
    """What identifies the results of a configuration.

    Attributes:
        config_hash: hash of what changes the rows.
        weights_digest: digest of the model's weights.
        versions: installed versions; recorded, not part of the hash.
    """

    config_hash: str
    weights_digest: str
    versions: Mapping[str, str]

    def as_metadata(self) -> dict[str, Any]:
        """For the footers of the Parquet files."""
        return asdict(self)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter to the results."""
    found = {}
    for package in VERSIONED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def job_document(config: JobConfig, stamp: JobStamp) -> bytes:
    """The content of OUT/job.json; no secret of a URL is in it."""
    document = config.model_dump(mode="json")
    listed = config.input.shards
    patterns = [listed] if isinstance(listed, str) else listed
    document["input"]["shards"] = [
        storage.shown_url(url) for pattern in patterns for url in _with_scheme_first(pattern)
    ]
    document["output"]["dir"] = storage.shown_url(config.output.dir)
    return as_json(
        {
            **stamp.as_metadata(),
            "layout": LAYOUT,
            "config": document,
            "started": utc_now(),
            "pid": os.getpid(),
        }
    )


def _with_scheme_first(pattern: str) -> list[str]:
    """Spell braces out where they hide the scheme, and with it what must not be written down."""
    return list(braceexpand.braceexpand(pattern)) if pattern.startswith("{") else [pattern]


def as_json(document: Mapping[str, Any]) -> bytes:
    """A JSON document as it is written: indented, in UTF-8."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def utc_now() -> str:
    """The time as it is written, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
