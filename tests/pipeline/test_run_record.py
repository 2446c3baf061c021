"""What a run writes down about itself."""

import json
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.output.counts import ShardCounts
from pipeline.output.folder import OutputFolder, new_run_id
from pipeline.output.measures import Measures
from pipeline.output.records import as_json
from pipeline.output.runs import MAX_POINTS, RunState, latest_run, latest_runs, recorded_run

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


def test_a_run_reports_its_state_while_it_goes_on_and_how_it_ended(tmp_path):
    with recorded_run(OutputFolder(str(tmp_path), new_run_id())) as recorder:
        recorder.update(STATE)
        while (meanwhile := latest_run(OutputFolder(str(tmp_path)))) is None:
            time.sleep(0.01)
        recorder.close("complete")
    assert meanwhile.ended == "running"
    assert (meanwhile.samples, meanwhile.samples_per_s, meanwhile.shards_done) == (100, 10.0, 2)
    assert meanwhile.measures == Measures(95, 9.0, 10.0)
    assert latest_run(OutputFolder(str(tmp_path))).ended == "complete"
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
    with pytest.raises(type(error)), recorded_run(OutputFolder(str(tmp_path), new_run_id())) as recorder:
        recorder.update(STATE)
        raise error
    assert latest_run(OutputFolder(str(tmp_path))).ended == ended


def test_a_record_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "runs").write_text("a file in the way")
    with recorded_run(OutputFolder(str(tmp_path), new_run_id())) as recorder:
        recorder.update(STATE)
        recorder.close("complete")
    assert (tmp_path / "runs").read_text() == "a file in the way"


@pytest.mark.parametrize("error", [OSError("no space"), ValueError("a bug"), RuntimeError("and another")])
def test_whatever_fails_in_a_record_is_reported_once_and_ends_no_run(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr("pipeline.output.runs.INTERVAL_S", 0.0)
    folder = OutputFolder(str(tmp_path), new_run_id())

    def publish(*_args):
        raise error

    monkeypatch.setattr(OutputFolder, "publish", publish)
    with recorded_run(folder) as recorder:
        for _ in range(5):
            recorder.update(STATE)
        recorder.close("complete")
    assert caplog.text.count("cannot write the record of this run") == 1


def test_a_store_that_hangs_does_not_hold_a_run_up(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.output.runs.INTERVAL_S", 0.0)
    monkeypatch.setattr("pipeline.output.runs.LONGEST_WAIT_S", 0.01)
    over, begun = threading.Event(), []

    def publish(*_args):
        begun.append(1)
        over.wait()

    monkeypatch.setattr(OutputFolder, "publish", publish)
    with recorded_run(OutputFolder(str(tmp_path), new_run_id())) as recorder:
        for _ in range(5):
            recorder.update(STATE)
        recorder.close("complete")
    assert begun == [1]
    over.set()


def test_a_run_that_never_began_leaves_no_record(tmp_path):
    with recorded_run(OutputFolder(str(tmp_path), new_run_id())) as recorder:
        recorder.close("complete")
    assert latest_run(OutputFolder(str(tmp_path))) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"measures": 3}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "20260101T000000Z-1.json").write_text(content)
    assert latest_run(OutputFolder(str(tmp_path))) is None


def test_a_run_records_its_workers_and_the_places_left_alone(tmp_path):
    left_alone = ("10.0.0.7, GPU 3: 3 workers lost with shards that others finished",)
    with recorded_run(OutputFolder(str(tmp_path), new_run_id())) as recorder:
        recorder.update(replace(STATE, workers_wanted=8, workers_lost=3, left_alone=left_alone))
        recorder.close("complete")
    run = latest_run(OutputFolder(str(tmp_path)))
    assert (run.workers, run.workers_wanted, run.workers_lost) == (1, 8, 3)
    assert run.left_alone == left_alone


def test_a_record_of_an_earlier_version_is_read(tmp_path):
    with recorded_run(OutputFolder(str(tmp_path), new_run_id())) as recorder:
        recorder.update(STATE)
        recorder.close("complete")
    (path,) = (tmp_path / "runs").glob("*.json")
    document = json.loads(path.read_text())
    for added_since in ("workers_wanted", "workers_lost", "left_alone"):
        del document[added_since]
    path.write_text(json.dumps(document))
    run = latest_run(OutputFolder(str(tmp_path)))
    assert (run.workers, run.workers_wanted, run.workers_lost, run.left_alone) == (1, 0, 0, ())


def test_a_record_survives_its_way_through_json(tmp_path):
    with recorded_run(OutputFolder(str(tmp_path), new_run_id())) as recorder:
        recorder.update(STATE)
        recorder.close("complete")
        record = latest_run(OutputFolder(str(tmp_path)))
    (path,) = (tmp_path / "runs").iterdir()
    assert as_json(record.model_dump()) == path.read_bytes()
    assert all(isinstance(point, tuple) for point in record.history)


@settings(max_examples=20)
@given(steps_s=st.lists(st.floats(0.1, 100), min_size=1, max_size=900))
def test_the_history_is_bounded_rises_in_time_and_ends_with_the_newest_state(tmp_path_factory, steps_s):
    out, elapsed_s, samples = tmp_path_factory.mktemp("out"), 0.0, 0
    with recorded_run(OutputFolder(str(out), new_run_id())) as recorder:
        for step_s in steps_s:
            elapsed_s, samples = elapsed_s + step_s, samples + 7
            state = replace(STATE, elapsed_s=elapsed_s, counts=ShardCounts(annotated=samples))
            recorder.update(state)
        recorder.close("complete")
    history = latest_run(OutputFolder(str(out))).history
    times_s = [point[0] for point in history]
    assert history[0] == (0.0, 0)
    assert times_s == sorted(set(times_s))
    assert len(history) <= MAX_POINTS + 1
    assert history[-1] == (pytest.approx(elapsed_s, abs=0.06), samples)


def test_the_newest_runs_come_oldest_first_and_unreadable_ones_are_skipped(tmp_path):
    with recorded_run(OutputFolder(str(tmp_path), new_run_id())) as recorder:
        recorder.update(STATE)
        recorder.close("complete")
    (record,) = (tmp_path / "runs").glob("*.json")
    for name, samples in (("20250101T000000Z-1.json", 5), ("20250102T000000Z-1.json", 6)):
        document = json.loads(record.read_text()) | {"samples": samples}
        (tmp_path / "runs" / name).write_text(json.dumps(document))
    (tmp_path / "runs" / "20250103T000000Z-1.json").write_text("[1]")
    assert [run.samples for run in latest_runs(OutputFolder(str(tmp_path)), 9)[0]] == [5, 6, 100]
    assert [run.samples for run in latest_runs(OutputFolder(str(tmp_path)), 3)[0]] == [6, 100]
    (damaged,) = latest_runs(OutputFolder(str(tmp_path)), 9)[1]
    assert "runs/20250103T000000Z-1.json: " in damaged
