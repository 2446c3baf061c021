"""A job is stopped, killed, redone and given another list: at each moment all readers find the same rows."""

import os
import signal

import pytest

from tests.helpers.faults import Fault
from tests.helpers.output_readers import assert_all_readers_find, rows_by_reader
from tests.helpers.waiting import PATIENCE_S, TEST_PATIENCE_S, descendants, wait_until

NAMES = [f"s{number}" for number in range(8)]


def stopped_in_mid_run(process, condition, log):
    """Stop all processes of a run once a condition holds; return their ids."""
    wait_until(condition, log.read_text, process)
    # the driver first, so that it does not replace stopped workers
    pids = [process.pid, *descendants(process.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


@pytest.mark.slow
@pytest.mark.timeout(TEST_PATIENCE_S)
def test_at_every_moment_all_readers_find_the_same_rows_and_in_the_end_those_of_every_shard(
    word_command, tmp_path
):
    out, log = tmp_path / "out", tmp_path / "log"

    def published():
        return {path.name.split("-")[0] for path in (out / "annotations").glob("*.parquet")}

    # each run is stopped while a shard is held
    first, tars = word_command(NAMES, Fault("s7", "begin", "wait_for_go"), samples=30)
    stopped = stopped_in_mid_run(first, lambda: len(published()) >= 2, log)
    assert_all_readers_find(out)
    assert len(published()) < len(NAMES)
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)
    first.wait(PATIENCE_S)
    assert_all_readers_find(out)

    redone = sorted(published())[0]
    os.utime(tmp_path / "in" / f"{redone}.tar", (1, 1))
    again, _ = word_command(NAMES, Fault(redone, "begin", "wait_for_go"), samples=30)
    stopped = stopped_in_mid_run(again, lambda: list((out / "unlisted").glob(f"{redone}-*.moved")), log)
    assert redone not in published()
    assert_all_readers_find(out)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    (tmp_path / "go").touch()
    assert again.wait(PATIENCE_S) == 0, log.read_text()
    assert "changed since they were annotated and are annotated again" in log.read_text()
    assert_all_readers_find(out)
    rows_of_all = rows_by_reader(out)["status"]
    assert published() == set(NAMES)

    fewer, _ = word_command(NAMES[:6], samples=30)
    assert fewer.wait(PATIENCE_S) == 0, log.read_text()
    assert published() == set(NAMES[:6])
    assert_all_readers_find(out, rows_of_all * 6 // 8)
    assert len(tars) == 8
