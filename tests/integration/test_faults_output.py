"""Output folders that are full, forbidden, shared, torn or of another configuration."""

import os
import subprocess
from contextlib import contextmanager

import pytest
from accounts import audit
from faults import Fault

from pipeline.errors import OutputError


@pytest.fixture
def small_disk(tmp_path):
    """OUT on a disk of its own, of so many kilobytes; returns a function that sets its size."""
    out = tmp_path / "out"
    out.mkdir()

    def resize(kilobytes, *options):
        chosen = ",".join([f"size={kilobytes}k", *options])
        command = ["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", str(out)]
        return subprocess.run(command, capture_output=True, check=False)

    if os.geteuid() or resize(32).returncode:
        pytest.skip("a disk of its own can only be mounted by root")
    yield lambda kilobytes: resize(kilobytes, "remount").check_returncode()
    subprocess.run(["umount", "--lazy", str(out)], check=True)


def test_a_full_disk_stops_the_job_and_once_there_is_room_a_rerun_completes(
    machines, struck_job, small_disk, tmp_path, fault_table
):
    machines()
    names = [f"{number:02d}" for number in range(12)]
    with pytest.raises(OutputError, match=rf"{tmp_path}.*No space left on device"):
        struck_job(names, workers=1)
    tars = sorted((tmp_path / "in").iterdir())
    full = audit(tmp_path / "out", tars)
    assert full.shards_left > 0
    assert full.temporary_files == 0
    small_disk(4096)
    result, log, accounts = struck_job(names, workers=1)
    assert result.complete, log
    assert accounts.shards_done == 12
    fault_table("disk full", "a tmpfs of 32 KiB; before more room", full)
    fault_table("disk full", "the same, after room was made and a rerun", accounts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "told"),
    [("file_size_limit", "File too large"), ("not_root", "Permission denied|Operation not permitted")],
)
def test_a_worker_that_may_not_write_stops_the_job_with_path_and_cause_and_a_rerun_completes(
    action, told, machines, struck_job, tmp_path, fault_table
):
    if action == "not_root" and os.geteuid():
        pytest.skip("only root can give up its rights")
    machines()
    with pytest.raises(OutputError, match=rf"{tmp_path}/out.*({told})"):
        struck_job([*"abc"], Fault("b", "middle", action), workers=1)
    stopped = audit(tmp_path / "out", sorted((tmp_path / "in").iterdir()))
    result, log, accounts = struck_job([*"abc"], workers=1)
    assert result.complete, log
    assert accounts.shards_done == 3
    how = {"file_size_limit": "RLIMIT_FSIZE in the worker", "not_root": "seteuid(nobody) in the worker"}[
        action
    ]
    fault_table(f"{told.split('|')[0].lower()} on the output", f"{how}; before the rerun", stopped)
    fault_table(f"{told.split('|')[0].lower()} on the output", f"{how}; after the rerun", accounts)


def test_an_output_folder_that_may_not_be_written_is_told_before_any_worker_starts(word_command, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    process, _ = word_command(["a"])
    assert process.wait(timeout=120) == 2
    log = (tmp_path / "log").read_text()
    assert log.count("\n") == 1, log
    assert f"{tmp_path}/out" in log


@pytest.mark.slow
def test_two_jobs_on_one_output_at_once_do_no_harm(machines, word_command, tmp_path, fault_table):
    machines(2)
    names = [f"{number:02d}" for number in range(30)]
    settings = {"seconds_per_sample": 0.05, "run": {"workers": 1}}
    processes = [word_command(names, **settings)[0] for _ in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0], (tmp_path / "log").read_text()
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
    assert process.wait(timeout=120) == 1
    assert "changed: masks.rule, masks.value" in (tmp_path / "log").read_text()
    assert audit(tmp_path / "out", tars) == before
    process, tars = word_command([*"abc"], output={"on_mismatch": "overwrite"}, **changed)
    assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
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
