"""Runs targets in a process that may end at any input, and counts what came of the inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANG_S = 2.0
MOST_RESTARTS = 20


@dataclass
class Found:
    """What came of the inputs of a target.

    Attributes:
        inputs: tried.
        refused: of them, with an error that may come.
        crashes: number of the input, and its traceback or the end of the process.
        wrong_pairings: numbers of inputs.
        leaks: number of the input, and files left behind; or descriptors left open.
        cpu_s: of the whole process, for each input, by number.
    """

    inputs: int = 0
    refused: int = 0
    crashes: dict[int, str] = field(default_factory=dict)
    wrong_pairings: list[int] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    cpu_s: dict[int, float] = field(default_factory=dict)

    @property
    def worst_s(self) -> float:
        """CPU time of the slowest input."""
        return max(self.cpu_s.values(), default=0.0)

    @property
    def hangs(self) -> list[int]:
        """Numbers of the inputs that took more than HANG_S of CPU time."""
        return [number for number, cpu_s in self.cpu_s.items() if cpu_s > HANG_S]


def fuzz(counts: Mapping[str, int], seed: int) -> dict[str, Found]:
    """Try so many inputs of each target.

    Args:
        counts: inputs by target; a target that ends the process goes on behind the input that did.
        seed: of all inputs; input number n of a target is the same whatever is tried besides.
    """
    found = {name: Found() for name in counts}
    todo = [[name, 0, count] for name, count in counts.items()]
    for _ in range(MOST_RESTARTS):
        if not todo:
            break
        todo = _go_on(todo, seed, found)
    return found


def _go_on(todo: list[list], seed: int, found: dict[str, Found]) -> list[list]:
    """Run a child until it ends; what is left to do, behind the input that ended it."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, "tmp")
        temporary.mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LEGRAD_FUZZ_FOLDER": folder,
            "TMPDIR": str(temporary),
        }
        command = [sys.executable, "-m", "tests.fuzz.child", json.dumps(todo), str(seed)]
        ended = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
    running = _count(ended.stdout, found)
    if ended.returncode == 0:
        return []
    if running is None:
        raise RuntimeError(f"the child ended with {ended.returncode}: {ended.stderr[-4000:]}")
    name, number = running
    found[name].crashes[number] = f"ended with {ended.returncode}: {ended.stderr[-4000:]}"
    names = [task[0] for task in todo]
    _, first, count = todo[names.index(name)]
    rest = [[name, number + 1, first + count - number - 1], *todo[names.index(name) + 1 :]]
    return [task for task in rest if task[2] > 0]


def _count(lines: str, found: dict[str, Found]) -> tuple[str, int] | None:
    """Add up a child's answers; target and number of an input without answer."""
    running = None
    for line in lines.splitlines():
        said = json.loads(line)
        of_target = found[said["target"]]
        if "started" in said:
            of_target.inputs += 1
            running = said["target"], said["started"]
        elif "ended" in said:
            running = None
            _add(of_target, said)
        elif said["descriptors"] > 0:
            of_target.leaks.append(f"{said['descriptors']} open files")
    return running


def _add(found: Found, said: dict) -> None:
    number, kind = said["ended"], said["kind"]
    found.cpu_s[number] = said["cpu_s"]
    found.refused += kind == "refused"
    if said["left"]:
        found.leaks.append(f"{number}: {', '.join(said['left'])}")
    if kind == "wrong pairing":
        found.wrong_pairings.append(number)
    elif kind.startswith("crash"):
        found.crashes[number] = kind
