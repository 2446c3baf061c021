"""Workers killed, frozen or hanging at every step of annotating a shard: every sample is accounted for."""

import json
import re
import signal

import pytest

from tests.helpers.faults import Fault, marks

ONCE_EACH = {
    "in mid-shard": ("a", "middle", "kill"),
    "while the errors file is written": ("b", "errors", "kill"),
    "between the errors file and the annotations": ("c", "between", "kill"),
    "while the annotations file is written": ("d", "annotations", "kill"),
    "after both files, before the driver knows": ("e", "published", "kill"),
    "by a segmentation fault": ("f", "middle", "segfault"),
}


def failure_record(out, stem):
    return json.loads(next((out / "failed").glob(f"{stem}-*.json")).read_text())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("point", ONCE_EACH)
def test_a_process_that_ends_at_any_point_leaves_no_half_file_and_the_next_one_does_the_rest(
    point, struck_worker, tmp_path, fault_table
):
    shard, where, how = ONCE_EACH[point]
    number = {"kill": signal.SIGKILL, "segfault": signal.SIGSEGV}[how]
    code, left_behind = struck_worker([*"abcdefg"], Fault(shard, where, how))
    assert (code, marks(tmp_path / "marks")) == (-number, {f"{shard}-{where}": 1})
    published = "abcdefg".index(shard) + (where == "published")
    assert (left_behind.shards_done, left_behind.shards_left) == (published, 7 - published)
    assert left_behind.temporary_files == (where in ("errors", "annotations"))
    code, accounts = struck_worker([*"abcdefg"])
    assert (code, accounts.shards_done) == (0, 7)
    fault_table(f"process ends {point}, another goes on", f"{number.name}, without ray", accounts)


@pytest.mark.slow
@pytest.mark.parametrize("point", ONCE_EACH)
def test_a_worker_that_is_killed_once_costs_nothing(point, machines, struck_job, tmp_path, fault_table):
    machines()
    shard, where, how = ONCE_EACH[point]
    result, log, accounts = struck_job([*"abcdefg"], Fault(shard, where, how), workers=1, max_attempts=2)
    assert marks(tmp_path / "marks") == {f"{shard}-{where}": 1}
    assert result.complete, log
    assert (accounts.shards_done, accounts.annotated + accounts.empty + accounts.in_error) == (7, 42)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    fault_table(
        f"worker dies {point}", f"SIG{'SEGV' if how == 'segfault' else 'KILL'} in the worker", accounts
    )


@pytest.mark.slow
def test_poison_among_good_shards_and_a_loss_at_every_step_of_publishing_cost_only_the_poison_shard(
    machines, struck_job, tmp_path, fault_table
):
    machines(2)
    faults = [
        Fault(shard, point, "kill")
        for shard, point in (("b", "errors"), ("c", "between"), ("d", "published"))
    ]
    poison = Fault("poison", "middle", "segfault", times=99)
    names = ["a", "b", "c", "poison", "d", "e", "f", "g"]
    result, log, accounts = struck_job(names, poison, *faults, workers=2, max_attempts=2)
    assert marks(tmp_path / "marks").keys() == {"b-errors", "c-between", "d-published", "poison-middle"}
    assert [url.rsplit("/", 1)[1] for url, _ in result.failed] == ["poison.tar"], log
    assert (accounts.shards_done, accounts.in_failed_shards, accounts.shards_left) == (7, 6, 0)
    record = failure_record(tmp_path / "out", "poison")
    assert record["attempts"] == 2
    assert re.search("signal|SIGSEGV|connection error|exit", record["last_error"])
    assert not result.complete
    fault_table(
        "poison shard among good ones, others' workers die while they publish",
        "SIGSEGV each time; SIGKILL at fsync and after rename",
        accounts,
    )


@pytest.mark.slow
def test_a_frozen_worker_is_replaced_and_its_shards_are_done(machines, struck_job, tmp_path, fault_table):
    machines(2)
    result, log, accounts = struck_job(
        [*"abcd"], Fault("b", "middle", "freeze"), workers=1, stall_timeout_s=6.0
    )
    assert marks(tmp_path / "marks") == {"b-middle": 1}
    assert result.complete, log
    assert "finished no sample for 6 s" in log
    fault_table("worker freezes", "SIGSTOP in mid-shard, run.stall_timeout_s 6", accounts)


@pytest.mark.slow
def test_a_shard_that_hangs_its_worker_each_time_is_given_up_and_the_others_finish(
    machines, struck_job, tmp_path, fault_table
):
    machines()
    result, log, accounts = struck_job(
        [*"abcd"], Fault("b", "middle", "hang", times=9), workers=1, stall_timeout_s=6.0, max_attempts=2
    )
    assert [url.rsplit("/", 1)[1] for url, _ in result.failed] == ["b.tar"], log
    record = failure_record(tmp_path / "out", "b")
    assert (record["attempts"], "finished no sample" in record["last_error"]) == (2, True)
    assert accounts.shards_done == 3
    fault_table("shard hangs its worker each time", "a sleep without end in mid-shard", accounts)


@pytest.mark.slow
def test_a_shard_that_is_merely_slow_is_waited_for(machines, struck_job, fault_table):
    machines()
    result, log, accounts = struck_job(
        ["slow"], samples=12, seconds_per_sample=1.0, workers=1, stall_timeout_s=10.0
    )
    assert result.complete, log
    assert "finished no sample" not in log
    fault_table(
        "shard slower than the time-out", "1 s a sample, 12 samples, run.stall_timeout_s 10", accounts
    )
