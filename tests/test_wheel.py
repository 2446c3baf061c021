"""The wheel: what it contains, and that it works where nothing else of the repository is."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

import legrad
from tests.helpers.processes import REPOSITORY

SOURCES = ("legrad", "pipeline", "pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir")

pytestmark = pytest.mark.slow


def run(command, **settings):
    """Run a command; return what it prints."""
    ended = subprocess.run(command, check=False, capture_output=True, text=True, **settings)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: building writes into the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, folder / name)
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", folder])
    return next((folder / "dist").iterdir())


@pytest.fixture(scope="module")
def installed(wheel):
    """Environment of a process that finds the installed wheel, and no other copy."""
    target = wheel.parent / "installed"
    run([*PIP, "install", "--no-deps", "--target", target, wheel])
    return {**os.environ, "PYTHONPATH": str(target)}


def test_the_wheel_has_the_demos_files_and_type_marks_but_neither_examples_nor_what_made_the_demo(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"legrad_pipeline-{legrad.__version__}-py3-none-any.whl"
    assert {
        "legrad/py.typed",
        "pipeline/py.typed",
        "pipeline/prompts/background.txt",
        "pipeline/demo/legrad_demo_clip.safetensors",
        "pipeline/demo/shards/heldout-000000.tar",
    } <= set(names)
    assert any(name.startswith("pipeline/report/templates/") for name in names)
    assert not any(name.startswith(("pipeline/demo/making", "legrad/examples", "tests")) for name in names)


def test_the_installed_wheel_imports_and_reports_its_version(installed, tmp_path):
    program = "import legrad, pipeline.training; print(legrad.__file__, legrad.__version__)"
    file, version = run([sys.executable, "-c", program], cwd=tmp_path, env=installed).split()
    assert file.startswith(installed["PYTHONPATH"])
    assert version == legrad.__version__
    command = [sys.executable, f"{installed['PYTHONPATH']}/bin/legrad", "--version"]
    assert run(command, cwd=tmp_path, env=installed).split()[-1] == version
