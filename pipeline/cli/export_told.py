"""What an export tells at its end."""

from __future__ import annotations

from pipeline.export.write import ExportOptions, ExportTotals
from pipeline.storage import shown_url

MEANINGS = {
    "exported": "samples exported",
    "without_rows": "samples left out: without annotation rows",
    "without_mask": "samples left out: no accepted mask with a pixel",
    "damaged": "samples left out: damaged in the shard",
    "mispaired": "samples left out: not the ones that were annotated",
    "undecodable": "samples left out: the image cannot be decoded",
    "damaged_mask": "samples left out: a mask is damaged",
    "rows_rejected": "rows left out: rejected by the job",
    "rows_empty": "rows left out: accepted, but without a pixel",
    "rows_without_class": "rows left out: the prompt is no name of a class",
    "rows_without_sample": "rows left out: the shard has no such sample",
}


def told_export(totals: ExportTotals, options: ExportOptions, dest: str) -> list[str]:
    """Counts by what became of samples and rows, and what was written where; a line each."""
    unit = "annotation(s)" if options.format == "coco" else "label map(s)"
    known = [f"{totals.counts[kind]:,} {text}" for kind, text in MEANINGS.items() if totals.counts.get(kind)]
    left_out = [f"shard left out: {shard_id}: {why}" for shard_id, why in sorted(totals.left_out.items())]
    left_out += [f"shard left out, damaged: {why}" for _, why in sorted(totals.damaged.items())]
    return [
        *known,
        *left_out,
        f"{totals.written:,} {unit} of {len(totals.class_names)} class(es) in {shown_url(dest)}: "
        f"{totals.shards_written} shard(s) written, {totals.shards_done_before} done before",
    ]
