"""JSON records of an output folder, each declared once: for writing, and for checks when it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

import braceexpand
from pydantic import BaseModel, ConfigDict, Field

from pipeline import storage
from pipeline.config.schema import JobConfig
from pipeline.output.counts import ShardCounts
from pipeline.storage import InputVersion

# version of the files of an output folder; a folder with another layout is refused
LAYOUT = 2
VERSIONED_PACKAGES = ("legrad-pipeline", "torch", "open_clip_torch", "ray", "pyarrow", "pillow", "webdataset")
COUNTS = ("annotated", "empty", "failed", "rows", "error_rows", "dropped_prompts")

Count = Annotated[int, Field(ge=0, le=2**53)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]


class Record(BaseModel):
    """A JSON object; unknown keys, which a later version may add, are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class ModelFacts(Record):
    """What of a model is needed to make masks from its stored maps.

    Attributes:
        normalisation: when maps are brought to [0, 1]: upsampled, after they are upsampled; grid: before.
        patch_size: side of a patch of the model's input, in pixels.
        input_height: of the model's input, in pixels.
        input_width: of the model's input, in pixels.
        interpolation: filter by which images are resized.
        mean: mean of each colour channel.
        std: standard deviation of each colour channel.
        fit: stretch or keep; see `legrad.images.ImageTransform`.
    """

    normalisation: Literal["upsampled", "grid"]
    patch_size: Annotated[int, Field(ge=1, le=4096)]
    input_height: Annotated[int, Field(ge=1, le=65536)]
    input_width: Annotated[int, Field(ge=1, le=65536)]
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["stretch", "keep"]


class JobRecord(Record):
    """OUT/job.json.

    Attributes:
        config_hash: hash of the settings that change the rows.
        config: the configuration, to be parsed by `pipeline.config.load.parse_config`.
        weights_digest: digest of the model's weights.
        segmenter_digest: digest of the segmenter's files; None: there is none.
        maps_hash: hash of the configuration that made the maps in `input.maps`; None: a model made them.
        versions: versions of the installed packages.
        started: start of the newest run.
        precision_is_auto: whether the newest run asked for `model.precision: auto`; the configuration holds
            the precision that was chosen.
        layout: version of the files of the folder.
        model_facts: what of the model is needed to make masks again; None in folders of earlier versions.
    """

    layout: int = 1
    config_hash: str
    config: dict[str, Any]
    model_facts: ModelFacts | None = None
    weights_digest: str = "unknown"
    segmenter_digest: str | None = None
    maps_hash: str | None = None
    versions: dict[str, str] = {}
    started: str = "unknown"
    precision_is_auto: bool = False


class CountsRecord(Record):
    """Outcomes of samples, as footers and OUT/_SUCCESS hold them."""

    annotated: Count
    empty: Count
    failed: Count
    rows: Count
    error_rows: Count
    dropped_prompts: Count
    errors_by_kind: dict[str, Count]
    error_examples: dict[str, str] = {}

    def counts(self) -> ShardCounts:
        """Return the counts."""
        return ShardCounts(**{name: getattr(self, name) for name in CountsRecord.model_fields})


class _VersionRecord(Record):
    size: Count | None
    mtime_ns: int | None
    etag: str | None


class FooterRecord(CountsRecord):
    """The footer of a shard's annotations or errors file.

    Attributes:
        layout: version of the files of the folder.
        attempt: the attempt that wrote the file; both files of a shard must have the same.
        config_hash: of the job.
        shard: URL of the shard when it was read.
        state: done, or damaged if the archive could not be read to its end.
        input: the version of the shard that was read.
        content_digest: digest of all bytes of the shard.
    """

    layout: int
    attempt: str
    config_hash: str
    shard: str
    state: Literal["done", "damaged"]
    input: _VersionRecord
    content_digest: str

    @property
    def version(self) -> InputVersion:
        """The version of the shard that was read."""
        return InputVersion(self.input.size, self.input.mtime_ns, self.input.etag)


class PartRecord(Record):
    """The footer of a file of a compacted folder.

    Attributes:
        layout: version of the files of the folder.
        plan: digest of what the compaction writes into which file.
        part: number of the file.
    """

    layout: int
    plan: str
    part: Count


class CompactedRecord(Record):
    """The footer of OUT/compacted.parquet.

    Attributes:
        layout: version of the files of the folder.
        plan: digest of what the compaction wrote into which file.
        annotations_parts: number of files in `annotations/`.
        errors_parts: number of files in `errors/`.
    """

    layout: int
    plan: str
    annotations_parts: Count
    errors_parts: Count


class CompactionRecord(Record):
    """OUT/compaction.json, the first file of a compacted folder.

    Attributes:
        source: the folder that is compacted, without credentials.
        plan: digest of what is written into which file.
        target_mib: the size of files that was asked for.
        started: when the compaction began.
    """

    source: str
    plan: str
    target_mib: Count
    started: str = "unknown"


class SuccessRecord(CountsRecord):
    """OUT/_SUCCESS."""

    shards: Count
    damaged: Count


class FailureRecord(Record):
    """OUT/failed/SHARD.json."""

    shard_id: str
    shard: str
    attempts: Count
    last_error: str
    when: str = "unknown"


class DamageRecord(Record):
    """OUT/damaged/SHARD.json."""

    shard_id: str
    shard: str
    reason: str
    when: str = "unknown"


@dataclass(frozen=True)
class JobStamp:
    """Identifies the results of a configuration.

    Attributes:
        config_hash: hash of the settings that change the rows.
        weights_digest: digest of the model's weights.
        versions: installed versions; recorded, but not part of the hash.
        segmenter_digest: digest of the segmenter's files; None: there is none, and it is not recorded.
        maps_hash: hash of the configuration that made the maps in `input.maps`; None: a model makes them.
    """

    config_hash: str
    weights_digest: str
    versions: Mapping[str, str]
    segmenter_digest: str | None = None
    maps_hash: str | None = None

    def as_metadata(self) -> dict[str, Any]:
        """Return the stamp as it is written in Parquet footers."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that can change results."""
    found = {}
    for package in VERSIONED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def job_document(
    config: JobConfig,
    stamp: JobStamp,
    model_facts: ModelFacts | None = None,
    *,
    precision_is_auto: bool = False,
) -> bytes:
    """Return the content of OUT/job.json, without the secrets of URLs.

    Args:
        config: the configuration, its precision resolved.
        stamp: identifies the results.
        model_facts: of the model; None: not recorded.
        precision_is_auto: whether the precision was left to the program.
    """
    document = config.model_dump(mode="json")
    listed = config.input.shards
    patterns = [listed] if isinstance(listed, str) else listed
    document["input"]["shards"] = [
        storage.shown_url(url) for pattern in patterns for url in _with_scheme_first(pattern)
    ]
    document["output"]["dir"] = storage.shown_url(config.output.dir)
    if config.input.maps is not None:
        document["input"]["maps"] = storage.shown_url(config.input.maps)
    return as_json(
        {
            **stamp.as_metadata(),
            "layout": LAYOUT,
            "config": document,
            **({} if model_facts is None else {"model_facts": model_facts.model_dump(mode="json")}),
            "precision_is_auto": precision_is_auto,
            "started": utc_now(),
            "pid": os.getpid(),
        }
    )


def _with_scheme_first(pattern: str) -> list[str]:
    """Expand braces that hide the scheme, and with it the secrets that must not be written."""
    return list(braceexpand.braceexpand(pattern)) if pattern.startswith("{") else [pattern]


def counts_as_metadata(counts: ShardCounts) -> dict[str, Any]:
    """Return counts as they are written in Parquet footers and in OUT/_SUCCESS."""
    return {
        "samples_in": counts.samples_in,
        **{name: getattr(counts, name) for name in COUNTS},
        "errors_by_kind": dict(counts.errors_by_kind),
        "error_examples": dict(counts.error_examples),
    }


def as_json(document: Mapping[str, Any]) -> bytes:
    """Return a JSON document as it is written: indented, in UTF-8."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def utc_now() -> str:
    """Return the current time as it is written: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
