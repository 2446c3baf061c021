"""How a person reads the status of an output folder."""

import io
import re
from dataclasses import replace

import pytest

from pipeline.cli.status import render_status
from pipeline.console import PrintableConsole
from pipeline.output.counts import ShardCounts
from pipeline.output.folder import OutputFolder, new_run_id
from pipeline.output.measures import Measures
from pipeline.output.runs import RunRecord, RunState, recorded_run
from pipeline.output.status import OutputStatus, read_status
from pipeline.run.job import prepare_job
from tests.helpers.corpus import demo_job, write_corpus

RUN = RunRecord(
    started="2026-01-01T10:00:00+00:00",
    updated="2026-01-01T12:00:00+00:00",
    ended="running",
    elapsed_s=7200.0,
    shards_done=1234,
    samples=1_234_567,
    samples_per_s=171.5,
    measures=Measures(images_decoded=1_234_000, device_busy_s=6800.0, ready_s=7000.0),
    workers=8,
    workers_wanted=10,
    workers_lost=12,
    left_alone=("10.0.0.7, GPU 3: 3 workers lost with shards that others finished",),
)
STATUS = OutputStatus(
    shards_total=50_000,
    done=tuple(f"shard-{number}" for number in range(1234)),
    damaged=(("s3://bucket/cut.tar", "read/truncated: the archive ends in a member, at byte 512"),),
    failed=(
        ("s3://" + "a-very-long-bucket/" * 6 + "000001.tar", "the worker died: " + "out of memory " * 12),
    ),
    left=tuple(f"left-{number}" for number in range(48_765)),
    mismatched=(("torn-shard-" + "x" * 90, "is not of the same attempt as its errors file"),),
    counts=ShardCounts(
        annotated=12_000_000,
        empty=3_000,
        failed=45_000,
        rows=31_000_000,
        errors_by_kind={"decode/truncated": 40_000, "caption/not_utf8": 5_000},
        error_examples={"decode/truncated": "000123"},
    ),
    shortfall="45000 of 12048000 samples failed",
    succeeded=False,
    run=RUN,
)


def shown(status, width=80):
    screen = io.StringIO()
    PrintableConsole(file=screen, width=width).print(render_status(status))
    return screen.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_a_status_fits_the_screen_and_keeps_its_figures_whole(width):
    text = shown(STATUS, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for line in (
        "incomplete",
        "50,000: 1,234 done, 1 damaged, 1 failed, 48,765 left",
        "12,048,000: 12,000,000 annotated, 3,000 empty, 45,000 failed",
        "31,000,000",
        "1,234,567 samples (171.5/s)",
        "1,234,000 images decoded",
        "workers 8 of 10, 12 lost",
        "places left alone",
        "10.0.0.7, GPU 3: 3 workers lost with shards that others finished",
        "device busy 97 %, pace set by the device",
        "decode/truncated  40,000, for example 000123",
        "s3://bucket/cut.tar",
        "read/truncated: the archive ends in a member, at byte 512",
        "caption/not_utf8  5,000",
    ):
        assert line in text


def test_nothing_of_a_long_name_or_message_is_cut_off():
    unbroken = "".join(shown(STATUS).split())
    assert "".join(STATUS.failed[0][0].split()) in unbroken
    assert "".join(STATUS.failed[0][1].split()) in unbroken
    assert STATUS.mismatched[0][0] in unbroken


def test_a_record_without_the_number_of_workers_wanted_shows_those_that_were_ready():
    run = RUN.model_copy(update={"workers_wanted": 0, "workers_lost": 0, "left_alone": ()})
    text = shown(replace(STATUS, run=run))
    assert "workers 8\n" in re.sub(" +\n", "\n", text)
    assert "left alone" not in text


def test_a_run_that_still_says_running_shows_its_last_update():
    assert "running, last update at 2026-01-01T12:00:00" in " ".join(shown(STATUS).split())


def test_a_status_without_a_run_shows_none(tmp_path):
    prepare_job(demo_job(write_corpus(tmp_path / "in", 2, 1), tmp_path / "out"))
    status = read_status(str(tmp_path / "out"))
    assert status.run is None
    assert "last run" not in shown(status)


def test_the_newest_run_is_shown(tmp_path):
    prepare_job(demo_job(write_corpus(tmp_path / "in", 2, 1), tmp_path / "out"))
    with recorded_run(OutputFolder(str(tmp_path / "out"), new_run_id())) as recorder:
        recorder.update(RunState(shards_total=2, shards_skipped=0, shards_done=1))
        recorder.close("stopped early: too many errors")
    assert "stopped early: too many errors" in shown(read_status(str(tmp_path / "out")))
