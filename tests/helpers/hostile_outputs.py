"""Output folders that were damaged, or made by somebody who means harm: a good one, changed in one place.

Each entry of `HOSTILE_OUTPUTS` names a file of OUT and what happens to it. Two shards are annotated, a third
one was given up; the damage is done to the first one's files, so the second one's rows must still arrive.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.report_jobs import error, row, write_job

JOB, SHARDS, RUNS, FAILED = "job.json", "shards.parquet", "runs", "failed"
ANNOTATIONS, ERRORS = "annotations", "errors"
ALL = frozenset({"report", "export", "training", "evaluate"})


@dataclass(frozen=True)
class Hostile:
    """One way to spoil an output folder.

    Attributes:
        place: the file, or the folder whose first file it is.
        spoil: changes it, given its path.
        told_by: readers that must name the file; others do not look at what was changed.
        message: what they say instead of the file's name; None: that.
        refused_by: readers for which what was changed is no damage but reason to end.
    """

    place: str
    spoil: object
    told_by: frozenset = ALL
    message: str | None = None
    refused_by: frozenset = frozenset()

    def is_refused_by(self, reader):
        """Whether nothing can be read without this file, or this reader refuses the whole for its sake."""
        return (
            self.place == JOB or (self.place == SHARDS and reader != "evaluate") or reader in self.refused_by
        )

    def is_told_by(self, reader):
        """Whether this reader must name the file; evaluation reads no list of shards."""
        return reader in self.told_by and (reader, self.place) != ("evaluate", SHARDS)


def good_output(folder):
    """OUT with two annotated shards, a third one given up, errors and a run; its tars lie beside it."""
    shards = [
        [
            row(index, prompt_index, class_id=1 + index, prompt=f"thing {index}")
            for index in range(3)
            for prompt_index in (0, 1)
        ]
        for _ in range(3)
    ]
    out = write_job(folder, shards, errors=[error(7)], done=2)
    listed = pq.read_table(out / SHARDS).to_pylist()
    record = {"shard_id": listed[2]["shard_id"], "shard": listed[2]["shard"], "attempts": 3}
    (out / FAILED).mkdir(exist_ok=True)
    content = json.dumps({**record, "last_error": "the store is down", "when": "2026-01-01"})
    (out / FAILED / f"{listed[2]['shard_id']}.json").write_text(content)
    return out


def target_of(out, place):
    """The file that a place names."""
    path = Path(out) / place
    return sorted(path.iterdir())[0] if path.is_dir() else path


# ---------------------------------------------------------------- bytes


def content(data):
    def spoil(path):
        path.write_bytes(data)

    return spoil


def cut(share):
    def spoil(path):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return spoil


def flipped(offset_from_end, count=40):
    def spoil(path):
        data = bytearray(path.read_bytes())
        start = len(data) - offset_from_end
        for place in range(max(0, start), min(len(data) - 8, start + count)):
            data[place] ^= 0x5A
        path.write_bytes(bytes(data))

    return spoil


def replaced_by(make):
    def spoil(path):
        path.unlink()
        make(path)

    return spoil


def link_to(elsewhere):
    return replaced_by(lambda path: path.symlink_to(elsewhere))


def parquet_of_length(length):
    """A footer that claims to be so long."""
    return content(b"PAR1" + b"\0" * 64 + struct.pack("<I", length) + b"PAR1")


# ---------------------------------------------------------------- JSON


def json_with(**changes):
    def spoil(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def json_without(*names):
    def spoil(path):
        document = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in document.items() if name not in names}))

    return spoil


DEEP = b"[" * 100_000 + b"]" * 100_000
DEEP_OBJECT = b'{"config_hash": "x", "config": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}"
JSON_FAULTS = {
    "empty": content(b""),
    "cut": cut(0.5),
    "not UTF-8": content(b'{"config_hash": "\xff\xfe"}'),
    "UTF-16": content('{"config_hash": "x"}'.encode("utf-16")),
    "a list": content(b"[1, 2]"),
    "null": content(b"null"),
    "nested deeply": content(DEEP),
    "an endless number": content(b"1" * 5_000_000),
    "zero bytes": content(b"\0" * 1000),
    "a folder in its place": replaced_by(Path.mkdir),
    "a pipe in its place": replaced_by(os.mkfifo),
    "a link to a device": link_to("/dev/zero"),
    "a link to nowhere": link_to("/nowhere/at/all"),
    "a link to another file": link_to("/etc/passwd"),
}

# ---------------------------------------------------------------- Parquet


def ours_of(path):
    """What this package wrote into the footer; None in other tables."""
    return (pq.ParquetFile(path).metadata.metadata or {}).get(b"legrad")


def write_table(path, table, ours, **options):
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table, **options)
        if ours is not None:
            writer.add_key_value_metadata({b"legrad": ours})


def table_with(change, **options):
    """Rewrite a table, its footer kept."""

    def spoil(path):
        write_table(path, change(pq.read_table(path)), ours_of(path), **options)

    return spoil


def without_column(name):
    return table_with(lambda table: table.drop_columns([name]))


def column_as(name, kind):
    def change(table):
        values = pa.nulls(len(table), kind) if pa.types.is_nested(kind) else None
        column = values if values is not None else table.column(name).cast(kind)
        return table.set_column(table.schema.get_field_index(name), name, column)

    return table_with(change)


def values_of(name, value):
    """One row gets another value."""

    def change(table):
        place = table.schema.get_field_index(name)
        field_of = table.schema.field(place)
        values = table.column(name).to_pylist()
        values[0] = value
        return table.set_column(place, field_of, pa.array(values, field_of.type))

    return table_with(change)


def mask_of(size, counts):
    return values_of("mask", {"size": size, "counts": counts})


def footer_of(content_of):
    def spoil(path):
        write_table(path, pq.read_table(path), content_of(ours_of(path)))

    return spoil


def footer_with(**changes):
    return footer_of(lambda own: json.dumps(json.loads(own) | changes).encode())


def footer_without(name):
    return footer_of(lambda own: json.dumps({k: v for k, v in json.loads(own).items() if k != name}).encode())


def many_rows(count):
    return table_with(lambda table: table.slice(0, 1).take(pa.array([0] * count)), row_group_size=count)


def twice(name):
    return table_with(lambda table: table.append_column(name, table.column(name)))


def listed_with(**changes):
    """One shard of the list gets other values."""

    def change(table):
        rows = table.to_pylist()
        rows[0] |= changes
        return pa.Table.from_pylist(rows, schema=table.schema)

    return table_with(change)


PARQUET_FAULTS = {
    "empty": content(b""),
    "cut": cut(0.6),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "no Parquet": content(b"not a table" * 50),
    "a footer of four gigabytes": parquet_of_length(2**32 - 1),
    "a footer of all its bytes": parquet_of_length(60),
    "a damaged footer": flipped(200),
    "a folder in its place": replaced_by(Path.mkdir),
    "a pipe in its place": replaced_by(os.mkfifo),
    "a link to a device": link_to("/dev/zero"),
    "a link to another file": link_to("/etc/passwd"),
}

# ---------------------------------------------------------------- all of them

# what is no file is not there: its shard counts as not annotated, its run or failure as not recorded
NOT_THERE = ("a folder in its place", "a pipe in its place", "a link to a device", "a link to nowhere")
A_MASK = "0.tar: sample key000 skipped: mask: "
REPORT, DRAWN, UNTOLD = frozenset({"report"}), ALL - {"report"}, frozenset()


def each(place, faults, told_by=ALL):
    """The faults that any file of a kind may have."""
    # what makes a file none of ours is seen by all that open it, which a run's record is by the report alone
    told_by = told_by if place == RUNS else told_by | {"status"}
    return {
        f"{place}: {name}": Hostile(
            place, spoil, UNTOLD if name in NOT_THERE and place in (ANNOTATIONS, FAILED, RUNS) else told_by
        )
        for name, spoil in faults.items()
    }


HOSTILE_OUTPUTS = {
    **each(JOB, JSON_FAULTS),
    "job.json: missing keys": Hostile(JOB, json_without("config")),
    "job.json: no hash": Hostile(JOB, json_without("config_hash")),
    "job.json: a configuration nested deeply": Hostile(JOB, content(DEEP_OBJECT)),
    "job.json: a configuration of another kind": Hostile(JOB, json_with(config=[1])),
    "job.json: unknown settings": Hostile(JOB, json_with(config={"nonsense": 1})),
    "job.json: a hash that is a number": Hostile(JOB, json_with(config_hash=5)),
    **each(SHARDS, PARQUET_FAULTS),
    "shards.parquet: no ids": Hostile(SHARDS, without_column("shard_id")),
    "shards.parquet: ids that leave the folder": Hostile(SHARDS, listed_with(shard_id="../../../etc/passwd")),
    "shards.parquet: an absolute id": Hostile(SHARDS, listed_with(shard_id="/etc/passwd")),
    "shards.parquet: an id that is the folder": Hostile(SHARDS, listed_with(shard_id="..")),
    "shards.parquet: an id without characters": Hostile(SHARDS, listed_with(shard_id="")),
    "shards.parquet: an id of escape sequences": Hostile(SHARDS, listed_with(shard_id="\x1b[2J")),
    "shards.parquet: an id that is null": Hostile(SHARDS, listed_with(shard_id=None)),
    "shards.parquet: a URL that is null": Hostile(SHARDS, listed_with(shard=None)),
    "shards.parquet: a negative size": Hostile(SHARDS, listed_with(size_bytes=-5)),
    "shards.parquet: one shard twice": Hostile(
        SHARDS, table_with(lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    ),
    "shards.parquet: ids that are numbers": Hostile(
        SHARDS, table_with(lambda table: table.set_column(0, "shard_id", pa.array([1, 2, 3])))
    ),
    **each(ANNOTATIONS, PARQUET_FAULTS),
    "annotations: damaged pages": Hostile(
        ANNOTATIONS, lambda path: flipped(path.stat().st_size - 100, 600)(path)
    ),
    "annotations: no masks": Hostile(ANNOTATIONS, without_column("mask")),
    "annotations: no keys": Hostile(ANNOTATIONS, without_column("key")),
    "annotations: similarities as text": Hostile(ANNOTATIONS, column_as("similarity", pa.string())),
    "annotations: wider numbers": Hostile(ANNOTATIONS, column_as("sample_index", pa.int64())),
    "annotations: masks of another kind": Hostile(ANNOTATIONS, column_as("mask", pa.list_(pa.int32()))),
    "annotations: two columns of one name": Hostile(ANNOTATIONS, twice("prompt")),
    "annotations: a key that is null": Hostile(ANNOTATIONS, values_of("key", None)),
    "annotations: a prompt that is null": Hostile(ANNOTATIONS, values_of("prompt", None)),
    "annotations: an ordinal that is null": Hostile(ANNOTATIONS, values_of("sample_index", None)),
    "annotations: a negative ordinal": Hostile(ANNOTATIONS, values_of("sample_index", -1)),
    "annotations: an image without pixels": Hostile(ANNOTATIONS, values_of("image_height", 0)),
    "annotations: an image of negative size": Hostile(ANNOTATIONS, values_of("image_width", -64)),
    "annotations: a similarity that is no number": Hostile(
        ANNOTATIONS, values_of("similarity", float("nan"))
    ),
    "annotations: an endless similarity": Hostile(ANNOTATIONS, values_of("similarity", float("inf"))),
    "annotations: no footer of ours": Hostile(ANNOTATIONS, footer_of(lambda own: None)),
    "annotations: a footer that is no JSON": Hostile(ANNOTATIONS, footer_of(lambda own: own[:-3])),
    "annotations: a footer that is not UTF-8": Hostile(ANNOTATIONS, footer_of(lambda own: b'{"a": "\xff"}')),
    "annotations: a footer that is a list": Hostile(ANNOTATIONS, footer_of(lambda own: b"[]")),
    "annotations: a footer nested deeply": Hostile(ANNOTATIONS, footer_of(lambda own: DEEP)),
    "annotations: a footer without attempt": Hostile(ANNOTATIONS, footer_without("attempt")),
    "annotations: a negative count": Hostile(ANNOTATIONS, footer_with(rows=-1)),
    "annotations: a count beyond any": Hostile(ANNOTATIONS, footer_with(annotated=10**400)),
    "annotations: a count that is no number": Hostile(ANNOTATIONS, footer_with(rows=float("nan"))),
    "annotations: kinds of errors that are a list": Hostile(ANNOTATIONS, footer_with(errors_by_kind=[1])),
    "annotations: another attempt": Hostile(ANNOTATIONS, footer_with(attempt="b")),
    "annotations: another job": Hostile(ANNOTATIONS, footer_with(config_hash="0"), REPORT | {"evaluate"}),
    "annotations: two million rows in a group": Hostile(ANNOTATIONS, many_rows(2_000_000)),
    "annotations: a mask of 40,000 x 40,000": Hostile(
        ANNOTATIONS, mask_of([40_000, 40_000], "0PPPZbe1"), DRAWN, A_MASK
    ),
    "annotations: a mask whose text is cut": Hostile(ANNOTATIONS, mask_of([48, 64], "`P3o"), DRAWN, A_MASK),
    "annotations: a mask of endless digits": Hostile(
        ANNOTATIONS, mask_of([48, 64], "o" * 100_000), DRAWN, A_MASK
    ),
    "annotations: a mask without size": Hostile(ANNOTATIONS, mask_of(None, "`P3"), UNTOLD),
    "annotations: a mask whose size holds a null": Hostile(
        ANNOTATIONS, mask_of([48, None], "`P3"), frozenset()
    ),
    "annotations: a mask without counts": Hostile(ANNOTATIONS, mask_of([48, 64], None), UNTOLD),
    "annotations: a mask in a frame of its own": Hostile(ANNOTATIONS, mask_of([64, 48], "`P3"), UNTOLD),
    "annotations: a heat map cut short": Hostile(ANNOTATIONS, values_of("heatmap", b"ab"), UNTOLD),
    "annotations: a heat map of negative height": Hostile(
        ANNOTATIONS, values_of("heatmap_height", -3), REPORT
    ),
    "annotations: an unknown status": Hostile(ANNOTATIONS, values_of("status", "\x1b[2J<b>"), UNTOLD),
    "annotations: a prompt of escape sequences": Hostile(
        # the name of a class, of which a list of classes must hold one a line
        ANNOTATIONS,
        values_of("prompt", "\x1b[2J\u202e"),
        UNTOLD,
        refused_by=frozenset({"export"}),
    ),
    **each(ERRORS, PARQUET_FAULTS),
    "errors: no kinds": Hostile(ERRORS, without_column("kind")),
    "errors: no footer of ours": Hostile(ERRORS, footer_of(lambda own: None)),
    "errors: another attempt": Hostile(ERRORS, footer_with(attempt="b")),
    "errors: a kind that is null": Hostile(ERRORS, values_of("kind", None), REPORT),
    **each(FAILED, JSON_FAULTS, REPORT),
    "failed: an error that is a list": Hostile(FAILED, json_with(last_error=["x"]), REPORT),
    **each(RUNS, JSON_FAULTS, REPORT),
    "runs: samples that are text": Hostile(RUNS, json_with(samples="many"), REPORT),
    "runs: a time that is no number": Hostile(RUNS, json_with(elapsed_s=float("nan")), REPORT),
    "runs: an endless time": Hostile(RUNS, json_with(elapsed_s=1e308), REPORT),
    "runs: a history of texts": Hostile(RUNS, json_with(history=[["a", "b"]]), REPORT),
}
