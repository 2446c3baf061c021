"""Who may import whom: the contracts of import-linter in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import REPOSITORY

LINT_IMPORTS = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
DOWNWARDS = "A package of pipeline imports only packages below it BROKEN"
BREACHES = {
    "pipeline/storage/breach.py": ("import pipeline.config", DOWNWARDS),
    "pipeline/export/breach.py": ("import pipeline.datasets", DOWNWARDS),
    "pipeline/unplaced.py": ("", DOWNWARDS),
    "legrad/breach.py": ("def later():\n    import ray", "legrad imports neither pipeline nor ray BROKEN"),
    "pipeline/output/breach.py": ("import ray.util", "Only pipeline.run imports ray BROKEN"),
    "pipeline/demo/assets.py": ("import pipeline.text", "The demo's files need no other package BROKEN"),
    "pipeline/cli/breach.py": (
        "import pipeline.demo.making.art",
        "Only the demo's programs import each other",
    ),
}


def lint_imports(tree: Path) -> subprocess.CompletedProcess:
    """Check the contracts of a source tree, in a process that finds no other copy of it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LINT_IMPORTS]
    return subprocess.run(command, cwd=tree, env=environment, check=False, capture_output=True, text=True)


def test_the_contracts_of_imports_are_kept():
    ended = lint_imports(REPOSITORY)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("path", BREACHES)
def test_a_breach_of_a_contract_is_seen(path, tmp_path):
    line, message = BREACHES[path]
    for package in ("legrad", "pipeline"):
        for source in (REPOSITORY / package).rglob("*.py"):
            copy = tmp_path / source.relative_to(REPOSITORY)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with (tmp_path / path).open("a") as source:
        source.write(f"\n{line}\n")
    ended = lint_imports(tmp_path)
    assert ended.returncode == 1
    assert message in ended.stdout
