"""What a figure is measured with: commit, machine and versions."""

import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.output.records import installed_versions

UNKNOWN_COMMIT = "unknown"


def environment() -> dict[str, Any]:
    """Return the commit, the machine and the versions of the packages."""
    return {"commit": commit(), "machine": machine(), "versions": versions()}


def commit() -> str:
    """Return the short name of the current commit; `unknown` outside a git checkout."""
    try:
        return _git("rev-parse", "--short", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN_COMMIT


def changed_files(paths: Iterable[str]) -> list[str]:
    """Return those of some paths that differ from the current commit, or are not in it."""
    lines = _git("status", "--porcelain", "--untracked-files=all", "-z").split("\0")
    return sorted({line[3:] for line in lines} & set(paths))


def machine() -> dict[str, Any]:
    """Return the processor, the cores that this process may use, and the load of the last minute."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": load_1min(),
        "device": _device(),
    }


def load_1min() -> float:
    """Return the load of the machine in the last minute."""
    return round(os.getloadavg()[0], 1)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **installed_versions()}


def processor_name() -> str:
    """Return the name of the processor, as the kernel knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _device() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _git(*words: str) -> str:
    return subprocess.check_output(
        ["git", *words], text=True, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL
    )
