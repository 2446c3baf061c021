"""What a figure was measured with: the head of every benchmark's JSON row."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from pipeline.output.records import installed_versions


def environment() -> dict[str, Any]:
    """Commit, machine and versions."""
    commit = subprocess.check_output(
        ["git", "describe", "--always", "--dirty"], text=True, cwd=Path(__file__).parent
    )
    return {
        "commit": commit.strip(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 1),
        "versions": installed_versions(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
