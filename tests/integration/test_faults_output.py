"""Output folders that are full, forbidden, shared, torn or of another configuration."""

import multiprocessing
import os
import re
import subprocess
from contextlib import contextmanager

import pytest

from pipeline.errors import OutputError
from pipeline.run.job import looked_at_again, prepare_job
from pipeline.run.outcome import JobResult, concluded, first_state
from pipeline.run.worker import Worker
from tests.helpers.accounts import audit
from tests.helpers.corpus import demo_job, write_word_shards
from tests.helpers.faults import Fault, Faults, WordAnnotator, annotate_all, struck_by
from tests.helpers.waiting import PATIENCE_S


@pytest.fixture
def small_disk(tmp_path):
    """OUT on a disk of its own of 32 KiB; returns a function that mounts it again with other options."""
    out = tmp_path / "out"
    out.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(out)]
        return subprocess.run(command, capture_output=True, check=False)

    if os.geteuid() or mount("size=32k").returncode:
        pytest.skip("a disk of its own can only be mounted by root")
    yield lambda options: mount(f"remount,{options}").check_returncode()
    subprocess.run(["umount", "--lazy", str(out)], check=True)


@pytest.fixture
def annotate_here(tmp_path):
    """Runs a worker in this process over what is left of a job; returns its outcomes and the accounts."""

    def run():
        tars = write_word_shards(tmp_path / "in", [f"{number:02d}" for number in range(12)], 6)
        job = prepare_job(demo_job(tars, tmp_path / "out"))
        no_faults = Faults([], tmp_path)
        worker = Worker(
            job.config,
            job.metadata,
            cpus=1,
            device="cpu",
            factory=lambda config, metadata, cpus, device: WordAnnotator(
                config, metadata, no_faults, 0.0, tmp_path / "begun"
            ),
        )
        worker.load()
        outcomes = [worker.annotate(shard) for shard in job.todo]
        return outcomes, audit(tmp_path / "out", tars)

    return run


def test_on_a_full_disk_no_half_file_is_left_and_once_there_is_room_the_rest_is_done(
    annotate_here, small_disk, tmp_path, fault_table
):
    outcomes, full = annotate_here()
    assert {outcome.status for outcome in outcomes} == {"done", "output"}
    for outcome in outcomes:
        if outcome.status == "output":
            assert re.search(
                rf"{tmp_path}/out/\S+: cannot be written: .*No space left on device", outcome.message
            )
    assert 0 < full.shards_left < 12
    assert full.temporary_files == 0
    small_disk("size=4m")
    outcomes, roomy = annotate_here()
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert roomy.shards_done == 12
    fault_table("disk full", "a tmpfs of 32 KiB; before there was room", full)
    fault_table("disk full", "the same, after there was room and a rerun", roomy)


def test_on_a_disk_that_turns_read_only_nothing_is_lost(annotate_here, small_disk, tmp_path, fault_table):
    small_disk("size=4m")
    tars = write_word_shards(tmp_path / "in", [f"{number:02d}" for number in range(12)], 6)
    prepare_job(demo_job(tars, tmp_path / "out"))
    small_disk("ro")
    with pytest.raises(OutputError, match=rf"{tmp_path}/out/job.json: cannot be written: .*Read-only"):
        annotate_here()
    small_disk("rw")
    _, accounts = annotate_here()
    assert accounts.shards_done == 12
    fault_table("disk turns read-only", "a tmpfs mounted again with ro, then rw and a rerun", accounts)


@pytest.mark.slow
def test_a_full_disk_stops_the_whole_job_and_once_there_is_room_a_rerun_completes(
    machines, struck_job, small_disk, tmp_path, fault_table
):
    machines()
    names = [f"{number:02d}" for number in range(12)]
    with pytest.raises(OutputError, match=rf"{tmp_path}.*No space left on device"):
        struck_job(names, workers=1)
    tars = sorted((tmp_path / "in").iterdir())
    full = audit(tmp_path / "out", tars)
    assert full.shards_left > 0
    small_disk("size=4m")
    result, log, accounts = struck_job(names, workers=1)
    assert result.complete, log
    assert accounts.shards_done == 12
    fault_table(
        "disk full, whole job on ray", "a tmpfs of 32 KiB; after there was room and a rerun", accounts
    )


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("action", "cause"), [("file_size_limit", "File too large"), ("not_root", "Permission denied")]
)
def test_a_process_that_may_not_write_says_path_and_cause_and_leaves_no_half_file(
    action, cause, struck_worker, tmp_path, capfd, fault_table
):
    if action == "not_root" and os.geteuid():
        pytest.skip("only root can give up its rights")
    code, left_behind = struck_worker([*"abc"], Fault("b", "middle", action))
    assert code == 1
    assert re.search(rf"{tmp_path}/out/errors/b-\S+: cannot be written: .*{cause}", capfd.readouterr().err)
    assert (left_behind.shards_done, left_behind.temporary_files) == (1, 0)
    code, accounts = struck_worker([*"abc"])
    assert (code, accounts.shards_done) == (0, 3)
    how = {"file_size_limit": "setrlimit(RLIMIT_FSIZE)", "not_root": "seteuid(nobody)"}[action]
    fault_table(f"{cause.lower()} on the output, another goes on", f"{how}, without ray", accounts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "message"),
    [("file_size_limit", "File too large"), ("not_root", "Permission denied|Operation not permitted")],
)
def test_a_worker_that_may_not_write_stops_the_job_with_path_and_cause_and_a_rerun_completes(
    action, message, machines, struck_job, tmp_path, fault_table
):
    if action == "not_root" and os.geteuid():
        pytest.skip("only root can give up its rights")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        # what may not be written may still be read
        folder.chmod(0o755)
    machines()
    with pytest.raises(OutputError, match=rf"{tmp_path}/out.*({message})"):
        struck_job([*"abc"], Fault("b", "middle", action), workers=1)
    stopped = audit(tmp_path / "out", sorted((tmp_path / "in").iterdir()))
    result, log, accounts = struck_job([*"abc"], workers=1)
    assert result.complete, log
    assert accounts.shards_done == 3
    how = {"file_size_limit": "RLIMIT_FSIZE in the worker", "not_root": "seteuid(nobody) in the worker"}[
        action
    ]
    fault_table(f"{message.split('|')[0].lower()} on the output", f"{how}; before the rerun", stopped)
    fault_table(f"{message.split('|')[0].lower()} on the output", f"{how}; after the rerun", accounts)


def test_an_output_folder_that_cannot_be_one_is_reported_before_any_worker_starts(struck_job, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match=rf"{tmp_path}/out.*Not a directory"):
        struck_job(["a"])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_of_two_jobs_that_write_the_same_shards_at_once_no_torn_pair_passes_for_done(tmp_path, fault_table):
    tars = write_word_shards(tmp_path / "in", [f"{number:03d}" for number in range(60)], 6)
    jobs = [prepare_job(demo_job(tars, tmp_path / "out")) for _ in range(2)]
    (tmp_path / "marks").mkdir()
    # the first job waits between its two files until the other one has published both of its own
    factory = struck_by(Fault("030", "between", "wait_for_rival"), marks_folder=tmp_path / "marks")
    fork = multiprocessing.get_context("fork").Process
    processes = [fork(target=annotate_all, args=(job, factory)) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0, 0]
    job = looked_at_again(jobs[0])
    torn = concluded(job, JobResult(first_state(job))).torn
    assert tars[30].as_uri() in torn
    again = fork(target=annotate_all, args=(looked_at_again(job), factory))
    again.start()
    again.join(PATIENCE_S)
    assert concluded(looked_at_again(job), JobResult(first_state(looked_at_again(job)))).complete
    accounts = audit(tmp_path / "out", tars)
    assert (accounts.shards_done, accounts.temporary_files) == (60, 0)
    fault_table("two jobs write the same shards", f"two processes; {len(torn)} torn pairs redone", accounts)


@pytest.mark.slow
def test_two_jobs_on_one_output_at_once_do_no_harm(machines, word_command, tmp_path, fault_table):
    machines(2)
    names = [f"{number:02d}" for number in range(30)]
    settings = {"seconds_per_sample": 0.05, "run": {"workers": 1}}
    processes = [word_command(names, **settings)[0] for _ in range(2)]
    assert [process.wait(timeout=PATIENCE_S) for process in processes] == [0, 0], (
        tmp_path / "log"
    ).read_text()
    accounts = audit(tmp_path / "out", sorted((tmp_path / "in").iterdir()))
    assert (accounts.shards_done, accounts.shards_left) == (30, 0)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    fault_table("two jobs on one output", "two drivers at once, 30 shards", accounts)


@pytest.mark.slow
def test_a_changed_configuration_is_refused_and_with_overwrite_replaces_everything(
    machines, struck_job, word_command, tmp_path, fault_table
):
    machines()
    result, log, before = struck_job([*"abc"], workers=1)
    assert result.complete, log
    changed = {
        "masks": {"rule": "fixed", "value": 0.25},
        "run": {"workers": 1},
    }
    process, tars = word_command([*"abc"], **changed)
    assert process.wait(timeout=PATIENCE_S) == 1
    message = (tmp_path / "log").read_text()
    assert "masks.rule: " in message
    assert "before, " in message
    assert "masks.value: " in message
    assert audit(tmp_path / "out", tars) == before
    process, tars = word_command([*"abc"], output={"on_mismatch": "overwrite"}, **changed)
    assert process.wait(timeout=PATIENCE_S) == 0, (tmp_path / "log").read_text()
    after = audit(tmp_path / "out", tars)
    assert after.shards_done == 3
    fault_table("configuration changed between runs", "refused; then output.on_mismatch=overwrite", after)


@contextmanager
def away(path):
    elsewhere = path.rename(path.with_suffix(".away"))
    yield
    elsewhere.rename(path)


@pytest.mark.slow
def test_a_shard_that_vanishes_after_it_was_listed_is_given_up_and_done_when_it_is_back(
    machines, struck_job, tmp_path, fault_table
):
    machines()
    result, log, accounts = struck_job(
        [*"abc"], meanwhile=lambda tars: away(tars[1]), workers=1, max_attempts=2
    )
    assert [url.rsplit("/", 1)[1] for url, _ in result.failed] == ["b.tar"], log
    fault_table("shard cannot be opened", "unlinked after it was listed; 2 attempts", accounts)
    result, log, accounts = struck_job([*"abc"], workers=1)
    assert result.complete, log
    assert accounts.failed == ()
    fault_table("shard cannot be opened", "the same, after it was back and a rerun", accounts)
