"""The `export` command, and the counts that it prints at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.common import INCOMPLETE, Destination, OutputDir, open_console
from pipeline.export import Format

if TYPE_CHECKING:
    from pipeline.export.write import ExportOptions, ExportTotals

MEANINGS = {
    "exported": "samples exported",
    "without_rows": "samples skipped: no annotation rows",
    "without_mask": "samples skipped: no accepted mask with a pixel",
    "damaged": "samples skipped: damaged in the shard",
    "mispaired": "samples skipped: not the ones that were annotated",
    "undecodable": "samples skipped: the image cannot be decoded",
    "damaged_mask": "samples skipped: a mask is damaged",
    "rows_rejected": "rows skipped: rejected by the job",
    "rows_empty": "rows skipped: accepted, but without a pixel",
    "rows_without_class": "rows skipped: the prompt is not the name of a class",
    "rows_marked_out": "rows skipped: not kept by --marks",
    "rows_without_sample": "rows skipped: the shard has no such sample",
}
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
            help="Format to write. coco: JSON; voc: img_dir and ann_dir; webdataset: tars with seg.png.",
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
    classes: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Names of the classes, for jobs whose prompts are captions."),
    ] = None,
    split: Annotated[str, typer.Option(help="voc: name of the subfolder in img_dir and ann_dir.")] = "train",
    kind: Annotated[
        Literal["stuff", "instances"],
        typer.Option(
            help="coco: write one annotation for each mask, or for each of its instances. These are its "
            "connected parts where masks.instances of the job is none."
        ),
    ] = "stuff",
    images: Annotated[bool, typer.Option(help="coco: write the images too.")] = True,
    merged: Annotated[bool, typer.Option(help="coco: also join all shards in annotations.json.")] = True,
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
) -> None:
    """Convert masks to COCO JSON, a VOC or mmsegmentation tree, or WebDataset shards."""
    from pipeline.export.write import ExportOptions, export_job

    console = open_console()
    options = ExportOptions(
        format_, classes, split, kind, images, merged, marks_file=marks, keep_marked=keep_marked
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
    raise typer.Exit(0 if is_whole else INCOMPLETE)


def export_lines(totals: ExportTotals, options: ExportOptions, dest: str) -> list[str]:
    """Return the counts of samples and rows by outcome, and what was written where; a line each."""
    from pipeline.export import LABEL_MAP_FORMATS
    from pipeline.storage import shown_url

    unit = "label map(s)" if options.format in LABEL_MAP_FORMATS else "annotation(s)"
    counts = [f"{totals.counts[kind]:,} {text}" for kind, text in MEANINGS.items() if totals.counts.get(kind)]
    missing = len(totals.omitted) + len(totals.damaged)
    total = missing + totals.shards_written + totals.shards_done_before
    incomplete = [f"incomplete: {missing} of {total} shard(s) are not exported"] if missing else []
    skipped = [f"shard skipped: {shard_id}: {why}" for shard_id, why in sorted(totals.omitted.items())]
    damaged = [f"shard skipped, damaged: {why}" for _, why in sorted(totals.damaged.items())]
    instances = [INSTANCES_TEXTS[totals.instances]] if totals.instances else []
    return [
        *counts,
        *instances,
        *skipped,
        *damaged,
        f"{totals.written:,} {unit} of {len(totals.class_names)} class(es) in {shown_url(dest)}: "
        f"{totals.shards_written} shard(s) written, {totals.shards_done_before} done before",
        *incomplete,
    ]
