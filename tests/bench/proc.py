"""Read what the kernel knows of processes: their children, CPU time and memory (Linux)."""

import os
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Return the live children of a process; none where it has ended."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for text in lists for child in text.split()]


def cpu_s_of(pid: int) -> float:
    """Return the CPU time of a process and of its live descendants, in seconds."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    own_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own_s + sum(map(cpu_s_of, children_of(pid)))


def memory_mb_of(pid: int) -> dict[str, float]:
    """Return the memory of a process in MB: private pages, and with its share of those that are shared."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines[1:])}
    return {
        "private_mb": (kib["Private_Clean"] + kib["Private_Dirty"]) * 1024 / 1e6,
        "proportional_mb": kib["Pss"] * 1024 / 1e6,
    }
