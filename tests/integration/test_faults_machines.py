"""Machines that are lost, and memory that runs out."""

import re
from pathlib import Path

import pytest

from tests.helpers.accounts import audit
from tests.helpers.faults import Fault, marks
from tests.helpers.waiting import PATIENCE_S, wait_until


def wait_for_mark(tmp_path, mark, process):
    wait_until(lambda: mark in marks(tmp_path / "marks"), (tmp_path / "log").read_text, process)


@pytest.mark.slow
def test_a_machine_lost_in_mid_shard_is_no_failed_attempt_and_another_machine_does_the_rest(
    cluster, machines, word_command, tmp_path, fault_table
):
    lost = machines()
    process, tars = word_command(
        [*"abcd"],
        Fault("b", "middle", "hang"),
        # one attempt per shard: counting the loss as one would give the shard up
        run={"workers": 1, "max_attempts": 1},
    )
    wait_for_mark(tmp_path, "b-middle", process)
    cluster.remove_node(lost, allow_graceful=False)
    machines()
    assert process.wait(timeout=PATIENCE_S) == 0, (tmp_path / "log").read_text()
    assert re.search(
        r"Machine \S+ lost; other workers redo its shards.* in flight: .*/b.tar",
        (tmp_path / "log").read_text(),
    )
    accounts = audit(tmp_path / "out", tars)
    assert accounts.shards_done == 4
    fault_table(
        "machine lost in mid-shard and replaced",
        "SIGKILL of its raylet: Cluster.remove_node, add_node",
        accounts,
    )


@pytest.mark.slow
def test_while_a_machine_is_lost_another_one_goes_on(cluster, machines, word_command, tmp_path, fault_table):
    lost, _ = machines(), machines()
    names = [f"{number:02d}" for number in range(20)]
    process, tars = word_command(
        names,
        Fault("00", "middle", "kill"),
        seconds_per_sample=0.2,
        run={"workers": 2, "max_attempts": 2},
    )
    wait_for_mark(tmp_path, "00-middle", process)
    cluster.remove_node(lost, allow_graceful=False)
    assert process.wait(timeout=PATIENCE_S) == 0, (tmp_path / "log").read_text()
    accounts = audit(tmp_path / "out", tars)
    assert accounts.shards_done == 20
    fault_table(
        "one machine of two lost, a worker killed besides", "SIGKILL of a raylet and of a worker", accounts
    )


@pytest.mark.slow
def test_a_shard_that_takes_its_machine_down_each_time_is_given_up_in_the_end(
    machines, word_command, tmp_path, fault_table
):
    for _ in range(8):
        machines()
    process, tars = word_command(
        [*"abc"], Fault("b", "middle", "kill_machine", times=99), run={"workers": 1, "max_attempts": 1}
    )
    assert process.wait(timeout=PATIENCE_S) == 3, (tmp_path / "log").read_text()
    accounts = audit(tmp_path / "out", tars)
    assert [shard.split("-")[0] for shard in accounts.failed] == ["b"]
    assert accounts.shards_done == 2
    fault_table("shard takes its machine down each time", "SIGKILL of the raylet above the worker", accounts)


@pytest.mark.slow
def test_a_worker_that_rays_memory_monitor_kills_is_replaced(machines, word_command, tmp_path, fault_table):
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kilobytes = {line[0]: int(line[1]) for line in lines}
    share = 1 - (kilobytes["MemAvailable:"] - (4 << 20)) / kilobytes["MemTotal:"]
    if share > 0.9:
        pytest.skip("needs 4 GB of free memory")
    environment = {
        "RAY_ADDRESS": "",
        "RAY_memory_usage_threshold": f"{share:.3f}",
        "RAY_memory_monitor_refresh_ms": "100",
    }
    process, tars = word_command(
        [*"abcd"], Fault("b", "middle", "hog"), run={"workers": 1}, environment=environment
    )
    assert process.wait(timeout=PATIENCE_S) == 0, (tmp_path / "log").read_text()
    assert marks(tmp_path / "marks") == {"b-middle": 1}
    log = (tmp_path / "log").read_text()
    assert re.search(r"Worker on \S+ lost \(.* killed due to the node running low on memory", log)
    accounts = audit(tmp_path / "out", tars)
    assert accounts.shards_done == 4
    fault_table("ray's memory monitor kills a worker", "allocates until RAY_memory_usage_threshold", accounts)
