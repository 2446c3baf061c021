"""A job's output folder: what it belongs to, what is done in it, and when it is complete."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from typing import Any

import braceexpand
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import config_hash
from pipeline.errors import UserError
from pipeline.model import check_model, weights_digest, with_absolute_paths
from pipeline.prompts.sample_prompts import with_files_read
from pipeline.records import ShardCounts
from pipeline.run_record import RUNS_FOLDER
from pipeline.settings import JobConfig
from pipeline.storage import ShardSource
from pipeline.writer import counts_as_metadata

JOB_FILE = "job.json"
SHARDS_FILE = "shards.parquet"
SUCCESS_FILE = "_SUCCESS"
RESULT_FOLDERS = ("annotations", "errors", "failed")
VERSIONED_PACKAGES = ("legrad-pipeline", "torch", "open_clip_torch", "ray", "pyarrow", "pillow", "webdataset")
STALE_AFTER_S = 3600.0

SHARDS_SCHEMA = pa.schema([("shard_id", pa.string()), ("shard", pa.string()), ("size_bytes", pa.int64())])


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


@dataclass(frozen=True)
class Job:
    """A job whose output folder is ready.

    Attributes:
        config: the configuration.
        stamp: identifies the results.
        shards: every shard of the job.
        done: ids of shards that need no work.
        given_up: ids of shards that an earlier run gave up on and that are left alone.
        warnings: what the user should know before the work starts.
        failed: ids of all shards that an earlier run gave up on.
    """

    config: JobConfig
    stamp: JobStamp
    shards: tuple[ShardSource, ...]
    done: frozenset[str]
    given_up: frozenset[str]
    warnings: tuple[str, ...] = ()
    failed: frozenset[str] = frozenset()

    @property
    def todo(self) -> list[ShardSource]:
        """The shards that are left, in order."""
        settled = self.done | self.given_up
        return [shard for shard in self.shards if shard.shard_id not in settled]


def prepare_job(config: JobConfig) -> Job:
    """Expand the shard list, check that the output folder is this configuration's, and see what is left.

    Raises:
        UserError: no shard matches, the classes cannot be read, or the folder holds results of another
            configuration.
        OutputError: the folder cannot be written.
    """
    config = _with_absolute_paths(config)
    config = config.model_copy(update={"prompts": with_files_read(config.prompts)})
    shards = storage.list_shards(config.input.shards, allow_commands=config.input.allow_commands)
    check_model(config.model, config.views.scales)
    digest = weights_digest(config.model)
    stamp = JobStamp(config_hash(config, digest), digest, installed_versions())
    out = config.output.dir
    warnings = _checked_against_earlier(config, stamp)
    for folder in ("", *RESULT_FOLDERS, RUNS_FOLDER):
        storage.sweep_temporary_files(
            storage.join_url(out, folder), older_than_s=STALE_AFTER_S, now_s=time.time()
        )
    done = shard_ids_in(out, "annotations", ".parquet")
    failed = shard_ids_in(out, "failed", ".json") - done
    left_alone = frozenset(_left_alone(config, failed))
    job = Job(config, stamp, tuple(shards), frozenset(done), left_alone, warnings, frozenset(failed))
    if job.todo:
        # before the new list is there: a crash in between must not leave a success that was never reached
        storage.remove(out, SUCCESS_FILE)
    storage.publish(out, JOB_FILE, _job_document(config, stamp))
    storage.publish(out, SHARDS_FILE, _shard_list(shards))
    return job


def looked_at_again(job: Job) -> Job:
    """The same job with what is done in its folder by now; raises OutputError where that cannot be told."""
    return replace(job, done=frozenset(shard_ids_in(job.config.output.dir, "annotations", ".parquet")))


def _with_absolute_paths(config: JobConfig) -> JobConfig:
    # workers on a cluster have another working directory than the driver
    output = config.output.model_copy(update={"dir": storage.absolute(config.output.dir)})
    return config.model_copy(update={"output": output, "model": with_absolute_paths(config.model)})


def shard_ids_in(output_dir: str, folder: str, suffix: str) -> set[str]:
    """Ids of the shards that have a file in a folder of the output."""
    names = storage.list_names(storage.join_url(output_dir, folder))
    return {name.removesuffix(suffix) for name in names if name.endswith(suffix)}


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter to the results."""
    found = {}
    for package in VERSIONED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_job(output_dir: str) -> dict[str, Any]:
    """The content of OUT/job.json.

    Raises:
        UserError: the folder has none, or it is not readable.
    """
    url = storage.join_url(output_dir, JOB_FILE)
    try:
        document = json.loads(storage.read_bytes(url))
    except FileNotFoundError:
        raise UserError(
            f"{storage.without_credentials(output_dir)}: holds no {JOB_FILE}; "
            "is it the output folder of `legrad annotate`?"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{storage.without_credentials(url)}: cannot be read: {error}") from error
    if not isinstance(document, dict):
        where = storage.without_credentials(url)
        raise UserError(f"{where}: expected a JSON object, got {type(document).__name__}")
    return document


def read_shard_list(output_dir: str) -> list[dict[str, Any]]:
    """The frozen list in OUT/shards.parquet: shard_id, shard (canonical URL), size_bytes.

    Raises:
        UserError: it is not there or not readable.
    """
    url = storage.join_url(output_dir, SHARDS_FILE)
    try:
        rows: list[dict[str, Any]] = pq.read_table(BytesIO(storage.read_bytes(url))).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{storage.without_credentials(url)}: cannot be read: {error}") from error
    return rows


def record_failure(output_dir: str, shard: ShardSource, attempts: int, last_error: str) -> None:
    """Write OUT/failed/<shard-id>.json for a shard that is given up."""
    document = {
        "shard_id": shard.shard_id,
        "shard": shard.canonical_url,
        "attempts": attempts,
        "last_error": last_error,
        "when": _now(),
    }
    storage.publish(storage.join_url(output_dir, "failed"), f"{shard.shard_id}.json", _json(document))


def forget_failure(output_dir: str, shard_id: str) -> None:
    """Remove the failure record of a shard that is done after all."""
    storage.remove(storage.join_url(output_dir, "failed"), f"{shard_id}.json")


def record_success(output_dir: str, shards: int, counts: ShardCounts) -> None:
    """Write OUT/_SUCCESS with the totals; only for a job whose every shard is done."""
    document = {"shards": shards, **counts_as_metadata(counts), "when": _now()}
    storage.publish(output_dir, SUCCESS_FILE, _json(document))


def _left_alone(config: JobConfig, failed: set[str]) -> set[str]:
    return set() if config.run.retry_failed else failed


def _checked_against_earlier(config: JobConfig, stamp: JobStamp) -> tuple[str, ...]:
    out = config.output.dir
    if JOB_FILE not in storage.list_names(out) or not _has_results(out):
        return ()
    earlier = read_job(out)
    if earlier.get("config_hash") != stamp.config_hash:
        return _mismatch(config, stamp, earlier)
    changed = [
        f"{package} {earlier.get('versions', {}).get(package)} -> {now}"
        for package, now in stamp.versions.items()
        if earlier.get("versions", {}).get(package) != now
    ]
    return (f"other versions than in the earlier run: {', '.join(changed)}",) if changed else ()


def _has_results(out: str) -> bool:
    return any(storage.list_names(storage.join_url(out, folder)) for folder in RESULT_FOLDERS)


def _mismatch(config: JobConfig, stamp: JobStamp, earlier: Mapping[str, Any]) -> tuple[str, ...]:
    out = config.output.dir
    if config.output.on_mismatch == "refuse":
        differing = differing_keys(earlier.get("config", {}), config.model_dump(mode="json"))
        what = ", ".join(differing) or "the model's weights"
        raise UserError(
            f"{storage.without_credentials(out)}: holds results of another configuration "
            f"({earlier.get('config_hash')}, now {stamp.config_hash}).\n"
            f"  changed: {what}\n"
            f"  choose another output.dir, or set output.on_mismatch=overwrite to delete what is there"
        )
    removed = 0
    storage.remove(out, SUCCESS_FILE)
    for folder in RESULT_FOLDERS:
        url = storage.join_url(out, folder)
        for name in storage.list_names(url):
            storage.remove(url, name)
            removed += 1
    return (f"removed {removed} files of another configuration",)


def differing_keys(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two configurations and that change the rows."""
    keys = []
    for section in ("input", "model", "prompts", "masks", "output"):
        before, after = earlier.get(section) or {}, now.get(section) or {}
        for key in sorted(set(before) | set(after)):
            counts = (section, key) not in {("input", "shards"), ("output", "dir"), ("output", "on_mismatch")}
            if counts and before.get(key) != after.get(key):
                keys.append(f"{section}.{key}")
    return keys


def _job_document(config: JobConfig, stamp: JobStamp) -> bytes:
    document = config.model_dump(mode="json")
    listed = config.input.shards
    patterns = [listed] if isinstance(listed, str) else listed
    document["input"]["shards"] = [
        storage.without_credentials(url) for pattern in patterns for url in _with_scheme_first(pattern)
    ]
    document["output"]["dir"] = storage.without_credentials(config.output.dir)
    return _json({**stamp.as_metadata(), "config": document, "started": _now(), "pid": os.getpid()})


def _with_scheme_first(pattern: str) -> list[str]:
    """Spell braces out where they hide the scheme, and with it what must not be written down."""
    return list(braceexpand.braceexpand(pattern)) if pattern.startswith("{") else [pattern]


def _shard_list(shards: Sequence[ShardSource]) -> bytes:
    rows = [
        {"shard_id": shard.shard_id, "shard": shard.canonical_url, "size_bytes": shard.size_bytes}
        for shard in shards
    ]
    sink = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
