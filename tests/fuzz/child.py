"""Reads inputs in a process of its own, for native parsers may end it.

Before each input its number is written, after it what came of it, as lines of JSON: the last number without
an answer is of the input that ended the process.
"""

import faulthandler
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target, warm_up

# by the clock, on a busy machine: only what never ends takes that long
LIMIT_S = 240
MOST_TOLD = 2000


def say(**fields: object) -> None:
    """One line, at once."""
    os.write(1, json.dumps(fields).encode() + b"\n")


def outcome(target: Target, made: object, folder: Path) -> str:
    """The kind of what came of an input, with the traceback where it is none that may come."""
    try:
        return "read" if target.read(made, folder) else "wrong pairing"
    except target.refusals:
        return "refused"
    except Exception:
        return "crash: " + traceback.format_exc()[-MOST_TOLD:]


def cleared(folder: str) -> list[str]:
    """Remove what is in a folder; returns its names."""
    paths = list(Path(folder).iterdir())
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in paths]


def open_descriptors() -> int:
    """How many this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def fuzz(name: str, first: int, count: int, seed: int) -> None:
    """Try so many inputs of a target."""
    target, work = TARGETS[name], Path(os.environ["LEGRAD_FUZZ_FOLDER"]) / "work"
    open_before = None
    for number in range(first, first + count):
        made = target.make(random.Random(f"{seed}/{name}/{number}"))
        work.mkdir()
        say(target=name, started=number)
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        start_s = time.process_time()
        kind = outcome(target, made, work)
        cpu_s = time.process_time() - start_s
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(work)
        say(target=name, ended=number, kind=kind, cpu_s=round(cpu_s, 4), left=cleared(tempfile.gettempdir()))
        # what is loaded at first use stays open
        open_before = open_before or open_descriptors()
    say(target=name, descriptors=open_descriptors() - (open_before or 0))


def main() -> None:
    """JSON of [[name, first, count], ...] and a seed."""
    faulthandler.enable()
    warnings.simplefilter("error")
    warm_up()
    cleared(tempfile.gettempdir())
    tasks, seed = json.loads(sys.argv[1]), int(sys.argv[2])
    for name, first, count in tasks:
        fuzz(name, first, count, seed)


if __name__ == "__main__":
    main()
