"""Which versions of Python are promised, tried and refused: one answer everywhere."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
VERSIONS = ["3.11", "3.12", "3.13"]


def lines(path):
    return (ROOT / path).read_text(encoding="utf-8")


def test_every_document_names_the_versions_that_are_tried():
    workflow = yaml.safe_load(lines(".github/workflows/test.yml"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == VERSIONS
    project = lines("pyproject.toml")
    assert re.findall(r"Python :: (3\.\d+)", project) == VERSIONS
    bounds = SpecifierSet(re.search(r'requires-python = "(.*?)"', project)[1])
    assert [minor for minor in range(20) if f"3.{minor}.5" in bounds] == [11, 12, 13]
    assert f"Python {VERSIONS[0]} to {VERSIONS[-1]}" in lines("README.md")


def test_the_workflow_runs_the_two_commands_of_the_readme():
    steps = yaml.safe_load(lines(".github/workflows/test.yml"))["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make demo", "make test"]


@pytest.mark.parametrize("version", VERSIONS)
def test_each_package_is_pinned_once_for_each_version(version):
    pins = [Requirement(line) for line in lines("configs/constraints.txt").splitlines() if line[0] != "#"]
    environment = default_environment() | {"python_version": version}
    in_force = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    assert sorted(in_force) == sorted({pin.name for pin in pins})


@pytest.fixture
def make_setup(tmp_path):
    """Runs `make GOAL` where python3 says that it is of a version, and fails at whatever else it is asked."""

    def run(version, goal="setup"):
        for name in ("Makefile", "pyproject.toml", "configs/constraints.txt"):
            copy = tmp_path / name
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(lines(name))
        python = tmp_path / "python3.x"
        if version is not None:
            python.write_text(
                f'#!/bin/sh\n[ "$1" = -c ] && echo {version} || {{ echo "asked: $*"; false; }}\n'
            )
            python.chmod(0o755)
        command = ["make", "--no-print-directory", goal, f"PYTHON={python}"]
        # these tests themselves run below `make test`, whose flags and depth this make must not inherit
        outer = {"MAKELEVEL", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "PYTHON"}
        env = {name: value for name, value in os.environ.items() if name not in outer}
        return python, subprocess.run(
            command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True
        )

    return run


@pytest.mark.parametrize(
    ("version", "shown"),
    [("3.10.12", "3.10.12"), ("3.14.0", "3.14.0"), ("2.7.18", "2.7.18"), (None, "not there")],
)
def test_another_python_is_refused_in_one_line_with_the_way_out(make_setup, version, shown):
    python, ended = make_setup(version, "demo")
    first, *makes_own = ended.stderr.splitlines()
    assert first == f"legrad needs Python 3.11 to 3.13; {python} is {shown}; run make PYTHON=python3.11 demo"
    assert [line.split(":")[0] for line in makes_own] == ["make"]
    assert (ended.returncode, ended.stdout) == (2, "")


@pytest.mark.parametrize("version", ["3.11.0rc1", "3.11.7", "3.12.1", "3.13.0", "3.13.0rc1"])
def test_a_python_that_was_tried_goes_on_to_make_the_environment(make_setup, version):
    _, ended = make_setup(version)
    assert ended.stdout == "asked: -m venv .venv\n"
    assert "legrad needs" not in ended.stderr
