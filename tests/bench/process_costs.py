"""Measure what sample processes cost a worker: starting, memory, messages and deaths; no device, no model.

    python tests/bench/process_costs.py [--side 500x375] [--processes 2] [--rounds 10] [--write]

Prints one JSON row, medians where something is repeated:

    launcher_ready_s    from the start of the launcher until it can fork: it imports what processes need, once
                        a worker, while the model is loaded (here from files that are in the page cache)
    process_start_ms    forking a process, sending it the settings, and its answer to an empty task;
                        settings_ms of it are spent on unpickling these, tokenizer included
    round_trip_us       an empty task of a process that runs, and its answer
    death_ms            from SIGKILL to the first answer of the process that takes its place; no chunk was in
                        flight, whose samples would be worked on once more
    launcher, new_process, used_process
                        memory in MB: private pages, and proportional (with a share of those that are shared).
                        New: after an empty task. Used: after chunks of 32 samples were decoded in it
    raw_sent_us, raw_received_us, pixels_sent_us, pixels_received_us
                        CPU time a sample to send and receive a chunk of 32: JPEGs and captions to a sample
                        process, pixels of 224 x 224 back. Here both ends are in one process
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from socket import socketpair
from typing import Any

import numpy as np
import open_clip
from made_shards import captions, jpeg
from proc import children_of, memory_mb_of
from published import figure_parser, recording

from legrad.images import ImageTransform
from legrad.tokens import picklable_tokenizer
from pipeline.annotate.annotator import CHUNK_SAMPLES
from pipeline.annotate.class_prompts import without_classes
from pipeline.annotate.parcels import Large, Parcels
from pipeline.annotate.processes import PREPARE, ProcessDied, SampleProcesses
from pipeline.annotate.sample_work import SampleWork, WorkSettings
from pipeline.config.load import parse_config
from pipeline.shards.images import WHOLE_IMAGE
from pipeline.shards.samples import RawSample, SampleFields

INPUT_SIDE = 224
LAUNCHES = 3
ROUND_TRIPS = 1000
TRANSFERS = 50


def main() -> None:
    """Measure all costs."""
    parser = figure_parser(__doc__)
    parser.add_argument("--side", default="500x375", help="WIDTHxHEIGHT of the images")
    parser.add_argument("--processes", type=int, default=2, help="sample processes whose memory is read")
    parser.add_argument("--rounds", type=int, default=10, help="processes that are killed")
    arguments = parser.parse_args()
    width, height = map(int, arguments.side.split("x"))
    settings, chunk = work_settings(), chunk_of(width, height)
    with recording(__file__, arguments) as record:
        times = starts_and_deaths(settings, arguments.rounds)
        record(
            "costs", {**times, **memory(settings, chunk, arguments.processes), **transfers(settings, chunk)}
        )


def work_settings() -> WorkSettings:
    """Return what a job with CLIP's tokenizer and a list of captions a sample sends to its processes."""
    config = parse_config(
        {
            "input": {"shards": "none.tar", "caption": "json:captions"},
            "model": {"name": "ViT-B-16", "pretrained": "openai"},
            "prompts": {"source": "captions"},
            "output": {"dir": "none"},
        }
    )
    transform = ImageTransform(INPUT_SIDE, INPUT_SIDE, (0.5,) * 3, (0.5,) * 3, patch_size=16)
    return WorkSettings(config, transform, WHOLE_IMAGE, picklable_tokenizer(open_clip.SimpleTokenizer()))


def chunk_of(width: int, height: int) -> list[RawSample]:
    """Return a chunk of samples as a shard's thread sends it, one caption each."""
    generator = np.random.default_rng(0)
    return [
        RawSample(
            index,
            f"{index:06d}",
            SampleFields(
                {"jpg": Large(jpeg(index, width, height)), "json": Large(captions(generator, 1))}.items()
            ),
        )
        for index in range(CHUNK_SAMPLES)
    ]


def starts_and_deaths(settings: WorkSettings, rounds: int) -> dict[str, float]:
    """Return the times of launcher, starts, round trips and deaths, of one process at a time."""
    first_s = []
    for _ in range(LAUNCHES):
        started_s = time.perf_counter()
        with sample_processes(1) as processes:
            processes.run(settings, PREPARE, [])
            first_s.append(time.perf_counter() - started_s)
            if len(first_s) == LAUNCHES:
                trips_s = [round_trip_s(processes, settings) for _ in range(ROUND_TRIPS)]
                deaths = [death(processes, settings) for _ in range(rounds)]
    start_s, death_s = map(statistics.median, zip(*deaths, strict=True))
    return {
        "launcher_ready_s": statistics.median(first_s) - start_s,
        "process_start_ms": 1e3 * start_s,
        "settings_ms": 1e3 * statistics.median(settings_s(settings) for _ in range(rounds)),
        "round_trip_us": 1e6 * statistics.median(trips_s),
        "death_ms": 1e3 * death_s,
    }


def settings_s(settings: WorkSettings) -> float:
    """Return the time in which a new process makes its work from the settings."""
    pickled = pickle.dumps(settings)
    started_s = time.perf_counter()
    SampleWork(pickle.loads(pickled))
    return time.perf_counter() - started_s


@contextlib.contextmanager
def sample_processes(count: int) -> Iterator[SampleProcesses]:
    """Yield sample processes, and end them."""
    with contextlib.closing(SampleProcesses(count, 2**30)) as processes:
        yield processes


def round_trip_s(processes: SampleProcesses, settings: WorkSettings) -> float:
    """Return the time of an empty task."""
    started_s = time.perf_counter()
    processes.run(settings, PREPARE, [])
    return time.perf_counter() - started_s


def death(processes: SampleProcesses, settings: WorkSettings) -> tuple[float, float]:
    """Kill the only process; return seconds from the start of the next one, and from the kill."""
    (launcher,) = children_of(os.getpid())
    (process,) = children_of(launcher)
    killed_s = time.perf_counter()
    os.kill(process, signal.SIGKILL)
    with contextlib.suppress(ProcessDied):
        processes.run(settings, PREPARE, [])
        raise RuntimeError("a process that was killed answered")
    noticed_s = time.perf_counter()
    processes.run(settings, PREPARE, [])
    answered_s = time.perf_counter()
    return answered_s - noticed_s, answered_s - killed_s


def memory(settings: WorkSettings, chunk: list[RawSample], count: int) -> dict[str, dict[str, float]]:
    """Return the memory of a new process, of used ones (their mean), and of the launcher beside these."""
    with sample_processes(count) as processes:
        processes.run(settings, PREPARE, [])
        (launcher,) = children_of(os.getpid())
        (first,) = children_of(launcher)
        new = memory_mb_of(first)
        with ThreadPoolExecutor(count) as threads:
            # a process starts with its first task: as many as there are work once all are busy together
            while len(children_of(launcher)) < count:
                list(threads.map(lambda _: len(processes.run(settings, PREPARE, chunk)), range(8 * count)))
            list(threads.map(lambda _: len(processes.run(settings, PREPARE, chunk)), range(8 * count)))
        used = [memory_mb_of(process) for process in children_of(launcher)]
        return {
            "launcher": memory_mb_of(launcher),
            "new_process": new,
            "used_process": {name: statistics.mean(each[name] for each in used) for name in used[0]},
        }


def transfers(settings: WorkSettings, chunk: list[RawSample]) -> dict[str, float]:
    """Return the CPU time of sending and receiving a chunk in and out, in microseconds a sample."""
    raw = [RawSample(each.index, each.key, read_fields(each)) for each in chunk]
    pixels = without_classes(SampleWork(settings).prepare(raw))
    raw_us, pixels_us = transfer_us(chunk), transfer_us(pixels)
    return {
        "raw_sent_us": raw_us[0],
        "raw_received_us": raw_us[1],
        "pixels_sent_us": pixels_us[0],
        "pixels_received_us": pixels_us[1],
    }


def read_fields(sample: RawSample) -> SampleFields:
    """Return the fields of a sample as they arrive."""
    here, there = ends()
    here.send(sample)
    fields: SampleFields = there.receive().fields
    return fields


def transfer_us(content: list[Any]) -> tuple[float, float]:
    """Return the CPU time of sending a chunk, and of receiving it, in microseconds a sample."""
    here, there = ends()
    sent_s, received_s = [], []
    for _ in range(TRANSFERS):
        started_s = time.thread_time()
        here.send(content)
        sent_s.append(time.thread_time() - started_s)
        received = there.receive()
        received_s.append(time.thread_time() - started_s - sent_s[-1])
        # the answer brings the file back, so that it is written again
        del received
        there.send(None)
        here.receive()
    sent, got = (1e6 * statistics.median(times) / len(content) for times in (sent_s, received_s))
    return sent, got


def ends() -> tuple[Parcels, Parcels]:
    """Return both ends of a connection."""
    here, there = (Connection(end.detach()) for end in socketpair())
    return Parcels(here), Parcels(there)


if __name__ == "__main__":
    main()
