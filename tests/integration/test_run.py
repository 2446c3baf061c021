"""Jobs on a local Ray: workers killed, runs interrupted, shards that kill workers; no row lost or doubled."""

import inspect
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import yaml

from pipeline.annotate.annotator import ShardAnnotator
from pipeline.console import PrintableConsole
from pipeline.errors import OutputError, UserError
from pipeline.output.status import read_status
from pipeline.run.job import prepare_job
from pipeline.run.progress import open_progress
from pipeline.run.runner import run_job
from pipeline.run.workforce import WorkersLost
from tests.helpers.accounts import audit
from tests.helpers.corpus import demo_job, write_corpus
from tests.helpers.light_annotator import LightAnnotator, dies_while_loading, light
from tests.helpers.waiting import PATIENCE_S, held_shard, wait_for_first_shard

LEGRAD = str(Path(sys.executable).with_name("legrad"))


def named_shards(folder, *names):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.tar" for name in names]
    for path in paths:
        # one that is written again is another version of itself
        if not path.exists():
            path.write_bytes(b"")
    return paths


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a job with the light annotator and returns its result and log."""

    def start(*names, factory=light, **settings):
        shards = named_shards(tmp_path / "in", *names)
        config = demo_job(
            shards, tmp_path / "out", run={"progress_interval_s": 0.1, "drain_s": 1.0, **settings}
        )
        with (
            (tmp_path / "log").open("w") as log,
            open_progress(PrintableConsole(file=log, width=200), 0.1) as progress,
        ):
            result = run_job(prepare_job(config), progress, factory)
        return result, (tmp_path / "log").read_text()

    return start


def published(out):
    return sorted(ds.dataset(out / "annotations", format="parquet").to_table()["key"].to_pylist())


def test_a_poison_shard_among_good_ones_is_given_up_and_all_others_finish(run, tmp_path):
    result, log = run("a", "b", "poison", "c", "d", "e", workers=1, max_attempts=2)
    assert published(tmp_path / "out") == ["a.tar", "b.tar", "c.tar", "d.tar", "e.tar"]
    assert [url.rsplit("/", 1)[1] for url, _ in result.failed] == ["poison.tar"]
    assert (result.state.shards_done, result.state.shards_failed, result.state.shards_left) == (5, 1, 0)
    assert not result.complete
    assert re.search(r"Worker on \S+ lost \(.+\)\. Shards in flight: .*poison.tar", log)
    status = read_status(str(tmp_path / "out"))
    assert (len(status.done), len(status.failed), len(status.left)) == (5, 1, 0)
    assert "worker lost" in status.failed[0][1]
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    failure = yaml.safe_load(next((tmp_path / "out" / "failed").iterdir()).read_text())
    assert failure["attempts"] == 2


def test_a_rerun_does_only_what_is_left_and_then_the_job_succeeds(run, tmp_path):
    first, _ = run("a", "unreadable", "bug", workers=1, max_attempts=1)
    assert (first.state.shards_done, first.state.shards_failed) == (1, 2)
    assert any("connection refused" in message for _, message in first.failed)
    assert any("ZeroDivisionError" in message for _, message in first.failed)
    before = next((tmp_path / "out" / "annotations").glob("a-*")).stat().st_mtime_ns
    second, _ = run("a", "b", workers=1)
    assert (second.state.shards_skipped, second.state.shards_done) == (1, 1)
    assert next((tmp_path / "out" / "annotations").glob("a-*")).stat().st_mtime_ns == before
    assert second.complete
    assert yaml.safe_load((tmp_path / "out" / "_SUCCESS").read_text())["annotated"] == 2


@pytest.mark.slow
def test_a_full_disk_stops_the_job_with_the_cause(run):
    with pytest.raises(OutputError, match="No space left on device"):
        run("a", "full", workers=1)


def test_more_errors_than_the_budget_allows_stop_the_job_early(run, tmp_path):
    # the last shard is never done: the job ends although it is left
    names = [*[f"errors{index}" for index in range(3)], *[f"z{index}" for index in range(9)], "zheld"]
    result, _ = run(*names, workers=1, error_budget=0.5)
    assert re.match("4500 of 450[0-9] ", result.stopped)
    assert "decode/truncated 4,500" in result.stopped
    assert re.search(
        r"3 shard\(s\) above it, worst first: \S+/errors0.tar \(1,500 of 1,500\)", result.stopped
    )
    assert result.state.shards_left > 0


@pytest.mark.slow
def test_one_shard_of_errors_at_the_front_does_not_keep_a_job_from_the_others(run, tmp_path):
    result, _ = run("errors", "a", "b", "c", workers=1, error_budget=0.5)
    assert {"a.tar", "b.tar", "c.tar"} <= set(published(tmp_path / "out"))
    assert (result.state.shards_done, result.state.shards_left) == (4, 0)
    assert result.stopped.endswith("/errors.tar (1,500 of 1,500)")


@pytest.mark.slow
def test_a_budget_blown_by_the_last_shard_is_no_success(run, tmp_path):
    result, _ = run("errors", workers=1, error_budget=0.5)
    assert "1500 of 1500" in result.stopped
    assert not result.complete
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.slow
def test_the_same_command_redoes_shards_with_files_of_different_attempts(run, tmp_path):
    run("a", "b", workers=1)
    errors = sorted((tmp_path / "out" / "errors").iterdir())
    errors[0].write_bytes(b"torn")
    (tmp_path / "out" / "_SUCCESS").unlink()
    result, log = run("a", "b", workers=1)
    assert re.search(r"files of different attempts; annotating again: \S+/a.tar\n", log)
    assert (result.state.shards_done, result.complete) == (1, True)
    assert published(tmp_path / "out") == ["a.tar", "b.tar"]


@pytest.mark.slow
def test_too_many_failed_shards_stop_the_job_early(run):
    result, _ = run(
        *[f"unreadable{index}" for index in range(4)], workers=1, max_attempts=1, max_failed_shards=1
    )
    assert "run.max_failed_shards is 1" in result.stopped


@pytest.mark.slow
def test_workers_lost_while_loading_end_the_job(run):
    with pytest.raises(WorkersLost, match="3 workers in a row"):
        run("a", factory=dies_while_loading, workers=1)


def test_a_damaged_checkpoint_is_an_error_before_any_worker_starts(tmp_path):
    checkpoint = tmp_path / "weights.safetensors"
    checkpoint.write_bytes(b"no weights")
    model = {"name": "ViT-B-32", "pretrained": str(checkpoint)}
    config = demo_job(named_shards(tmp_path / "in", "a"), tmp_path / "out", model=model)
    with pytest.raises(UserError, match=r"ViT-B-32.*weights\.safetensors"):
        prepare_job(config)


@dataclass(frozen=True)
class Corpus:
    """Shards as a job lists them; the last one is not done before the file `go` is there."""

    shards: list
    go: Path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    *tars, last = write_corpus(folder, shards=6, samples_per_shard=40)
    return Corpus([*map(str, tars), held_shard(last, folder / "go")], folder / "go")


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """Rows of an undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    corpus.go.touch()
    finished = annotate(corpus, out)
    assert finished.wait(timeout=PATIENCE_S) == 0
    return rows_of(out)


@pytest.fixture
def begun(corpus, undisturbed, tmp_path):
    """A job in mid-run, until `corpus.go` is there: some shard is published, and the last one is not."""
    corpus.go.unlink(missing_ok=True)
    process = annotate(corpus, tmp_path / "out")
    wait_for_first_shard(tmp_path / "out", process, tmp_path / "log")
    yield process
    corpus.go.touch()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def annotate(corpus, out):
    config = demo_job(
        corpus.shards,
        out,
        input={"allow_commands": True},
        run={"workers": 1, "batch_size": 4, "progress_interval_s": 0.5, "drain_s": 1.0},
    )
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with (out.parent / "log").open("a") as log:
        return subprocess.Popen(
            [LEGRAD, "annotate", str(path)], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def rows_of(out):
    table = ds.dataset(out / "annotations", format="parquet").to_table(
        columns=["shard", "sample_index", "prompt_index", "key", "prompt", "area"]
    )
    return sorted(tuple(row.values()) for row in table.to_pylist())


def worker_pids(process):
    """Process ids of the workers below a driver process."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            names[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
    return [
        pid for pid, name in names.items() if "LegradWorker" in name and descends(pid, process.pid, parents)
    ]


def descends(pid, ancestor, parents):
    while pid in parents:
        if pid == ancestor:
            return True
        pid = parents[pid]
    return False


@pytest.fixture
def nothing_lost_or_doubled(corpus, undisturbed, fault_table):
    """Return a function that compares an output folder with the input and an undisturbed run."""

    def check(out, fault, injected_how):
        accounts = audit(out, corpus.shards)
        for (*row, area), (*expected_row, expected_area) in zip(rows_of(out), undisturbed, strict=True):
            assert row == expected_row
            # a sample's neighbours in its batch move it by a rounding error
            assert abs(area - expected_area) <= 3
        assert (out / "_SUCCESS").exists()
        assert read_status(str(out)).complete
        assert (accounts.samples_in, accounts.shards_done) == (240, 6)
        fault_table(fault, injected_how, accounts)

    return check


def test_a_worker_killed_in_mid_shard_costs_no_row_and_doubles_none(
    corpus, begun, tmp_path, nothing_lost_or_doubled
):
    out = tmp_path / "out"
    pids = worker_pids(begun)
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)
    corpus.go.touch()
    assert begun.wait(timeout=PATIENCE_S) == 0, (tmp_path / "log").read_text()
    assert re.search(r"Worker on \S+ lost", (tmp_path / "log").read_text())
    nothing_lost_or_doubled(out, "worker killed in mid-shard, real model", "SIGKILL to the worker")


@pytest.mark.slow
def test_ctrl_c_then_the_same_command_again_costs_no_row_and_doubles_none(
    corpus, begun, tmp_path, nothing_lost_or_doubled
):
    out = tmp_path / "out"
    os.killpg(begun.pid, signal.SIGINT)
    assert begun.wait(timeout=PATIENCE_S) == 130, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "interrupted" in log
    assert "Traceback" not in log
    assert len(list((out / "annotations").glob("*.parquet"))) < 6
    corpus.go.touch()
    assert annotate(corpus, out).wait(timeout=PATIENCE_S) == 0
    nothing_lost_or_doubled(out, "Ctrl-C, rerun, real model", "SIGINT to the process group")


def test_sigterm_ends_with_its_own_exit_code_and_a_rerun_completes(
    corpus, begun, tmp_path, nothing_lost_or_doubled
):
    out = tmp_path / "out"
    begun.terminate()
    assert begun.wait(timeout=PATIENCE_S) == 143, (tmp_path / "log").read_text()
    corpus.go.touch()
    assert annotate(corpus, out).wait(timeout=PATIENCE_S) == 0
    nothing_lost_or_doubled(out, "driver ended, rerun, real model", "SIGTERM to the driver")


def test_a_driver_killed_with_9_leaves_what_a_rerun_completes(
    corpus, begun, tmp_path, nothing_lost_or_doubled
):
    out = tmp_path / "out"
    begun.kill()
    begun.wait(timeout=PATIENCE_S)
    corpus.go.touch()
    assert annotate(corpus, out).wait(timeout=PATIENCE_S) == 0
    nothing_lost_or_doubled(out, "driver killed, rerun, real model", "SIGKILL to the driver")


def test_the_real_annotator_and_the_light_one_keep_the_same_contract():
    for name in ("annotate", "wait_for_room", "progress", "abandon", "measures"):
        real, light_one = (
            list(inspect.signature(getattr(kind, name)).parameters)
            for kind in (ShardAnnotator, LightAnnotator)
        )
        assert real == light_one
