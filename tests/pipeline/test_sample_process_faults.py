"""Faults of sample processes: which error is raised, and that nothing is left behind."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import legrad
from pipeline.annotate.processes import PREPARE, ProcessDied, SampleProcesses
from pipeline.annotate.sample_work import WorkSettings
from pipeline.annotate.work_in_processes import WorkInProcesses
from pipeline.demo import assets
from pipeline.shards.images import WHOLE_IMAGE
from pipeline.shards.sample_error import SampleError
from tests.helpers import made_there
from tests.helpers.corpus import demo_job
from tests.helpers.deadly_transform import DiesWhenItArrives
from tests.helpers.made_there import MadeThere
from tests.helpers.waiting import wait_until

SOON_S = 120.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    model = legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers=2
    )
    config = demo_job([], tmp_path_factory.mktemp("out"))
    return WorkSettings(config, model.transform, WHOLE_IMAGE, None)


@pytest.fixture(scope="module")
def shared():
    processes = SampleProcesses(1, 2**30)
    yield processes
    processes.close()


@pytest.fixture
def run(shared, settings):
    """Run a task that is made in the only process of several tests."""
    return partial(asked, shared, settings)


def asked(processes, settings, make, *arguments):
    """Have an item made in a sample process; returns the message of its error."""
    ((outcome, _),) = processes.run(settings, PREPARE, MadeThere(make, arguments))
    return outcome.errors[0].message


def process_of(run):
    return int(run(made_there.process_id))


def children_of(pid):
    return [
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in path.read_text().split()
    ]


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def open_things(pid):
    """Open descriptors of a process, mappings of sample files, and its children with zombies."""
    maps = Path(f"/proc/{pid}/maps").read_text().count("memfd:samples")
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), maps, len(children_of(pid))


# ---------------------------------------------------------------- errors on their way


@pytest.mark.parametrize(
    ("make", "words"),
    [(made_there.raise_two_words, "TwoWordError: no masks"), (made_there.raise_locked, "LockedError")],
)
def test_an_error_that_cannot_be_sent_arrives_in_words_and_ends_no_process(run, make, words):
    before = process_of(run)
    with pytest.raises(RuntimeError, match=words) as caught:
        run(make)
    assert f"in {make.__name__}" in caught.value.__notes__[0]
    assert process_of(run) == before


def test_a_result_that_cannot_be_sent_is_a_bug_and_no_death(run):
    before = process_of(run)
    with pytest.raises(TypeError, match="cannot pickle"):
        run(made_there.locked_item)
    assert process_of(run) == before


def test_a_question_that_cannot_be_sent_is_raised_and_leaves_nothing_behind(run, shared, settings):
    launcher = parent_of(process_of(run))
    for _ in range(5):
        with pytest.raises(TypeError, match="cannot pickle"):
            shared.run(settings, PREPARE, threading.Lock())
    process_of(run)
    assert len(children_of(launcher)) == 1


@pytest.mark.slow
def test_settings_that_cannot_be_sent_leave_no_process_behind(settings):
    processes = SampleProcesses(1, 2**20)
    try:
        launcher = parent_of(process_of(partial(asked, processes, settings)))
        with pytest.raises(ProcessDied):
            processes.run(settings, PREPARE, DiesWhenItArrives())
        for _ in range(5):
            with pytest.raises(TypeError, match="cannot pickle"):
                processes.run(threading.Lock(), PREPARE, [])
        assert children_of(launcher) == []
    finally:
        processes.close()


def test_a_process_that_runs_out_of_address_space_is_replaced_when_a_task_no_longer_fits(
    run, shared, settings
):
    before = process_of(run)
    with pytest.raises(MemoryError):
        run(made_there.exhaust_address_space)
    with pytest.raises(ProcessDied, match="exit code 1"):
        shared.run(settings, PREPARE, np.zeros(2**28, np.uint8))
    assert process_of(run) != before


# ---------------------------------------------------------------- deaths


def test_a_process_that_died_while_it_was_idle_is_no_fault_of_the_next_task(run):
    for _ in range(3):
        pid = process_of(run)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_alive(pid), lambda: "it lives")
        assert process_of(run) != pid


def test_many_deaths_leave_no_descriptors_no_shared_files_and_no_zombies(run, shared, settings):
    def die(times):
        for _ in range(times):
            with pytest.raises(ProcessDied):
                shared.run(settings, PREPARE, [np.zeros(10**6), DiesWhenItArrives()])
        gc.collect()
        return process_of(run)

    launcher = parent_of(die(3))
    before = [open_things(pid) for pid in (os.getpid(), launcher)]
    assert parent_of(die(20)) == launcher
    assert [open_things(pid) for pid in (os.getpid(), launcher)] == before


@pytest.fixture
def own(settings):
    """Processes of one test, and what has an item made in them."""
    processes = SampleProcesses(2, 2**20)
    yield processes, partial(asked, processes, settings)
    processes.close()


def start_dawdling(run, folder, seconds):
    """Have a process take its time, in a thread; returns what it will answer."""
    started = folder / "started"
    hands = ThreadPoolExecutor(1)
    answer = hands.submit(run, made_there.dawdle, started, seconds)
    hands.shutdown(wait=False)
    wait_until(started.exists, lambda: "the task has not begun")
    return answer


@pytest.mark.slow
def test_a_launcher_that_is_killed_costs_no_task_whether_it_starts_or_waits_or_a_task_runs(own, tmp_path):
    processes, run = own
    os.kill(processes._launcher._popen.pid, signal.SIGKILL)
    first = process_of(run)
    launcher = parent_of(first)
    answer = start_dawdling(run, tmp_path, 1.0)
    os.kill(launcher, signal.SIGKILL)
    # the other place is free, and needs a launcher
    second = process_of(run)
    assert parent_of(second) != launcher
    assert int(answer.result(SOON_S)) == first
    # one without its launcher ends with the others
    processes.close()
    wait_until(lambda: not is_alive(first) and not is_alive(second), lambda: "they live")


def test_closing_ends_a_call_that_would_take_for_ever_and_later_calls_are_refused(own, tmp_path):
    processes, run = own
    answer = start_dawdling(run, tmp_path, 10**6)
    processes.close()
    assert "closed" in str(answer.exception(SOON_S))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="closed"):
            process_of(run)
    assert processes._launcher._popen.poll() is not None
    processes.close()


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_waits_for_room_holds_none(own, settings):
    processes, run = own
    processes._gate.enter(2**20)
    with ThreadPoolExecutor(1) as hands:
        answer = hands.submit(run, made_there.process_id_in_room, 2**19)
        wait_until(lambda: len(processes._gate._waiting) == 1, lambda: "nobody asks for room")
        for pid in children_of(processes._launcher._popen.pid):
            os.kill(pid, signal.SIGKILL)
        processes._gate.leave(2**20)
        assert isinstance(answer.exception(SOON_S), ProcessDied)
    assert processes._gate._held_bytes == 0
    process_of(run)


@pytest.mark.slow
def test_a_process_that_waits_for_memory_longer_than_the_limit_is_not_killed(settings):
    processes = SampleProcesses(1, 2**20, timeout_s=1.0)
    run = partial(asked, processes, settings)
    first = process_of(run)
    processes._gate.enter(2**20)
    with ThreadPoolExecutor(1) as hands:
        answer = hands.submit(run, made_there.process_id_in_room, 2**19)
        wait_until(lambda: len(processes._gate._waiting) == 1, lambda: "nobody asks for room")
        time.sleep(1.5)
        processes._gate.leave(2**20)
        assert int(answer.result(SOON_S)) == first
    processes.close()


def test_an_error_of_the_shard_survives_though_every_process_dies(settings):
    class Dying:
        count = 1

        def run(self, *_arguments):
            raise ProcessDied("was killed by SIGKILL")

    damage = SampleError("read", "cut", "it ends early", damages_shard=True)
    of_sample = SampleError("read", "too_large", "too large", "k", 3)
    outcomes = WorkInProcesses(Dying(), settings).prepare([of_sample, damage])
    assert [(outcome.errors, outcome.is_sample) for outcome in outcomes] == [
        ((of_sample,), True),
        ((damage,), False),
    ]


PROGRAM = """
import os, pickle, sys
from pathlib import Path
from tests.pipeline.test_sample_process_faults import SampleProcesses, asked, made_there
processes = SampleProcesses(1, 2**20)
settings = pickle.loads(Path(sys.argv[1]).read_bytes())
{before}
print(os.getpid(), asked(processes, settings, made_there.process_id), flush=True)
"""
INTERRUPTED = PROGRAM.format(
    before="""
try:
    print("ready", flush=True)
    sys.stdin.read()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
)


@pytest.fixture
def program(settings, tmp_path):
    """Start a Python program, in a process group of its own."""
    (tmp_path / "settings").write_bytes(pickle.dumps(settings))

    def start(text):
        return subprocess.Popen(
            [sys.executable, "-c", text, str(tmp_path / "settings")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.mark.slow
def test_ctrl_c_is_for_the_main_process_alone_also_while_the_others_start(program):
    with program(INTERRUPTED) as popen:
        assert popen.stdout.readline() == "ready\n"
        os.killpg(popen.pid, signal.SIGINT)
        assert popen.stdout.readline() == "interrupted\n"
        assert int(popen.stdout.readline().split()[0]) == popen.pid
        popen.stdin.close()
        assert popen.stderr.read() == ""
        assert popen.wait(SOON_S) == 0


@pytest.mark.slow
@pytest.mark.parametrize("end", ["processes.close(); os._exit(3)", "os._exit(3)", "sys.exit(3)"])
def test_a_program_that_fails_while_the_launcher_starts_ends_without_a_word_of_it(program, end):
    with program(PROGRAM.format(before=end)) as popen:
        # the launcher's as well, which may end later
        assert popen.stderr.read() == ""
        assert popen.wait(SOON_S) == 3


@pytest.mark.slow
def test_a_program_ends_without_closing_and_leaves_nobody(program):
    with program(PROGRAM.format(before="")) as popen:
        pids = [int(pid) for pid in popen.stdout.readline().split()]
        assert popen.stderr.read() == ""
        assert popen.wait(SOON_S) == 0
    wait_until(lambda: not any(map(is_alive, pids)), lambda: str(pids))
