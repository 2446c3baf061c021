"""Marks as a filter of an export."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.cli import main as cli
from pipeline.errors import UserError
from pipeline.export.write import ExportOptions, export_job
from pipeline.output.tables import shard_list_bytes
from tests.helpers.report_jobs import row, write_job


@pytest.fixture
def job(tmp_path):
    """Two prompts of each of three samples."""
    rows = [row(index, prompt, prompt=f"thing {prompt}") for index in range(3) for prompt in range(2)]
    return write_job(tmp_path / "job", [rows], runs=False)


def write_marks(folder, *marks, shard=None, name="marks.json"):
    """A file of (key, prompt index, prompt, mark)."""
    names = ("key", "prompt_index", "prompt", "mark")
    own = shard or f"file://{folder}/job/0.tar"
    (folder / name).write_text(
        json.dumps([{"shard": own, **dict(zip(names, mark, strict=True))} for mark in marks])
    )
    return str(folder / name)


MARKS = [("key000", 0, "thing 0", "bad"), ("key001", 0, "thing 0", "bad"), ("key001", 1, "thing 1", "bad")]


def images_of(dest):
    """File name of the image of each annotation, without its ordinal."""
    document = json.loads((dest / "annotations.json").read_text())
    names = {image["id"]: image["file_name"].rpartition("-")[2] for image in document["images"]}
    return sorted(names[annotation["image_id"]] for annotation in document["annotations"])


@pytest.mark.parametrize(
    ("keep", "kept", "rows", "samples"),
    [("not-bad", ["key000.jpg", "key002.jpg", "key002.jpg"], 3, 1), ("good", ["key002.jpg"], 5, 2)],
)
def test_only_rows_that_the_marks_keep_are_exported(tmp_path, job, keep, kept, rows, samples):
    marks = write_marks(tmp_path, *MARKS, ("key002", 1, "thing 1", "good"))
    options = ExportOptions("coco", marks_file=marks, keep_marked=keep)
    totals = export_job(str(job), str(tmp_path / "coco"), options)
    assert images_of(tmp_path / "coco") == kept
    assert (totals.counts["rows_marked_out"], totals.counts["marked_out"]) == (rows, samples)
    assert "without_mask" not in totals.counts


def test_marks_whose_row_is_not_there_are_counted(tmp_path, job):
    marks = write_marks(tmp_path, *MARKS, ("000", 0, "thing 0", "bad"), ("key001", 7, "thing 0", "bad"))
    totals = export_job(str(job), str(tmp_path / "coco"), ExportOptions("coco", marks_file=marks))
    assert (totals.counts["rows_marked_out"], totals.counts["marks_without_row"]) == (3, 2)


@pytest.mark.parametrize("place", ["job", "moved"])
def test_marks_name_a_shard_that_moved_by_its_place_in_the_rows_or_now(tmp_path, job, place):
    (tmp_path / "moved").mkdir()
    (tmp_path / "job" / "0.tar").rename(tmp_path / "moved" / "0.tar")
    listed = pq.read_table(f"{job}/shards.parquet").to_pylist()
    (old,) = (row["shard"] for row in listed)
    listed[0] |= {"shard": f"file://{tmp_path}/moved/0.tar", "moved_from": old}
    (Path(job) / "shards.parquet").write_bytes(shard_list_bytes(listed))
    marks = write_marks(tmp_path, *MARKS, shard=f"file://{tmp_path}/{place}/0.tar")
    totals = export_job(str(job), str(tmp_path / "coco"), ExportOptions("coco", marks_file=marks))
    assert totals.counts["rows_marked_out"] == len(MARKS)


def test_an_export_goes_on_with_the_same_marks_only(tmp_path, job):
    marks = write_marks(tmp_path, *MARKS)
    for path in (marks, write_marks(tmp_path, *MARKS, name="copy.json")):
        export_job(str(job), str(tmp_path / "coco"), ExportOptions("coco", marks_file=path))
    for options in (
        ExportOptions("coco", marks_file=write_marks(tmp_path, *MARKS[:1], name="fewer.json")),
        ExportOptions("coco", marks_file=marks, keep_marked="good"),
        ExportOptions("coco"),
    ):
        with pytest.raises(UserError, match="choose another folder"):
            export_job(str(job), str(tmp_path / "coco"), options)


def test_marks_of_other_prompts_and_of_other_jobs_are_refused(tmp_path, job):
    other_prompt = write_marks(tmp_path, ("key000", 0, "a cow", "bad"))
    with pytest.raises(
        UserError, match=r"prompt 0 of sample key000 .* is 'thing 0', but was marked bad as 'a cow'"
    ):
        export_job(str(job), str(tmp_path / "coco"), ExportOptions("coco", marks_file=other_prompt))
    other_job = write_marks(tmp_path, *MARKS, shard="s3://b/0.tar")
    with pytest.raises(UserError, match="none of the 3 mark"):
        export_job(str(job), str(tmp_path / "other"), ExportOptions("coco", marks_file=other_job))


def test_the_command_counts_the_rows_that_are_not_kept(tmp_path, job, monkeypatch, capsys):
    marks = write_marks(tmp_path, *MARKS)
    arguments = [
        str(job),
        str(tmp_path / "coco"),
        "--format",
        "coco",
        "--marks",
        marks,
        "--keep-marked",
        "not-bad",
    ]
    monkeypatch.setattr(sys, "argv", ["legrad", "export", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == 0
    assert "3 rows skipped: not kept by --marks" in capsys.readouterr().out
