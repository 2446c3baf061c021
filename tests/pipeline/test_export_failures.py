"""Exports that fail: what they have written does not block another attempt."""

import pytest
from typer.testing import CliRunner

from pipeline import storage
from pipeline.cli.main import app
from pipeline.errors import OutputError, UserError
from pipeline.export.write import ExportOptions, export_job
from tests.helpers.report_jobs import row, write_job

FORMATS = ["coco", "voc", "mmseg", "yolo-seg", "webdataset"]


@pytest.fixture
def job(tmp_path):
    shards = [[row(index, prompt="cat", class_id=1) for index in range(3)] for _ in range(2)]
    return write_job(tmp_path / "job", shards, runs=False)


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fail_at(monkeypatch, number, error):
    """Let the number-th file of an export fail."""
    publish, calls = storage.publish, iter(range(1, 1000))

    def failing(folder, name, content, **options):
        if next(calls) == number:
            raise error
        publish(folder, name, content, **options)

    monkeypatch.setattr(storage, "publish", failing)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failure_before_the_first_finished_shard_leaves_no_file(job, tmp_path, monkeypatch, form, number):
    dest = tmp_path / "to"
    fail_at(monkeypatch, number, OutputError("the disk is full"))
    with pytest.raises(OutputError, match="the disk is full"):
        export_job(str(job), str(dest), ExportOptions(form))
    assert files_of(dest) == set() if dest.exists() else True
    monkeypatch.undo()
    other = ExportOptions("coco" if form != "coco" else "mmseg")
    assert export_job(str(job), str(dest), other).shards_written == 2


@pytest.mark.parametrize("form", FORMATS)
def test_a_failure_in_a_later_shard_keeps_the_finished_ones_and_nothing_of_it(
    job, tmp_path, monkeypatch, form
):
    dest, whole = tmp_path / "to", tmp_path / "whole"
    export_job(str(job), str(whole), ExportOptions(form))
    first = next(iter(sorted(path.stem for path in (whole / "export").glob("*.json"))))

    def stop(shard_id, _written):
        # the next file that is written is one of the second shard
        fail_at(monkeypatch, 2 if form != "webdataset" else 1, OutputError("the disk is full"))

    with pytest.raises(OutputError):
        export_job(str(job), str(dest), ExportOptions(form), on_shard=stop)
    monkeypatch.undo()
    second = {path for path in files_of(whole) if first not in path}
    assert not {path for path in files_of(dest) if path in second} - {"export.json"}
    assert export_job(str(job), str(dest), ExportOptions(form)).shards_done_before == 1
    assert files_of(dest) == files_of(whole)


def test_the_missing_classes_file_can_be_given_in_a_second_try(tmp_path):
    job = write_job(tmp_path / "job", [[row(0, prompt="a dog")]], runs=False)
    (tmp_path / "classes.txt").write_text("dog\n")
    arguments = ["export", str(job), str(tmp_path / "to"), "--format", "voc"]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, UserError)
    ran = CliRunner().invoke(app, [*arguments, "--classes", str(tmp_path / "classes.txt")])
    assert ran.exit_code == 0, ran.output


def test_the_record_of_a_killed_export_that_wrote_nothing_else_blocks_nobody(job, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "export.json").write_text('{"fingerprint": "another"}')
    assert export_job(str(job), str(tmp_path / "to"), ExportOptions("coco")).shards_written == 2


def test_other_content_of_a_classes_file_is_another_export(tmp_path):
    job = write_job(tmp_path / "job", [[row(0, prompt="a dog")]], runs=False)
    classes = tmp_path / "classes.txt"
    options = ExportOptions("coco", classes_file=str(classes))
    classes.write_text("dog\n")
    export_job(str(job), str(tmp_path / "to"), options)
    classes.write_text("cat\ndog\n")
    with pytest.raises(UserError, match="with other options"):
        export_job(str(job), str(tmp_path / "to"), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "voc"], "captions have a label only with a list of classes (--classes FILE)"),
        (["--format", "coco", "--keep-marked", "good"], "--keep-marked: belongs to --marks FILE"),
        (["--format", "coco", "--shards", "no/*.tar"], "--shards: nothing matches no/*.tar"),
    ],
)
def test_an_error_names_the_option_that_is_wrong_or_missing(legrad, tmp_path, options, message):
    job = write_job(tmp_path / "job", [[row(0, prompt="a dog")]], runs=False)
    code, _, err = legrad("export", job, tmp_path / "to", *options)
    assert code == 1
    assert message in err
