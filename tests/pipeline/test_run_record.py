"""What a run writes down about itself."""

import json

import pytest

from pipeline.measures import Measures
from pipeline.progress import RunState
from pipeline.records import ShardCounts
from pipeline.run_record import latest_run, record_from, recorded_run

STATE = RunState(
    shards_total=4,
    shards_skipped=0,
    shards_done=2,
    counts=ShardCounts(annotated=90, empty=10),
    measures=Measures(95, 9.0, 10.0),
    workers_ready=1,
    elapsed_s=15.0,
    loading_s=5.0,
)


def records(out):
    return [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))]


def test_a_run_tells_where_it_stands_while_it_goes_on_and_how_it_ended(tmp_path):
    with recorded_run(str(tmp_path)) as recorder:
        recorder.update(STATE)
        meanwhile = latest_run(str(tmp_path))
        recorder.close("complete")
    assert meanwhile.ended == "running"
    assert (meanwhile.samples, meanwhile.samples_per_s, meanwhile.shards_done) == (100, 10.0, 2)
    assert meanwhile.measures == Measures(95, 9.0, 10.0)
    assert latest_run(str(tmp_path)).ended == "complete"
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "terminated"),
        (MemoryError(), "failed: MemoryError"),
    ],
)
def test_what_ended_a_run_early_is_recorded_and_passed_on(tmp_path, error, ended):
    with pytest.raises(type(error)), recorded_run(str(tmp_path)) as recorder:
        recorder.update(STATE)
        raise error
    assert latest_run(str(tmp_path)).ended == ended


def test_a_record_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "runs").write_text("a file in the way")
    with recorded_run(str(tmp_path)) as recorder:
        recorder.update(STATE)
        recorder.close("complete")
    assert (tmp_path / "runs").read_text() == "a file in the way"


def test_a_run_that_never_began_leaves_no_record(tmp_path):
    with recorded_run(str(tmp_path)) as recorder:
        recorder.close("complete")
    assert latest_run(str(tmp_path)) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"measures": 3}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "20260101T000000Z-1.json").write_text(content)
    assert latest_run(str(tmp_path)) is None


def test_a_record_survives_its_way_through_json(tmp_path):
    with recorded_run(str(tmp_path)) as recorder:
        recorder.update(STATE)
        record = latest_run(str(tmp_path))
    assert record_from(json.loads(record.as_json())) == record
