"""Samples decoded and masked in processes: the same rows, and a death costs the sample that caused it."""

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import legrad
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.annotator_parts import parts_with_model
from pipeline.annotate.parcels import INLINE_BYTES, Large, Parcels
from pipeline.annotate.processes import PREPARE, MemoryGate, ProcessDied, SampleProcesses
from pipeline.annotate.sample_work import SampleWork, WorkSettings
from pipeline.annotate.work_in_processes import WorkInProcesses
from pipeline.demo import assets
from pipeline.shards.images import WHOLE_IMAGE
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, SampleFields
from tests.helpers import deadly_transform
from tests.helpers.corpus import demo_job, sample, write_corpus, write_shard
from tests.helpers.deadly_transform import DeadlyTransform, DiesWhenItArrives
from tests.helpers.waiting import wait_until

SOON_S = 120.0
# longer than a process takes for its samples, though other work keeps the machine busy
HANG_LIMIT_S = 4.0


@pytest.fixture(scope="module")
def explainer():
    name = assets.register_demo_model()
    return legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=2)


@pytest.fixture
def deadly(explainer):
    """The explainer, with a preprocessing that fails on images of certain colours."""
    name = assets.register_demo_model()
    deadly = legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=2)
    deadly.transform = DeadlyTransform(**vars(explainer.transform))
    return deadly


def plain_png(colour):
    sink = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(sink, "PNG")
    return sink.getvalue()


def annotated(explainer, config, *, in_processes, processes=2, while_running=None, timeout_s=None):
    """Annotate the shards of a job, two at a time; returns rows, errors and counts by shard."""
    annotator = ShardAnnotator(
        config,
        explainer,
        decode_threads=processes,
        metadata={},
        processes=SampleProcesses(processes, 2**30, timeout_s) if in_processes else None,
    )
    try:
        shards = storage.list_shards(config.input.shards)
        with ThreadPoolExecutor(2) as hands:
            runs = [hands.submit(annotator.annotate, shard) for shard in shards]
            if while_running is not None:
                while_running(runs)
            counts = [run.result(SOON_S).counts for run in runs]
    finally:
        annotator.close()
    out = Path(config.output.dir)
    names = [f"{shard.shard_id}.parquet" for shard in shards]
    tables = [
        [pq.read_table(out / folder / name).to_pylist() for name in names]
        for folder in ("annotations", "errors")
    ]
    return tables[0], tables[1], counts


def children_of(pid):
    return [
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in path.read_text().split()
    ]


def sample_processes_of(pid):
    """Processes below the launchers below a process."""
    return [child for launcher in children_of(pid) for child in children_of(launcher)]


def raw(index, content, caption=b"a dog"):
    return RawSample(index, f"k{index}", SampleFields({"png": content, "txt": caption}.items()))


# ---------------------------------------------------------------- the same rows


def test_rows_and_errors_are_the_same_in_processes_and_in_threads(explainer, tmp_path):
    broken = [sample("cut", jpg=b"\xff\xd8\xff"), sample("mute", txt=b"\xff\xfe"), sample("none", jpg=None)]
    paths = write_corpus(tmp_path / "in", 2, 40)
    paths.append(
        write_shard(tmp_path / "in" / "broken.tar", [*broken, *(sample(f"k{i}", i) for i in range(9))])
    )
    url = storage.list_shards([str(paths[-1])])[0].canonical_url
    marks = [{"shard": url, "key": "k3", "prompt_index": 0, "mark": "bad"}]
    found = []
    for in_processes in (False, True):
        config = demo_job(
            paths, tmp_path / f"out-{in_processes}", output={"heatmap": True}, prompts={"marks": marks}
        )
        found.append(annotated(explainer, config, in_processes=in_processes))
    assert found[0] == found[1]
    assert [counts.empty for counts in found[0][2]] == [0, 0, 1], "the prompt that is marked bad"
    assert [counts.samples_in for counts in found[0][2]] == [40, 40, 12]


@pytest.mark.slow
def test_classes_are_the_same_too_though_they_are_not_sent_with_every_sample(explainer, tmp_path):
    paths = write_corpus(tmp_path / "in", 1, 20)
    prompts = {
        "source": "classes",
        "classes": str(assets.demo_classes_path()),
        "templates": "simple-imagenet",
    }
    found = []
    for in_processes in (False, True):
        config = demo_job(paths, tmp_path / f"out-{in_processes}", prompts=prompts)
        found.append(annotated(explainer, config, in_processes=in_processes))
    assert found[0] == found[1]
    assert found[0][0][0]


# ---------------------------------------------------------------- deaths


@pytest.mark.parametrize(
    ("colour", "kind", "words"),
    [
        (deadly_transform.SEGFAULT, "process_died", "was killed by SIGSEGV"),
        pytest.param(
            deadly_transform.KILL,
            "process_died",
            "was killed by SIGKILL, as the kernel does where memory runs out",
            marks=pytest.mark.slow,
        ),
        pytest.param(deadly_transform.EXIT, "process_died", "ended with exit code 7", marks=pytest.mark.slow),
        pytest.param(deadly_transform.MEMORY, "out_of_memory", "memory ran out", marks=pytest.mark.slow),
    ],
)
def test_an_image_that_kills_its_decoder_costs_one_sample(deadly, tmp_path, colour, kind, words):
    samples = [sample(f"k{index:02d}", index) for index in range(20)]
    for position in (3, 4, 17):
        samples[position] = sample(f"k{position:02d}", jpg=None, png=plain_png(colour))
    path = write_shard(tmp_path / "a.tar", samples)
    config = demo_job([path], tmp_path / "out", input={"image": "jpg;png", "resize": "exact"})
    (rows,), (errors,), (counts,) = annotated(deadly, config, in_processes=True)
    assert [row["sample_index"] for row in rows] == [index for index in range(20) if index not in (3, 4, 17)]
    assert [(error["sample_index"], error["stage"], error["kind"]) for error in errors] == [
        (position, "decode", kind) for position in (3, 4, 17)
    ]
    assert all(words in error["message"] for error in errors)
    assert (counts.annotated, counts.failed, counts.samples_in) == (17, 3, 20)


@pytest.mark.parametrize(
    ("colour", "kind"),
    [
        (deadly_transform.SEGFAULT, "process_died"),
        pytest.param(deadly_transform.HANG, "timed_out", marks=pytest.mark.slow),
    ],
)
def test_a_sample_whose_masks_end_or_stop_their_process_is_the_only_error_of_its_chunk(
    tmp_path, explainer, colour, kind
):
    config = demo_job([], tmp_path / "out")
    work = WorkInProcesses(
        SampleProcesses(1, 2**20, HANG_LIMIT_S), WorkSettings(config, explainer.transform, WHOLE_IMAGE, None)
    )
    try:
        local = SampleWork(WorkSettings(config, explainer.transform, WHOLE_IMAGE, None))
        explained = parts_with_model(config, explainer).maps.explain(
            local.prepare([raw(index, plain_png((index, 90, 9))) for index in range(5)])
        )
        object.__setattr__(explained[2], "prompts", (DiesWhenItArrives(colour),))
        rows = work.finish(explained)
        assert rows.outcomes == {"annotated": 4, "failed": 1}
        assert [(error.sample_index, error.stage, error.kind) for error in rows.errors] == [(2, "mask", kind)]
    finally:
        work.close()


@pytest.mark.parametrize(
    "colour", [deadly_transform.HANG, pytest.param(deadly_transform.STOP, marks=pytest.mark.slow)]
)
def test_an_image_that_keeps_its_decoder_busy_for_ever_costs_one_sample(deadly, tmp_path, colour):
    samples = [sample(f"k{index:02d}", index) for index in range(20)]
    samples[4] = sample("k04", jpg=None, png=plain_png(colour))
    path = write_shard(tmp_path / "a.tar", samples)
    config = demo_job([path], tmp_path / "out", input={"image": "jpg;png", "resize": "exact"})
    (rows,), (errors,), (counts,) = annotated(deadly, config, in_processes=True, timeout_s=HANG_LIMIT_S)
    assert [row["sample_index"] for row in rows] == [index for index in range(20) if index != 4]
    assert [(error["sample_index"], error["stage"], error["kind"]) for error in errors] == [
        (4, "decode", "timed_out")
    ]
    assert f"{HANG_LIMIT_S:g} s, the limit of run.sample_timeout_s" in errors[0]["message"]
    assert (counts.annotated, counts.failed, counts.samples_in) == (19, 1, 20)


def test_processes_killed_from_outside_cost_nothing(explainer, tmp_path):
    paths = write_corpus(tmp_path / "in", 3, 60)
    config = demo_job(paths, tmp_path / "out")
    killed = []

    def kill_some(runs):
        while not all(run.done() for run in runs) and len(killed) < 2:
            for pid in sample_processes_of(os.getpid()):
                if pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.2)

    rows, errors, counts = annotated(explainer, config, in_processes=True, while_running=kill_some)
    assert killed
    assert [each.annotated for each in counts] == [60, 60, 60]
    assert sum(map(len, rows)) == 180
    assert errors == [[], [], []]


@pytest.mark.slow
def test_a_launcher_that_was_killed_is_started_again(tmp_path, explainer):
    config = demo_job([], tmp_path / "out")
    settings = WorkSettings(config, explainer.transform, WHOLE_IMAGE, None)
    before = set(children_of(os.getpid()))
    work = WorkInProcesses(SampleProcesses(1, 2**20), settings)
    try:
        assert len(work.prepare([raw(0, plain_png((1, 2, 3)))])) == 1
        (launcher,) = set(children_of(os.getpid())) - before
        (process,) = children_of(launcher)
        os.kill(launcher, signal.SIGKILL)
        os.kill(process, signal.SIGKILL)
        (prepared,) = work.prepare([raw(0, plain_png((1, 2, 3)))])
        assert prepared.image_height == 30
    finally:
        work.close()


def test_a_bug_is_raised_as_what_it_was_with_the_place_where_it_happened(tmp_path, deadly):
    settings = WorkSettings(demo_job([], tmp_path / "out"), deadly.transform, WHOLE_IMAGE, None)
    processes = SampleProcesses(1, 2**20)
    try:
        with pytest.raises(TypeError) as caught:
            processes.run(settings, PREPARE, 7)
        assert "in prepare" in caught.value.__notes__[0]
    finally:
        processes.close()


@pytest.mark.slow
def test_settings_that_no_process_can_take_are_no_reason_to_blame_samples(tmp_path):
    processes = SampleProcesses(1, 2**20)
    try:
        with pytest.raises(RuntimeError, match="did not start"):
            processes.run("no settings", PREPARE, [])
    finally:
        processes.close()


def test_processes_end_with_the_one_that_started_them():
    program = (
        "import os, threading, time\n"
        "from pipeline.annotate.processes import _Launcher\n"
        "launcher = _Launcher(threading.Event())\n"
        "print(os.getpid(), launcher.fork()[0], flush=True)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout is not None
        pids = [int(pid) for pid in popen.stdout.readline().split()]
        launchers = children_of(pids[0])
        popen.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in (*launchers, pids[1])), lambda: str(pids))


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------- memory of large images


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 150), min_size=1, max_size=25), threads=st.integers(1, 6))
def test_large_images_take_no_more_than_the_limit_and_one_above_it_is_alone(sizes, threads):
    gate, held, lock, seen = MemoryGate(100), [], threading.Lock(), []

    def take(size):
        with gate.room(size):
            with lock:
                held.append(size)
                seen.append(list(held))
            with lock:
                held.remove(size)

    with ThreadPoolExecutor(threads) as hands:
        list(hands.map(take, sizes))
    assert len(seen) == len(sizes)
    assert all(sum(together) <= 100 or len(together) == 1 for together in seen)


def test_a_large_image_is_not_overtaken_for_ever_by_small_ones():
    gate, entered = MemoryGate(10), []
    gate.enter(6)

    def enter(size):
        gate.enter(size)
        entered.append(size)
        gate.leave(size)

    large = threading.Thread(target=enter, args=(9,))
    large.start()
    wait_until(lambda: len(gate._waiting) == 1, lambda: "nobody waits")
    small = threading.Thread(target=enter, args=(1,))
    small.start()
    time.sleep(0.05)
    assert entered == []
    gate.leave(6)
    large.join(SOON_S)
    small.join(SOON_S)
    assert entered == [9, 1]


# ---------------------------------------------------------------- what is sent


def pair():
    here, there = socketpair()
    return Parcels(Connection(here.detach())), Parcels(Connection(there.detach()))


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 3 * INLINE_BYTES), max_size=6), rounds=st.integers(1, 3))
def test_whatever_the_sizes_arrays_and_bytes_arrive_as_they_were_sent(sizes, rounds):
    sender, receiver = pair()
    sent = [
        [np.random.default_rng(number).integers(0, 256, size, np.uint8) for size in sizes]
        for number in range(rounds)
    ]
    received = []
    for arrays in sent:
        sender.send(("task", arrays, [Large(array.tobytes()) for array in arrays]))
        received.append(receiver.receive())
    for arrays, (task, views, contents) in zip(sent, received, strict=True):
        assert task == "task"
        assert all(map(np.array_equal, arrays, views))
        assert [array.tobytes() for array in arrays] == contents
        assert all(view.flags.writeable for view in views if view.size)
    sender.close()
    receiver.close()


def test_memory_is_used_again_once_nothing_views_it_and_not_before():
    sender, receiver = pair()

    def sent(value):
        sender.send(np.full(100_000, value, np.uint8))
        return receiver.receive()

    def answer():
        receiver.send("done")
        sender.receive()

    first, second = sent(1), sent(2)
    answer()
    third = sent(3)
    assert [set(array.tolist()) for array in (first, second, third)] == [{1}, {2}, {3}]
    assert len(sender._outgoing) == 3
    part = second[10:20]
    del first, second
    answer()
    fourth = sent(4)
    assert len(sender._outgoing) == 3
    assert [set(array.tolist()) for array in (part, third, fourth)] == [{2}, {3}, {4}]
    sender.close()
    receiver.close()


@pytest.mark.parametrize("length", [b"", struct.pack("!i", 2**30), struct.pack("!iq", -1, 2**40)])
def test_a_message_that_never_ends_keeps_its_receiver_no_longer_than_the_limit(length):
    here, there = socketpair()
    with there:
        parcels = Parcels(Connection(here.detach()))
        parcels.limit_waits(0.05)
        there.sendall(length)
        with pytest.raises((BlockingIOError, MemoryError)):
            parcels.receive()
        parcels.close()


def test_a_message_that_nobody_reads_keeps_its_sender_no_longer_than_the_limit():
    here, there = socketpair()
    with there:
        parcels = Parcels(Connection(here.detach()))
        parcels.limit_waits(0.05)
        with pytest.raises(BlockingIOError):
            parcels.send("x" * 2**24)
        parcels.close()


def test_an_end_that_has_gone_is_told_from_an_answer():
    sender, receiver = pair()
    receiver.close()
    with pytest.raises((EOFError, OSError)):
        sender.send(np.zeros(100_000))
        sender.receive()
    sender.close()


@pytest.mark.slow
def test_how_a_process_ended_is_said_in_words(tmp_path, explainer):
    settings = WorkSettings(demo_job([], tmp_path / "out"), explainer.transform, WHOLE_IMAGE, None)
    processes = SampleProcesses(1, 2**20)
    try:
        with pytest.raises(ProcessDied, match="was killed by SIGSEGV"):
            processes.run(settings, PREPARE, [DiesWhenItArrives()])
        assert processes.run(settings, PREPARE, [SampleError("read", "cut", "it ends early", "a", 0)])
    finally:
        processes.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="scores are Linux's")
def test_where_memory_runs_out_sample_processes_are_killed_before_the_one_with_the_device():
    program = (
        "import os\n"
        "from pathlib import Path\n"
        "Path('/proc/self/oom_score_adj').write_text('1000')\n"  # as Ray does with its workers
        "from pipeline.annotate.processes import SampleProcesses\n"
        "from tests.helpers.deadly_transform import settings_of\n"
        "processes = SampleProcesses(1, 2**20)\n"
        "processes.run(settings_of(), 'prepare', [])\n"
        "(launcher,) = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()\n"
        "(child,) = Path(f'/proc/{launcher}/task/{launcher}/children').read_text().split()\n"
        "scores = [Path(f'/proc/{pid}/oom_score_adj').read_text().strip() for pid in ('self', child)]\n"
        "processes.close()\n"
        "print(*scores)\n"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["900", "1000"]
