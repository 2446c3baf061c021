"""Faults inside a worker process, at exact steps of annotating a shard, a given number of times.

A `Fault` names the step, the shard and what happens there. Each occurrence leaves a mark in a folder, so that
a worker that replaces a lost one knows how many there were, and a test knows that they happened.
"""

import errno
import faulthandler
import os
import resource
import signal
import sys
import tarfile
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline import storage
from pipeline.annotate.annotator import ShardProgress, ShardReport
from pipeline.annotate.attempt import AttemptsInFlight
from pipeline.output.measures import Measures
from pipeline.output.writer import ShardWriter
from pipeline.run.worker import Worker
from pipeline.shards.sample_error import SampleError
from tests.helpers.waiting import wait_until


@dataclass(frozen=True)
class Fault:
    """What happens to a shard, and where.

    Attributes:
        shard: stem of the tar; "*": any shard.
        point: "load": before the worker is ready; "begin";
            "middle": half of the samples done; "errors": the errors file half written under its
            temporary name; "between": errors published, annotations not; "annotations": these half written;
            "published": both files there, the driver does not know yet.
        action: a key of ACTIONS; "wait_for_go": until the file `go` is beside the marks folder;
            "wait_for_rival", only at "between": until another process has published the annotations.
        times: how often; later attempts succeed.
        machine: process id of the machine's daemon, the parent of its workers; 0: on every machine.
    """

    shard: str
    point: str
    action: str
    times: int = 1
    machine: int = 0


def hog_memory():
    hoard = []
    while True:
        hoard.append(os.urandom(1 << 20) * 64)


def sleep_for_ever():
    while True:
        time.sleep(1000)


def send(number, process_id=os.getpid):
    """A signal, and not one step further: some handlers take their time."""
    os.kill(process_id(), number)
    sleep_for_ever()


def refuse(error):
    raise error


ACTIONS = {
    "kill": lambda: send(signal.SIGKILL),
    "segfault": lambda: send(signal.SIGSEGV),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    # the worker's parent is the daemon of its machine
    "kill_machine": lambda: send(signal.SIGKILL, os.getppid),
    "hang": sleep_for_ever,
    "hog": hog_memory,
    "raise": lambda: refuse(OSError(errno.EIO, os.strerror(errno.EIO))),
    "full_disk_once": lambda: refuse(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    # from here on the kernel refuses to let any file of this process grow
    "file_size_limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY)),
    "not_root": lambda: os.seteuid(65534),
}


class Faults:
    """Strikes where a fault says so, unless it has had its times."""

    def __init__(self, faults, marks):
        self._faults = {(fault.shard, fault.point): fault for fault in faults}
        self._marks = Path(marks)

    def strike(self, shard, point, before=lambda: None, rival=None):
        fault = self._faults.get((shard, point)) or self._faults.get(("*", point))
        if fault and fault.machine not in (0, os.getppid()):
            return
        for blow in range(fault.times if fault else 0):
            mark = self._marks / f"{shard}-{point}-{blow}"
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                continue
            before()
            if fault.action == "wait_for_go":
                wait_until(self._marks.with_name("go").exists, lambda: "the file go was never created")
            elif fault.action == "wait_for_rival":
                wait_until(rival.exists, lambda: f"nobody else published {rival}")
            else:
                ACTIONS[fault.action]()
            return

    def watch_publishing(self):
        """Strike where this process calls the kernel to put a file down: at its fsync and at its rename."""
        fsync, rename = os.fsync, Path.replace

        def struck_fsync(descriptor):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            _, folder, name = path.name.split("-", 2)
            half = partial(os.ftruncate, descriptor, os.fstat(descriptor).st_size // 2)
            self.strike(stem_of(name), folder, before=half)
            fsync(descriptor)

        def struck_rename(path, target):
            renamed = rename(path, target)
            after = {"errors": "between", "annotations": "published"}
            rival = Path(target).parents[1] / "annotations" / Path(target).name
            self.strike(stem_of(Path(target).name), after.get(Path(target).parent.name, ""), rival=rival)
            return renamed

        os.fsync, Path.replace = struck_fsync, struck_rename


def stem_of(output_name):
    """The tar's stem in the name of an output file: the shard id without its digest."""
    return output_name.rpartition("-")[0]


def marks(folder):
    """Return how often faults occurred, by "shard-point"."""
    return dict(Counter(path.name.rpartition("-")[0] for path in Path(folder).iterdir()))


class WordAnnotator:
    """Reads real tars and publishes real files, without a model: every word of a caption is a row.

    An empty caption is an error row, a dash leaves the sample empty.
    """

    def __init__(self, config, metadata, faults, seconds_per_sample, log):
        self._log = log
        self._output, self._metadata = config.output, metadata
        self._faults, self._seconds_per_sample = faults, seconds_per_sample
        self._in_flight = AttemptsInFlight()
        self._samples = {}
        self._room = threading.Condition()

    def annotate(self, shard):
        stem, started_s = stem_of(shard.shard_id), time.monotonic()
        # a fault may have taken the right to write from this process
        with suppress(OSError), self._log.open("a") as log:
            log.write(f"{stem}\n")
        metadata = {**self._metadata, "attempt": uuid.uuid4().hex}
        try:
            with (
                ShardWriter(shard, metadata, with_maps=self._output.heatmap) as writer,
                self._in_flight.begun(shard, writer.counts) as attempt,
            ):
                self._faults.strike(stem, "begin")
                self._add_samples(shard, writer, stem, attempt)
                attempt.begin_publishing()
                counts = writer.publish(self._output.dir).counts
        finally:
            with self._room:
                self._room.notify_all()
        return ShardReport(counts, time.monotonic() - started_s)

    def _add_samples(self, shard, writer, stem, attempt):
        with storage.open_shard(shard) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            captions = [(Path(member.name).stem, tar.extractfile(member).read().decode()) for member in tar]
        self._samples[shard.shard_id] = len(captions)
        for index, (key, caption) in enumerate(captions):
            if attempt.is_abandoned:
                raise attempt.error()
            if index == len(captions) // 2:
                self._faults.strike(stem, "middle")
            time.sleep(self._seconds_per_sample)
            errors = [] if caption else [SampleError("caption", "missing_caption", "empty", key, index)]
            words = [] if caption == "-" else caption.split()
            writer.add_sample([row(key, index, number, word) for number, word in enumerate(words)], errors)

    def wait_for_room(self):
        with self._room:
            self._room.wait_for(lambda: len(self._in_flight) < 2)

    def progress(self):
        return {attempt.shard_id: self._progress_of(attempt) for attempt in self._in_flight}

    def _progress_of(self, attempt):
        counts = attempt.counts()
        return ShardProgress(counts, counts.samples_in / max(1, self._samples.get(attempt.shard_id, 1)))

    def abandon(self, shard_id):
        return self._in_flight.abandon(shard_id)

    def measures(self):
        return Measures()


def row(key, sample_index, prompt_index, prompt):
    return {
        "key": key,
        "sample_index": sample_index,
        "prompt_index": prompt_index,
        "prompt": prompt,
        "status": "ok",
    }


def _build(config, metadata, cpus, device, *, faults, marks_folder, seconds_per_sample):
    struck = Faults(faults, marks_folder)
    struck.strike("*", "load")
    struck.strike("*", "load")
    struck.watch_publishing()
    workers = Path(marks_folder).with_name("workers")
    workers.mkdir(exist_ok=True)
    # the worker's parent is the daemon of its machine
    log = workers / f"{os.getppid()}-{os.getpid()}-{cpus}-{device}"
    return WordAnnotator(config, metadata, struck, seconds_per_sample, log)


@dataclass(frozen=True)
class WorkerSeen:
    """A worker that has begun shards: process id of the daemon of its machine, resources, shards."""

    machine: int
    cpus: int
    device: str
    shards: tuple[str, ...]


def workers_seen(tmp_path):
    """Return the workers of the jobs of a test that have begun a shard."""
    return [
        WorkerSeen(int(machine), int(cpus), device, tuple(path.read_text().split()))
        for path in (tmp_path / "workers").glob("*")
        for machine, _, cpus, device in [path.name.split("-")]
    ]


def daemon_of(machine):
    """The process id of the daemon of a machine, the parent of its workers."""
    return machine.all_processes["raylet"][0].process.pid


def struck_by(*faults, marks_folder, seconds_per_sample=0.0):
    """A factory of annotators whose workers suffer these faults."""
    return partial(
        _build, faults=faults, marks_folder=str(marks_folder), seconds_per_sample=seconds_per_sample
    )


def annotate_all(job, factory):
    """Run a worker over the shards left; exit with 1 if one fails, as a driver would stop the job."""
    # a death on purpose needs no traceback
    faulthandler.disable()
    worker = Worker(job.config, job.metadata, cpus=1, device="cpu", factory=factory)
    worker.load()
    for shard in job.todo:
        outcome = worker.annotate(shard)
        if outcome.status != "done":
            print(outcome.message, file=sys.stderr, flush=True)
            os._exit(1)
    os._exit(0)
