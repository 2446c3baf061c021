"""What a figure was measured with: the head of every benchmark's JSON row."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from pipeline.output.records import installed_versions


def environment() -> dict[str, Any]:
    """Commit, machine and versions."""
    return {
        "commit": _git("describe", "--always") + ("-dirty" if _is_changed() else ""),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 1),
        "versions": installed_versions(),
    }


def _is_changed() -> bool:
    # documents do not count, since programs write their tables into one
    return bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)*.md"))


def _git(*words: str) -> str:
    return subprocess.check_output(["git", *words], text=True, cwd=Path(__file__).parent).strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
