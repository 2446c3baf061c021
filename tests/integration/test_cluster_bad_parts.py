"""One bad part of a cluster stops nothing: machines that kill workers, loads and puts that fail."""

import re
import signal

import pytest

from pipeline.output.status import read_status
from tests.helpers.accounts import audit
from tests.helpers.faults import Fault, daemon_of, marks, workers_seen
from tests.helpers.waiting import PATIENCE_S, wait_until

NAMES = [f"{number:02d}" for number in range(90)]


@pytest.fixture
def finished(tmp_path):
    """Return a function that waits for the end of a job with an exit code; returns log and accounts."""

    def wait(process, tars, code=0):
        log = tmp_path / "log"
        assert process.wait(timeout=PATIENCE_S) == code, log.read_text()
        return log.read_text(), audit(tmp_path / "out", tars)

    return wait


@pytest.mark.slow
def test_a_machine_that_kills_each_worker_is_left_alone_and_every_shard_is_done(
    machines, word_command, finished, tmp_path, fault_table
):
    good, bad = machines(), machines()
    process, tars = word_command(
        NAMES,
        Fault("*", "middle", "kill", times=99, machine=daemon_of(bad)),
        seconds_per_sample=0.3,
        run={"max_attempts": 2, "shards_in_flight": 2},
    )
    log, accounts = finished(process, tars)
    assert accounts.shards_done == len(NAMES)
    (address,) = re.findall(r"Left alone for the rest of this run: (\S+): worker lost 3 times", log)
    assert address == bad.node_ip_address
    # each loss had at most two shards in flight
    assert sum(marks(tmp_path / "marks").values()) <= 6
    assert read_status(str(tmp_path / "out")).run.left_alone[0].startswith(address)
    assert daemon_of(good) in {worker.machine for worker in workers_seen(tmp_path)}
    fault_table("one machine of two kills every worker", "SIGKILL in mid-shard, each time", accounts)


def test_one_worker_that_cannot_load_does_not_end_the_job(machines, word_command, finished, fault_table):
    good, bad = machines(), machines()
    process, tars = word_command(
        NAMES[:6],
        Fault("*", "load", "raise", times=99, machine=daemon_of(bad)),
        seconds_per_sample=0.2,
    )
    log, accounts = finished(process, tars)
    assert accounts.shards_done == 6
    assert re.search(
        rf"A worker on {bad.node_ip_address} did not load the model \(OSError: .*Input/output", log
    )
    assert good.node_ip_address not in log
    fault_table("the model cannot be loaded on one machine of two", "EIO in the worker, each time", accounts)


@pytest.mark.slow
def test_one_put_that_fails_is_tried_again_elsewhere(machines, word_command, finished, fault_table):
    machines(), machines()
    process, tars = word_command(NAMES[:6], Fault("03", "annotations", "full_disk_once"))
    log, accounts = finished(process, tars)
    assert accounts.shards_done == 6
    assert re.search(r"03.tar: .*No space left on device; will be tried again", log)
    fault_table("one file cannot be written, once", "ENOSPC at its fsync", accounts)


@pytest.mark.slow
def test_sigterm_finishes_what_is_nearly_done_and_begins_nothing(
    machines, word_command, finished, tmp_path, fault_table
):
    machines()
    process, tars = word_command(
        NAMES[:6], seconds_per_sample=0.7, run={"shards_in_flight": 1, "drain_s": 60}
    )
    begun = lambda: sum(map(len, (worker.shards for worker in workers_seen(tmp_path))))  # noqa: E731
    wait_until(lambda: begun() == 2, (tmp_path / "log").read_text, process)
    process.send_signal(signal.SIGTERM)
    log, accounts = finished(process, tars, code=143)
    assert "Ending (terminated)" in log
    assert (begun(), accounts.shards_done) == (2, 2)
    assert not accounts.temporary_files
    fault_table("SIGTERM in mid-shard", "SIGTERM to the driver", accounts)
    (tmp_path / "log").write_text("")
    again, tars = word_command(NAMES[:6])
    log, accounts = finished(again, tars)
    assert accounts.shards_done == 6
