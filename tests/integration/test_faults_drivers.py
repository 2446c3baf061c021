"""Drivers that are killed, terminated, pointed to a cluster that does not answer, or given hopeless data."""

import os
import re
import signal
import socket

import pytest

from pipeline.errors import UserError
from tests.helpers.accounts import audit
from tests.helpers.faults import Fault, marks
from tests.helpers.waiting import PATIENCE_S, descendants, published, wait_until

NAMES = [f"{number:02d}" for number in range(12)]


# the first run never gets past this one; where there was such a blow before, the second one does
HELD = Fault("06", "middle", "hang")


def wait_for_mid_run(tmp_path, process):
    """Return once a shard is published and another one will never be."""
    log = tmp_path / "log"
    wait_until(
        lambda: published(tmp_path / "out") and marks(tmp_path / "marks") == {"06-middle": 1},
        log.read_text,
        process,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_driver_ended_on_a_cluster_that_lives_on_leaves_what_a_rerun_at_once_completes(
    number, exit_code, machines, word_command, tmp_path, fault_table
):
    machines(2)
    settings = {"run": {"workers": 1}}
    process, tars = word_command(NAMES, HELD, **settings)
    wait_for_mid_run(tmp_path, process)
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE_S) == exit_code, (tmp_path / "log").read_text()
    again, _ = word_command(NAMES, **settings)
    assert again.wait(timeout=PATIENCE_S) == 0, (tmp_path / "log").read_text()
    accounts = audit(tmp_path / "out", tars)
    assert accounts.shards_done == len(NAMES)
    assert 1 <= int(re.findall(r"(\d+) done before", (tmp_path / "log").read_text())[-1]) < len(NAMES)
    fault_table("driver ended, rerun at once", f"{number.name} to the driver; the cluster lives on", accounts)


@pytest.mark.slow
def test_a_killed_cluster_head_ends_the_driver_and_a_rerun_completes(word_command, tmp_path, fault_table):
    settings = {"run": {"workers": 1}, "environment": {"RAY_ADDRESS": ""}}
    process, tars = word_command(NAMES, HELD, **settings)
    wait_for_mid_run(tmp_path, process)
    servers = [child for child, command in descendants(process.pid).items() if "gcs_server" in command]
    os.kill(servers[0], signal.SIGKILL)
    assert process.wait(timeout=PATIENCE_S) != 0
    assert audit(tmp_path / "out", tars).shards_left > 0
    again, _ = word_command(NAMES, **settings)
    assert again.wait(timeout=PATIENCE_S) == 0, (tmp_path / "log").read_text()
    accounts = audit(tmp_path / "out", tars)
    assert accounts.shards_done == len(NAMES)
    fault_table("head of the cluster killed, rerun", "SIGKILL of gcs_server", accounts)


def test_a_cluster_that_does_not_answer_is_an_error_of_one_line_at_once(struck_job, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(
        UserError, match=rf"^cannot connect to a Ray cluster at {address} \(connection refused\); .*$"
    ):
        struck_job(["a"])


@pytest.mark.slow
def test_more_errors_than_the_budget_stop_the_job_and_name_the_kinds(machines, struck_job, fault_table):
    machines()
    # one shard is never done: the job ends although it is left
    held = Fault("05", "begin", "hang")
    result, _, accounts = struck_job(NAMES[:6], held, samples=600, workers=1, error_budget=0.1)
    assert re.fullmatch(
        r"\d+ of \d+ samples failed; run.error_budget is 0.1 "
        r"\(caption/missing_caption [\d,]+, for example \w+\); "
        r"\d shard\(s\) above it, worst first: \S+ \([\d,]+ of 600\), .*",
        result.stopped,
    )
    assert not result.complete
    assert accounts.in_left_shards > 0
    fault_table(
        "more errors than the budget", "a fifth of all captions empty, run.error_budget 0.1", accounts
    )
