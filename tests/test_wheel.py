"""The wheel: what it contains, and that it works where nothing else of the repository is.

Also beside the authors' package, which installs a folder of the same name: by a stand-in with its file names.
"""

import base64
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
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
        "legrad/supported_models.json",
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


THEIR_FILES = {
    "legrad/__init__.py": "from .wrapper import LeWrapper, LePreprocess\nfrom .utils import *\n",
    "legrad/wrapper.py": "class LeWrapper: pass\nclass LePreprocess: pass\n",
    "legrad/utils.py": "def list_pretrained(): return []\n",
    "legrad_torch-1.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: legrad-torch\nVersion: 1.1\n",
    "legrad_torch-1.1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "legrad_torch-1.1.dist-info/top_level.txt": "legrad\n",
}


@pytest.fixture(scope="module")
def their_wheel(tmp_path_factory):
    """A wheel with the file names of legrad_torch 1.1."""
    path = tmp_path_factory.mktemp("theirs") / "legrad_torch-1.1-py3-none-any.whl"
    record = "legrad_torch-1.1.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as archive:
        lines = []
        for name, text in THEIR_FILES.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
            lines.append(f"{name},sha256={digest},{len(text)}")
            archive.writestr(name, text)
        archive.writestr(record, "\n".join([*lines, f"{record},,", ""]))
    return path


class Environment:
    """A virtual environment that finds this one's packages after its own."""

    def __init__(self, folder):
        venv.create(folder)
        self.bin = folder / "bin"
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"])
        hidden = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}
        self.settings = {
            "cwd": folder,
            "env": {name: value for name, value in os.environ.items() if name not in hidden},
        }

    def pip(self, *arguments):
        run([*PIP, "--python", self.bin / "python", *arguments], **self.settings)

    def install(self, path):
        self.pip("install", "--no-deps", path)

    def run(self, *command):
        """Run a program of this environment; return exit code, standard output and standard error."""
        ended = subprocess.run(
            [self.bin / command[0], *command[1:]],
            check=False,
            capture_output=True,
            text=True,
            **self.settings,
        )
        return ended.returncode, ended.stdout, ended.stderr

    def follow(self, message):
        """Run the commands that a message names."""
        commands = re.findall(r"^  python -m pip (.*)$", message, re.MULTILINE)
        assert commands
        for command in commands:
            self.pip(*shlex.split(command))


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


def test_where_the_authors_package_has_replaced_ours_the_command_says_so_and_the_way_out_works(
    environment, wheel, their_wheel
):
    environment.install(wheel)
    environment.install(their_wheel)
    for command in (["legrad", "status", "out"], ["python", "-m", "pipeline", "models"]):
        code, out, message = environment.run(*command)
        assert (code, out) == (2, "")
        assert "legrad-torch 1.1, which installs a folder `legrad` too" in message
        assert "that are replaced: legrad/__init__.py\n" in message
        assert "missing" not in message
        assert "Traceback" not in message
        assert len(message.splitlines()) < 12
    code, _, failure = environment.run("python", "-c", "import pipeline.training")
    assert code == 1
    assert f"ImportError: {message.removeprefix('legrad: ')}" in failure
    environment.follow(message)
    assert environment.run("legrad", "models")[0] == 0
    assert environment.run("python", "-c", "import legrad.wrapper")[0] == 1


def test_where_ours_has_replaced_the_authors_package_ours_works_and_their_names_are_explained(
    environment, wheel, their_wheel
):
    environment.install(their_wheel)
    environment.install(wheel)
    assert environment.run("legrad", "models")[0] == 0
    code, _, message = environment.run("python", "-c", "from legrad import LeWrapper")
    assert code == 1
    assert "LeWrapper belongs to the authors' package, legrad_torch" in message
    environment.pip("uninstall", "-y", "legrad_torch")  # and with it, our legrad/__init__.py
    code, _, message = environment.run("legrad", "models")
    assert code == 2
    assert "legrad/__init__.py of legrad-pipeline is missing" in message
    environment.follow(message)
    assert environment.run("legrad", "models")[0] == 0
