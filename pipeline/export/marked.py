"""Omit from an export the rows that a file of marks does not keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pipeline.config.marks import Keep, Marks, marks_of, read_mark_list
from pipeline.output.folder import OutputFolder
from pipeline.output.image_shards import marks_of_job
from pipeline.output.joining import JoinedSample


def marks_of_export(marks_file: str, keep: Keep, folder: OutputFolder) -> Marks:
    """Read the marks of an export.

    Args:
        marks_file: path or URL, as `read_mark_list` takes it.
        keep: which rows are kept.
        folder: output folder of the job.

    Raises:
        UserError: the file cannot be read or is invalid, or its marks are about none of the job's shards.
    """
    return marks_of(marks_of_job(read_mark_list(marks_file), folder.shard_rows()), keep)


def only_kept(
    joined: Iterable[JoinedSample], marks: Marks, shard: str, counts: Counter[str]
) -> Iterator[JoinedSample]:
    """Yield the samples of a shard with the rows that the marks keep, perhaps none.

    Args:
        joined: samples and their rows.
        marks: the filter.
        shard: name of the shard in the rows of the job.
        counts: takes `rows_marked_out`, the number of rows that are not kept, and `marks_without_row`, the
            number of marks of this shard, among those that decide, whose row was not met.

    Raises:
        UserError: a mark is of another prompt than the row that it names.
    """
    not_met = set(marks.acting_by_shard.get(shard, ()))
    for sample in joined:
        not_met -= {(shard, row["key"], row["prompt_index"]) for row in sample.rows}
        rows = tuple(
            row for row in sample.rows if marks.keeps(shard, row["key"], row["prompt_index"], row["prompt"])
        )
        counts["rows_marked_out"] += len(sample.rows) - len(rows)
        yield replace(sample, rows=rows)
    counts["marks_without_row"] += len(not_met)
