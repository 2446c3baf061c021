"""A `legrad` that is not ours is recognised before anything of it is imported."""

import os
import subprocess
import sys

import pytest

import legrad
from pipeline.installation import problem_with_legrad
from tests.helpers.processes import REPOSITORY


@pytest.fixture
def clone(tmp_path):
    """A folder of another package named `legrad`, as a clone of the authors' repository has."""
    (tmp_path / "legrad").mkdir()
    (tmp_path / "legrad" / "__init__.py").write_text("raise AssertionError('was imported')")
    return tmp_path


def python(folder, *arguments):
    settings = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY)}}
    return subprocess.run(
        [sys.executable, *arguments], check=False, capture_output=True, text=True, **settings
    )


def test_our_own_library_is_no_problem():
    assert problem_with_legrad() is None


def test_a_command_in_a_folder_with_another_legrad_ends_with_a_way_out(clone):
    ended = python(clone, "-m", "pipeline", "status", "out")
    assert ended.returncode == 2
    assert f"{clone / 'legrad' / '__init__.py'}\nWay out: run in another folder" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_importing_the_application_there_is_an_import_error_with_the_same_words(clone):
    program = "try: import pipeline.training\nexcept ImportError as error: print(error)"
    ended = python(clone, "-c", program)
    assert ended.returncode == 0, ended.stderr
    assert "Python finds another package named `legrad` first" in ended.stdout


@pytest.mark.parametrize("name", ["LeWrapper", "LePreprocess", "list_pretrained"])
def test_a_name_of_the_authors_package_is_explained(name):
    with pytest.raises(ImportError, match=f"{name} belongs to the authors' package, legrad_torch"):
        getattr(legrad, name)
