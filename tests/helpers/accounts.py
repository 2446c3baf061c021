"""The books of an output folder: what came in, what became of it, and that nothing else lies about."""

import json
import re
import shlex
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.output.schema import ERROR_SCHEMA, annotation_schema
from pipeline.storage import TEMPORARY_SUFFIX, shard_id

FOLDERS = {"annotations": ".parquet", "errors": ".parquet", "failed": ".json", "damaged": ".json"}
TOP_FILES = {"job.json", "shards.parquet", "_SUCCESS"}


@dataclass(frozen=True)
class Accounts:
    """Samples and shards of a job, each in exactly one place.

    Attributes:
        samples_in: samples of all input tars, counted without this package.
        annotated, empty, in_error: outcomes in done shards.
        in_failed_shards, in_left_shards: samples whose shard was given up, or is still to do.
        lost: samples of done shards without any outcome.
        duplicated: rows whose (shard, sample_index, prompt_index) occurs more than once.
        temporary_files: what killed writers left under names that no reader looks at.
    """

    samples_in: int
    annotated: int
    empty: int
    in_error: int
    in_failed_shards: int
    in_left_shards: int
    lost: int
    duplicated: int
    shards_done: int
    failed: tuple[str, ...]
    shards_left: int
    temporary_files: int


def audit(out, tars):
    """Check an output folder against the input tars, with nothing but listings, footers and rows.

    Args:
        out: the folder.
        tars: as the job lists them: paths, or commands whose last word is the path.

    Raises AssertionError where a file is partial or stray, footers and rows disagree, the two files of a
    shard do not belong together, or a sample is lost or doubled.
    """
    out = Path(out)
    keys = {shard_id(str(tar)): sample_keys(tar_path(tar)) for tar in tars}
    temporary = check_names(out, keys)
    done = {path.stem for path in (out / "annotations").glob("*.parquet") if not is_temporary(path)}
    failed = {path.stem for path in (out / "failed").glob("*.json") if not is_temporary(path)} - done
    left = set(keys) - done - failed
    config_hash = json.loads((out / "job.json").read_text())["config_hash"]
    outcomes = [outcomes_of(out, shard, keys[shard], config_hash) for shard in sorted(done)]
    total = sum(outcomes, Counter())
    accounts = Accounts(
        samples_in=sum(map(len, keys.values())),
        annotated=total["annotated"],
        empty=total["empty"],
        in_error=total["in_error"],
        in_failed_shards=sum(len(keys[shard]) for shard in failed),
        in_left_shards=sum(len(keys[shard]) for shard in left),
        lost=total["lost"],
        duplicated=total["duplicated"],
        shards_done=len(done),
        failed=tuple(sorted(failed)),
        shards_left=len(left),
        temporary_files=temporary,
    )
    assert (accounts.lost, accounts.duplicated) == (0, 0), accounts
    assert_they_add_up(accounts)
    check_success(out, accounts)
    return accounts


def assert_they_add_up(accounts):
    outcomes = accounts.annotated + accounts.empty + accounts.in_error
    assert outcomes + accounts.in_failed_shards + accounts.in_left_shards == accounts.samples_in, accounts


def tar_path(listed):
    return shlex.split(listed)[-1] if str(listed).startswith("pipe:") else listed


def sample_keys(path):
    """Keys of a good tar's samples, in order: member names up to the first dot, neighbours taken together."""
    with tarfile.open(path) as tar:
        return list(dict.fromkeys(re.sub(r"\.[^/]*$", "", member.name) for member in tar))


def is_temporary(path):
    return path.name.endswith(TEMPORARY_SUFFIX)


def check_names(out, keys):
    """Only final names of this job's shards, and temporary ones, which are counted."""
    temporary = [path for path in out.rglob("*") if path.is_file() and is_temporary(path)]
    final = {path for path in out.rglob("*") if path.is_file()} - set(temporary)
    expected = {out / folder / f"{shard}{end}" for folder, end in FOLDERS.items() for shard in keys}
    told_of_runs = set((out / "runs").glob("*.json"))
    superseded = set((out / "unlisted").glob("*.moved"))
    known = expected | told_of_runs | superseded | {out / name for name in TOP_FILES}
    assert final <= known, sorted(final - known)
    # what a reader's pattern finds: never a temporary file, nor a superseded one
    for folder in ("annotations", "errors"):
        assert set((out / folder).glob("*")) <= expected
    assert {path.parent.name for path in out.rglob("*.parquet")} <= {"annotations", "errors", out.name}
    return len(temporary)


def outcomes_of(out, shard, keys, config_hash):
    """Outcomes of a done shard, from the rows; what its footers say is held against them."""
    annotations, said = read_whole(
        out / "annotations" / f"{shard}.parquet", annotation_schema(with_maps=True)
    )
    errors, said_by_errors = read_whole(out / "errors" / f"{shard}.parquet", ERROR_SCHEMA)
    assert said == said_by_errors, f"{shard}: two files of different attempts"
    assert said["config_hash"] == config_hash, f"{shard}: of another configuration"
    rows = [(row["sample_index"], row["prompt_index"]) for row in annotations]
    annotated = {row["sample_index"]: row["key"] for row in annotations}
    in_error = {row["sample_index"]: row["key"] for row in errors if row["sample_index"] is not None}
    named = in_error | annotated
    assert named == {index: keys[index] for index in named}, f"{shard}: keys of other samples"
    found = {"annotated": len(annotated), "in_error": len(set(in_error) - set(annotated))}
    assert found == {"annotated": said["annotated"], "in_error": said["failed"]}, shard
    assert (len(rows), len(errors)) == (said["rows"], said["error_rows"]), shard
    return Counter(
        found,
        empty=said["empty"],
        duplicated=len(rows) - len(set(rows)),
        lost=len(keys) - sum(found.values()) - said["empty"],
    )


def read_whole(path, schema):
    """All rows of a Parquet file and this package's part of its footer."""
    table = pq.read_table(path)
    assert table.schema.equals(schema), path
    return table.to_pylist(), json.loads(pq.read_metadata(path).metadata[b"legrad"])


def check_success(out, accounts):
    """_SUCCESS exists only if nothing failed and nothing is left, and has the same totals."""
    if not (out / "_SUCCESS").exists():
        return
    assert (accounts.failed, accounts.shards_left) == ((), 0), accounts
    totals = json.loads((out / "_SUCCESS").read_text())
    assert totals["shards"] == accounts.shards_done
    assert (totals["samples_in"], totals["annotated"]) == (accounts.samples_in, accounts.annotated)
    assert (totals["empty"], totals["failed"]) == (accounts.empty, accounts.in_error)
