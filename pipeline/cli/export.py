"""The `export` command and the counts that it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.common import INCOMPLETE, Destination, OutputDir, open_console
from pipeline.errors import UserError
from pipeline.export import Format

if TYPE_CHECKING:
    from pipeline.export.write import ExportOptions, ExportTotals

MEANINGS = {
    "exported": "samples exported",
    "without_rows": "samples skipped: no annotation rows",
    "without_mask": "samples skipped: no accepted mask with a pixel",
    "without_class": "samples skipped: no prompt with a mask belongs to one class",
    "marked_out": "samples skipped: no row kept by --marks",
    "damaged": "samples skipped: damaged in the shard",
    "mispaired": "samples skipped: not the ones that were annotated",
    "undecodable": "samples skipped: the image cannot be decoded",
    "damaged_mask": "samples skipped: a mask is damaged",
    "rows_rejected": "rows skipped: rejected by the job",
    "rows_empty": "rows skipped: accepted, but without a pixel",
    "rows_without_class": "rows skipped: the prompt mentions no class",
    "rows_several_classes": "rows skipped: the prompt mentions several classes",
    "rows_marked_out": "rows skipped: not kept by --marks",
    "marks_without_row": "marks not used: the job has no such row, or its sample was skipped",
    "rows_without_sample": "rows skipped: the shard has no such sample",
    "parts_below_min_area": "annotations or objects skipped: fewer pixels than --min-area",
    "objects_beyond_254": "objects skipped: more than 254 in the image, the smallest are void",
}
UNITS = {"coco": "annotation(s)", "yolo-seg": "object(s)"}
INSTANCES_TEXTS = {
    "column": "instances: those of the column `instances`, by masks.instances of the job",
    "connected parts": "instances: connected parts of masks, because masks.instances of the job is none",
}


def export(
    out: OutputDir,
    dest: Destination,
    *,
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="Format to write. coco: JSON; voc: PASCAL VOC 2012; mmseg: img_dir and ann_dir of "
            "mmsegmentation; yolo-seg: text files of polygons; webdataset: tars with seg.png.",
        ),
    ],
    shards: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARDS",
            help="Where the shards are now, if not where the job read them: paths, patterns; or OLD=NEW for "
            "a folder that moved. Repeatable.",
        ),
    ] = None,
    marks: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Marks of rows, .csv or .json, as a report saves them: a filter."),
    ] = None,
    keep_marked: Annotated[
        Literal["good", "not-bad"],
        typer.Option(
            help="Rows that --marks keeps. good: those marked good; not-bad: all but those marked bad."
        ),
    ] = "not-bad",
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Classes, .txt or .yaml, for jobs whose prompts are captions: a prompt belongs to the class "
            "that it mentions alone, by name, synonym or plural.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="voc, mmseg, yolo-seg: name of the split.")] = "train",
    kind: Annotated[
        Literal["stuff", "instances"],
        typer.Option(
            help="coco, yolo-seg: write one annotation for each mask, or for each of its instances; voc: "
            "write SegmentationObject with the instances. These are connected parts of masks where "
            "masks.instances of the job is none."
        ),
    ] = "stuff",
    min_area: Annotated[
        int,
        typer.Option(
            metavar="PIXELS",
            min=0,
            help="coco, voc, yolo-seg: skip annotations and objects with fewer pixels.",
        ),
    ] = 0,
    polygons: Annotated[
        bool,
        typer.Option(
            "--polygons",
            help="coco: write polygons as segmentation, and the run-length mask beside them as rle.",
        ),
    ] = False,
    images: Annotated[bool, typer.Option(help="coco: write the images too.")] = True,
    merged: Annotated[bool, typer.Option(help="coco: also join all shards in annotations.json.")] = True,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="hf://datasets/USER/NAME",
            help="Push the finished export to the Hugging Face Hub as one commit, with a dataset card; a new "
            "repository is private. The token is HF_TOKEN or that of `hf auth login`.",
        ),
    ] = None,
) -> None:
    """Convert masks to COCO, PASCAL VOC, mmsegmentation, YOLO, or WebDataset shards."""
    from pipeline.export.push import repository_of
    from pipeline.export.write import ExportOptions, export_job

    if marks is None and keep_marked == "good":
        raise UserError("--keep-marked: belongs to --marks FILE, which is not given")
    console = open_console()
    # before hours of work
    repository = None if push is None else repository_of(push, dest)
    options = ExportOptions(
        format_, classes, split, kind, images, merged, polygons, min_area, marks, keep_marked
    )
    totals = export_job(
        out,
        dest,
        options,
        shards or (),
        on_shard=lambda shard_id, written: console.print(f"{shard_id}: {written}"),
    )
    for line in export_lines(totals, options, dest):
        console.print(line, soft_wrap=True)
    # with --shards, shards are skipped on purpose
    is_whole = not totals.damaged and (bool(shards) or not totals.omitted)
    if repository is not None:
        outcome = _pushed(out, dest, options, totals, repository) if is_whole else "not pushed: incomplete"
        console.print(outcome, soft_wrap=True)
    raise typer.Exit(0 if is_whole else INCOMPLETE)


def _pushed(out: str, dest: str, options: ExportOptions, totals: ExportTotals, repository: str) -> str:
    from pipeline.export.card import dataset_card
    from pipeline.export.push import push
    from pipeline.output.folder import OutputFolder
    from pipeline.storage import absolute

    config = OutputFolder(absolute(out)).config()
    card = dataset_card(repository.partition("/")[2], options, config, totals, MEANINGS)
    return f"pushed: {push(dest, repository, card)}"


def export_lines(totals: ExportTotals, options: ExportOptions, dest: str) -> list[str]:
    """Return the counts of samples and rows by outcome, and what was written where; a line each."""
    from pipeline.storage import shown_url

    unit = UNITS.get(options.format, "label map(s)")
    counts = [f"{totals.counts[kind]:,} {text}" for kind, text in MEANINGS.items() if totals.counts.get(kind)]
    classes = f" of {len(totals.class_names)} class(es)" if totals.class_names else ""
    missing = len(totals.omitted) + len(totals.damaged)
    total = missing + totals.shards_written + totals.shards_done_before
    incomplete = [f"incomplete: {missing} of {total} shard(s) are not exported"] if missing else []
    skipped = [f"shard skipped: {shard_id}: {why}" for shard_id, why in sorted(totals.omitted.items())]
    damaged = [f"shard skipped, damaged: {why}" for _, why in sorted(totals.damaged.items())]
    instances = [INSTANCES_TEXTS[totals.instances]] if totals.instances else []
    return [
        *counts,
        *instances,
        *_polygon_lines(totals),
        *_caption_lines(totals),
        *skipped,
        *damaged,
        f"{totals.written:,} {unit}{classes} in {shown_url(dest)}: "
        f"{totals.shards_written} shard(s) written, {totals.shards_done_before} done before",
        *incomplete,
    ]


def _polygon_lines(totals: ExportTotals) -> list[str]:
    fit = totals.fit
    if not fit.polygons:
        return []
    mean = fit.iou_sum / fit.polygons
    return [f"polygons, read back as pixels, against masks: mean IoU {mean:.4f}, lowest {fit.iou_min:.4f}"]


def _caption_lines(totals: ExportTotals) -> list[str]:
    if not totals.without_class:
        return []
    return [
        "prompts without a class share the category `prompt`; in coco, each annotation has its own text as "
        "`prompt`; give classes to captions by --classes FILE"
    ]
