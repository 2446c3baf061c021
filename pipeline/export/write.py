"""A job's masks in another format: shard by shard, resumable after each, every sample counted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol, assert_never

from pydantic import TypeAdapter, ValidationError

from pipeline import storage
from pipeline.config.classes import ClassEntry, check_class, class_lines, read_class_list
from pipeline.config.marks import Keep, Marks
from pipeline.config.schema import InputConfig
from pipeline.errors import DamagedFileError, UserError
from pipeline.export import LABEL_MAP_FORMATS, Format
from pipeline.export.coco import CocoExport, Kind, merge_parts
from pipeline.export.export_samples import ExportSample, export_samples
from pipeline.export.marked import marks_of_export, only_kept
from pipeline.export.voc import VocExport
from pipeline.export.webdataset import WebDatasetExport
from pipeline.output.folder import OutputFolder
from pipeline.output.joining import ShardPair, Share, Source, pair_shards

EXPORT_FILE, RECORDS_FOLDER, CLASSES_FILE = "export.json", "export", "classes.txt"
LARGEST_LABEL = 254
# what instances are
COLUMN, PARTS = "column", "connected parts"


@dataclass(frozen=True)
class ExportOptions:
    """What is written.

    Attributes:
        format: coco, voc or webdataset.
        classes_file: gives prompts that are a class's name that class, where rows have none of their own.
        split: voc: name of the subfolder.
        kind: coco: an annotation for each mask (stuff), or for each of its instances; these are connected
            parts where the job has not split masks.
        images: coco: whether images are written too; the other formats always have them.
        merged: coco: whether all shards are joined in one file as well.
        marks_file: marks of rows, as `pipeline.config.marks` reads them; None: every row is exported.
        keep_marked: which rows the marks keep.
        marks_digest: of the marks; set when their file is read, so that an export is resumed with the same.
    """

    format: Format
    classes_file: str | None = None
    split: str = "train"
    kind: Kind = "stuff"
    images: bool = True
    merged: bool = True
    marks_file: str | None = None
    keep_marked: Keep = "not-bad"
    marks_digest: str = ""


@dataclass(frozen=True)
class ShardRecord:
    """What was written of one shard; DEST/export/SHARD.json holds it and marks the shard as done.

    Attributes:
        attempt: of the annotations; a shard that was annotated again is exported again.
        written: label maps, or annotations of COCO.
        counts: what became of samples and rows.
        class_names: of the classes that occur.
    """

    attempt: str
    written: int
    counts: Mapping[str, int]
    class_names: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportTotals:
    """What an export wrote.

    Attributes:
        written: label maps, or annotations of COCO.
        counts: what became of samples and rows, summed over shards.
        shards_written: in this run.
        shards_done_before: by an earlier run.
        omitted: shards of the job that are not part of it, and why.
        class_names: of the classes that occur.
        damaged: shards of which the job's own files cannot be read, and why.
        instances: what instances are: `column`, or `connected parts`; None where masks were written whole.
    """

    written: int
    counts: Mapping[str, int]
    shards_written: int
    shards_done_before: int
    omitted: Mapping[str, str]
    class_names: Mapping[int, str]
    damaged: Mapping[str, str] = field(default_factory=dict)
    instances: str | None = None


class Exporter(Protocol):
    """Writes one shard in one format."""

    def export_shard(self, number: int, shard_id: str, samples: Iterable[ExportSample]) -> int:
        """Write a shard; returns how many label maps or annotations that makes."""


def export_job(
    out_dir: str,
    dest: str,
    options: ExportOptions,
    shards: Sequence[str] = (),
    *,
    on_shard: Callable[[str, int], None] = lambda _shard_id, _written: None,
) -> ExportTotals:
    """Write a job's masks in another format.

    Samples without a mask, because they failed, no prompt applied or every prompt was rejected or won no
    pixel, are skipped and counted: nothing is known of their pixels.

    Args:
        out_dir: output folder of the job: local path, s3:// or gs://.
        dest: a folder that holds nothing else; shards that an earlier run of the same export wrote are kept.
        options: what is written.
        shards: where the images are, as `pipeline.output.image_shards.locate_shards` takes it.
        on_shard: called with shard id and number written, after each shard.

    Raises:
        DamagedFileError: the job's job.json or list of shards is none.
        UserError: no job in the folder, another export in `dest`, images that cannot be found, rows without
            a class or classes beyond 254 where label maps are written.
        ShardError: a shard cannot be read.
        OutputError: something cannot be written.
    """
    export = _opened(storage.absolute(out_dir), storage.absolute(dest), options)
    pairing = pair_shards(export.folder.url, shards)
    _claim(export, [pair.annotations_id for pair in pairing.pairs])
    done = storage.list_names(storage.join_url(export.dest, RECORDS_FOLDER))
    records: dict[str, ShardRecord] = {}
    damaged: dict[str, str] = {}
    written_now = 0
    for number, pair in enumerate(pairing.pairs):
        shard_id = pair.annotations_id
        try:
            record = _earlier(export, shard_id) if f"{shard_id}.json" in done else None
            if record is None:
                record = _export_shard(export, number, pair)
                written_now += 1
                on_shard(shard_id, record.written)
        except DamagedFileError as error:
            damaged[shard_id] = str(error)
            continue
        records[shard_id] = record
    totals = _totals(records.values(), written_now, pairing.omitted, damaged)
    _finish(export, records, {entry.class_id: entry.name for entry in export.classes} or totals.class_names)
    return replace(totals, instances=_kind_of_instances(export))


def _kind_of_instances(export: _Export) -> str | None:
    if (export.options.format, export.options.kind) != ("coco", "instances"):
        return None
    return COLUMN if export.has_instances else PARTS


@dataclass(frozen=True)
class _Export:
    folder: OutputFolder
    dest: str
    options: ExportOptions
    settings: InputConfig
    classes: tuple[ClassEntry, ...]
    has_instances: bool
    marks: Marks | None = None


def _opened(out: str, dest: str, options: ExportOptions) -> _Export:
    folder = OutputFolder(out)
    config = folder.config()
    listed = config.prompts.classes
    if options.classes_file is not None:
        classes = read_class_list(options.classes_file)
    else:
        classes = () if listed is None or isinstance(listed, str) else listed
    largest = max((entry.class_id for entry in classes), default=0)
    if options.format in LABEL_MAP_FORMATS and largest > LARGEST_LABEL:
        raise UserError(
            f"{options.format}: expected class ids up to {LARGEST_LABEL}, which fit a byte beside 255 for "
            f"ignored pixels, got {largest}; export as coco, or give a classes file with fewer classes"
        )
    marks = None
    if options.marks_file is not None:
        marks = marks_of_export(options.marks_file, options.keep_marked, folder)
        # an export goes on with the same marks, wherever their file is
        options = replace(options, marks_file=None, marks_digest=marks.digest)
    return _Export(folder, dest, options, config.input, classes, config.masks.has_instances, marks)


def _export_shard(export: _Export, number: int, pair: ShardPair) -> ShardRecord:
    settings, shard_id = export.settings, pair.annotations_id
    fields = frozenset(settings.image.lower().split(";"))
    source = Source(
        export.folder,
        fields,
        settings.max_member_bytes,
        refuse_mismatches=True,
        with_instances=export.options.kind == "instances",
    )
    joins, counts, class_names = Counter[str](), Counter[str](), dict[int, str]()
    class_ids = {entry.name.lower(): entry.class_id for entry in export.classes} or None
    joined = source.read(Share(pair), lambda outcome, count: joins.update({outcome: count}))
    if export.marks is not None:
        joined = only_kept(joined, export.marks, pair.listed["shard"], counts)
    samples = _noting_classes(export_samples(joined, settings, class_ids, counts), class_names)
    try:
        written = _exporter(export.dest, export.options).export_shard(number, shard_id, samples)
    except UserError as error:
        raise UserError(f"{pair.shard.canonical_url}: {error}") from error
    record = ShardRecord(export.folder.footer(shard_id).attempt, written, dict(counts + joins), class_names)
    folder = storage.join_url(export.dest, RECORDS_FOLDER)
    storage.publish(folder, f"{shard_id}.json", json.dumps(asdict(record)).encode())
    return record


def _exporter(dest: str, options: ExportOptions) -> Exporter:
    match options.format:
        case "coco":
            return CocoExport(dest, options.kind, options.images)
        case "voc":
            return VocExport(dest, options.split)
        case "webdataset":
            return WebDatasetExport(dest)
        case _:
            assert_never(options.format)


def _noting_classes(samples: Iterable[ExportSample], class_names: dict[int, str]) -> Iterator[ExportSample]:
    for sample in samples:
        for row in sample.rows:
            class_id = row["class_id"]
            if class_id is not None and class_id not in class_names:
                class_names[class_id] = row["prompt"]
                try:
                    check_class(class_id, row["prompt"])
                except ValueError as error:
                    raise UserError(str(error)) from None
        yield sample


def _claim(export: _Export, shard_ids: Sequence[str]) -> None:
    """Record in DEST what it holds; refuse a folder that holds something else."""
    what = [asdict(export.options), export.folder.url, sorted(shard_ids)]
    own = {
        "format": export.options.format,
        "job": storage.shown_url(export.folder.url),
        "fingerprint": hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16],
    }
    where, shown_dest = storage.join_url(export.dest, EXPORT_FILE), storage.shown_url(export.dest)
    if not storage.exists(export.dest, EXPORT_FILE):
        if present := storage.list_names(export.dest):
            raise UserError(
                f"{shown_dest}: expected an empty folder or an earlier export, found {min(present)}"
            )
        storage.publish(export.dest, EXPORT_FILE, json.dumps(own, indent=1).encode())
        return
    try:
        earlier = json.loads(storage.read_text(where))["fingerprint"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{storage.shown_url(where)}: is no record of an export: {error}") from error
    if earlier != own["fingerprint"]:
        raise UserError(
            f"{shown_dest}: holds an export of another job, with other options, or of other shards; "
            "choose another folder"
        )


def _earlier(export: _Export, shard_id: str) -> ShardRecord | None:
    """What an earlier run wrote of a shard; None where it has been annotated again since."""
    url = storage.join_url(export.dest, RECORDS_FOLDER, f"{shard_id}.json")
    try:
        record = TypeAdapter(ShardRecord).validate_json(storage.read_text(url))
    except ValidationError:
        return None
    return record if record.attempt == export.folder.footer(shard_id).attempt else None


def _totals(
    records: Iterable[ShardRecord], written_now: int, omitted: Mapping[str, str], damaged: Mapping[str, str]
) -> ExportTotals:
    listed = list(records)
    counts = sum((Counter(record.counts) for record in listed), start=Counter[str]())
    names = {number: name for record in listed for number, name in record.class_names.items()}
    written = sum(record.written for record in listed)
    done_before = len(listed) - written_now
    return ExportTotals(written, counts, written_now, done_before, omitted, names, damaged)


def _finish(export: _Export, shard_ids: Iterable[str], class_names: Mapping[int, str]) -> None:
    """Write what needs all shards."""
    if export.options.format == "coco" and export.options.merged:
        merge_parts(export.dest, shard_ids, class_names)
    try:
        content = class_lines(class_names).encode()
    except ValueError as error:
        raise UserError(str(error)) from None
    storage.publish(export.dest, CLASSES_FILE, content)
