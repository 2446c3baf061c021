"""Write a job's masks in another format: shard by shard, resumable after each, every sample counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Protocol, assert_never

from pydantic import TypeAdapter, ValidationError

from pipeline import storage
from pipeline.config.classes import ClassEntry, check_class, class_lines, read_class_list
from pipeline.config.marks import Keep, Marks
from pipeline.config.schema import InputConfig
from pipeline.errors import DamagedFileError, UserError
from pipeline.export import LABEL_MAP_FORMATS, PART_FORMATS, Format
from pipeline.export.claim import claimed
from pipeline.export.coco import CocoExport
from pipeline.export.export_samples import ExportSample, export_samples
from pipeline.export.marked import marks_of_export, only_kept
from pipeline.export.mmseg import MmsegExport
from pipeline.export.parts import Kind, Parts
from pipeline.export.shard_files import (
    NO_POLYGONS,
    RECORDS_FOLDER,
    PolygonFit,
    ShardFiles,
    removed_on_failure,
)
from pipeline.export.voc import VocExport
from pipeline.export.webdataset import WebDatasetExport
from pipeline.export.yolo import YoloExport
from pipeline.output.folder import OutputFolder
from pipeline.output.image_shards import name_in_rows
from pipeline.output.joining import ShardPair, Share, Source, pair_shards
from pipeline.output.row_classes import RowClasses
from pipeline.text import received

CLASSES_FILE = "classes.txt"
LARGEST_LABEL = 254
# what instances are
COLUMN, PARTS = "column", "connected parts"


@dataclass(frozen=True)
class ExportOptions:
    """What is written.

    Attributes:
        format: name of the format.
        classes_file: classes for rows without one; see `pipeline.output.row_classes.RowClasses`.
        split: voc, mmseg, yolo-seg: name of the split.
        kind: coco, voc, yolo-seg: an annotation or object for each mask (stuff), or for each of its
            instances; these are connected parts where the job has not split masks. voc: stuff writes no
            objects.
        images: coco: whether images are written too; the other formats always have them.
        merged: coco: whether all shards are joined in one file as well.
        polygons: coco: whether `segmentation` is polygons, with the run-length mask beside it.
        min_area: coco, voc, yolo-seg: annotations and objects with fewer pixels are skipped.
        marks_file: marks of rows, as `pipeline.config.marks` reads them; None: every row is exported.
        keep_marked: which rows the marks keep.
    """

    format: Format
    classes_file: str | None = None
    split: str = "train"
    kind: Kind = "stuff"
    images: bool = True
    merged: bool = True
    polygons: bool = False
    min_area: int = 0
    marks_file: str | None = None
    keep_marked: Keep = "not-bad"


@dataclass(frozen=True)
class ShardRecord:
    """What was written of one shard; DEST/export/SHARD.json holds it and marks the shard as done.

    Attributes:
        attempt: of the annotations; a shard that was annotated again is exported again.
        written: label maps, annotations or objects.
        counts: outcomes of samples, rows and parts.
        class_names: of the classes that occur.
        without_class: whether rows without a class were written.
        fit: agreement of polygons with masks.
    """

    attempt: str
    written: int
    counts: Mapping[str, int]
    class_names: Mapping[int, str] = field(default_factory=dict)
    without_class: bool = False
    fit: PolygonFit = NO_POLYGONS


@dataclass(frozen=True)
class ExportTotals:
    """What an export wrote.

    Attributes:
        written: label maps, annotations or objects.
        counts: outcomes of samples, rows and parts, summed over shards.
        shards_written: in this run.
        shards_done_before: by an earlier run.
        omitted: shards of the job that are not part of it, and why.
        class_names: of the classes that occur.
        damaged: shards of which the job's own files cannot be read, and why.
        instances: what instances are: `column`, or `connected parts`; None where masks were written whole.
        without_class: whether rows without a class were written.
        fit: agreement of polygons with masks.
    """

    written: int
    counts: Mapping[str, int]
    shards_written: int
    shards_done_before: int
    omitted: Mapping[str, str]
    class_names: Mapping[int, str]
    damaged: Mapping[str, str] = field(default_factory=dict)
    instances: str | None = None
    without_class: bool = False
    fit: PolygonFit = NO_POLYGONS


class Exporter(Protocol):
    """Writes shards in one format."""

    def export_shard(self, number: int, samples: Iterable[ExportSample], files: ShardFiles) -> int:
        """Write a shard; return how many label maps, annotations or objects that makes."""

    def finish(self, dest: str, shard_ids: Iterable[str], class_names: Mapping[int, str]) -> None:
        """Write what needs all shards."""


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
    ids = [pair.annotations_id for pair in pairing.pairs]
    with claimed(export.dest, options.format, export.folder.url, export.identity(ids)):
        records, damaged, written_now = _export_shards(export, pairing.pairs, on_shard)
        totals = _totals(records.values(), written_now, pairing.omitted, damaged)
        _finish(
            export, records, {entry.class_id: entry.name for entry in export.classes} or totals.class_names
        )
    return replace(totals, instances=_kind_of_instances(export))


def _export_shards(
    export: _Export, pairs: Iterable[ShardPair], on_shard: Callable[[str, int], None]
) -> tuple[dict[str, ShardRecord], dict[str, str], int]:
    """Return the records of all shards by id, the reasons why others are damaged, and how many are new."""
    done = storage.list_names(storage.join_url(export.dest, RECORDS_FOLDER))
    records: dict[str, ShardRecord] = {}
    damaged: dict[str, str] = {}
    written_now = 0
    for number, pair in enumerate(pairs):
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
    return records, damaged, written_now


def _kind_of_instances(export: _Export) -> str | None:
    if export.options.format not in PART_FORMATS or export.options.kind != "instances":
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
    marks: Marks | None

    @cached_property
    def row_classes(self) -> RowClasses | None:
        return RowClasses(self.classes) if self.classes else None

    @property
    def given_names(self) -> dict[int, str] | None:
        """Names of classes by id in the file of --classes; None where none is given."""
        if self.options.classes_file is None:
            return None
        return {entry.class_id: entry.name for entry in self.classes}

    @cached_property
    def exporter(self) -> Exporter:
        options, parts = self.options, Parts(self.options.kind, self.options.min_area)
        match options.format:
            case "coco":
                return CocoExport(parts, options.images, options.polygons, options.merged)
            case "voc":
                return VocExport(options.split, parts)
            case "mmseg":
                return MmsegExport(options.split)
            case "yolo-seg":
                return YoloExport(options.split, parts)
            case "webdataset":
                return WebDatasetExport()
            case _:
                assert_never(options.format)

    def identity(self, shard_ids: Iterable[str]) -> list[object]:
        """Return what an export must share with an earlier one to continue it."""
        # the content of the files, wherever they are
        content = {
            "classes_file": [entry.model_dump(mode="json") for entry in self.classes],
            "marks_file": None if self.marks is None else self.marks.digest,
        }
        return [asdict(self.options) | content, self.folder.url, sorted(shard_ids)]


def _opened(out: str, dest: str, options: ExportOptions) -> _Export:
    _check(options)
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
    return _Export(folder, dest, options, config.input, classes, config.masks.has_instances, marks)


def _check(options: ExportOptions) -> None:
    if options.polygons and options.format != "coco":
        raise UserError(f"--polygons: belongs to --format coco, got --format {options.format}")
    if options.min_area and options.format not in PART_FORMATS:
        raise UserError(
            f"--min-area: {options.format} has no annotations or objects to skip; formats that have: "
            f"{', '.join(PART_FORMATS)}"
        )
    if options.min_area and (options.format, options.kind) == ("voc", "stuff"):
        raise UserError("--min-area: voc has objects only with --kind instances")
    # it names files and folders
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", options.split):
        raise UserError(
            "--split: expected at most 100 letters, digits, dots, hyphens and underscores, without a dot at "
            f"the beginning, got {received(options.split)}"
        )


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
    joins, counts = Counter[str](), Counter[str]()
    class_names: dict[int | None, str] = {}
    joined = source.read(Share(pair), lambda outcome, count: joins.update({outcome: count}))
    if export.marks is not None:
        joined = only_kept(joined, export.marks, name_in_rows(pair.listed), counts)
    samples = export_samples(joined, settings, export.row_classes, counts)
    samples = _noting_classes(samples, class_names, export.given_names)
    with removed_on_failure(export.dest, shard_id) as files:
        try:
            written = export.exporter.export_shard(number, samples, files)
        except UserError as error:
            raise UserError(f"{pair.shard.canonical_url}: {error}") from error
        record = ShardRecord(
            export.folder.footer(shard_id).attempt,
            written,
            dict(counts + joins + files.counts),
            {class_id: name for class_id, name in class_names.items() if class_id is not None},
            None in class_names,
            files.fit,
        )
        files.publish(RECORDS_FOLDER, f"{shard_id}.json", json.dumps(asdict(record)).encode())
    return record


def _noting_classes(
    samples: Iterable[ExportSample], class_names: dict[int | None, str], given: Mapping[int, str] | None
) -> Iterator[ExportSample]:
    """Yield the samples, and note their classes; raise UserError if --classes gives a class another name."""
    for sample in samples:
        for row in sample.rows:
            class_id, name = row["class_id"], row["class_name"]
            if class_id not in class_names:
                class_names[class_id] = name
                try:
                    if class_id is not None:
                        check_class(class_id, name)
                except ValueError as error:
                    raise UserError(str(error)) from None
                if given is not None and class_id is not None and given.get(class_id) != name:
                    named = received(given[class_id]) if class_id in given else "no class"
                    raise UserError(
                        f"--classes: class {class_id} of the job is {received(name)}, and {named} in the "
                        "file; prompts from classes have ids of their own: leave --classes out"
                    )
        yield sample


def _earlier(export: _Export, shard_id: str) -> ShardRecord | None:
    """Return what an earlier run wrote of a shard; None if the shard has been annotated again since."""
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
    return ExportTotals(
        sum(record.written for record in listed),
        counts,
        written_now,
        len(listed) - written_now,
        omitted,
        names,
        damaged,
        without_class=any(record.without_class for record in listed),
        fit=sum((record.fit for record in listed), start=NO_POLYGONS),
    )


def _finish(export: _Export, shard_ids: Collection[str], class_names: Mapping[int, str]) -> None:
    """Write what needs all shards."""
    export.exporter.finish(export.dest, shard_ids, class_names)
    try:
        content = class_lines(class_names).encode()
    except ValueError as error:
        raise UserError(str(error)) from None
    storage.publish(export.dest, CLASSES_FILE, content)
