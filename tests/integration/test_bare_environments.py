"""Whole runs in processes without home, user name, usable temporary folder or UTF-8."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.corpus import demo_job, write_corpus

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
# a pod's user: no entry in passwd, no home; reads what root reads, for Python may be installed in root's home
NOBODY = [
    *("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]
CAPTION = "a dog, 犬"


@pytest.fixture
def job(tmp_path):
    """A folder that everybody may write to, with a job on a corpus whose captions are not ASCII."""
    folder = tmp_path / "漢字 é"
    folder.mkdir()
    write_corpus(folder / "in", 1, 2, caption=CAPTION)
    config = demo_job([folder / "in" / "*.tar"], folder / "out", model={"layers": 1}, run={"workers": 1})
    document = config.model_dump(mode="json", exclude={"views"})
    (folder / "job.yaml").write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    folder.chmod(0o777)
    return folder


def run(folder, *arguments, prefix=(), **environ):
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*prefix, sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=folder,
        env={**kept, **environ},
        capture_output=True,
        timeout=600,
        check=False,
    )


def as_nobody():
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become somebody else")
    return NOBODY


def assert_annotated(ended, folder):
    said = (ended.stdout + ended.stderr).decode("utf-8", "replace")
    assert ended.returncode == 0, said
    assert "Traceback" not in said
    assert (folder / "out" / "_SUCCESS").exists()


def test_a_job_runs_for_a_user_without_name_and_home(job):
    assert_annotated(run(job, "annotate", "job.yaml", prefix=as_nobody()), job)
    for arguments in (["status", "out"], ["report", "out"]):
        assert run(job, *arguments, prefix=NOBODY).returncode == 0


def test_a_job_runs_with_an_unwritable_home_and_temporary_folder(job):
    (job / "home").mkdir(mode=0o755)
    unusable = {"HOME": str(job / "home"), "TMPDIR": str(job / "home")}
    assert_annotated(run(job, "annotate", "job.yaml", prefix=as_nobody(), **unusable), job)
    assert list((job / "home").iterdir()) == []


def test_a_job_runs_with_a_long_temporary_folder(job):
    long = job / ("x" * 120)
    long.mkdir()
    assert_annotated(run(job, "annotate", "job.yaml", HOME=str(job), TMPDIR=str(long)), job)


def test_a_job_runs_on_a_terminal_that_accepts_only_ascii(job):
    ascii_alone = {"HOME": str(job), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    assert_annotated(run(job, "annotate", "job.yaml", **ascii_alone), job)
    for arguments in (
        ["status", job / "out"],
        ["report", job / "out"],
        ["annotate", "job.yaml", "--dry-run"],
    ):
        ended = run(job, *arguments, **ascii_alone)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.isascii()


def test_a_locale_that_cannot_encode_the_paths_is_an_error_of_one_line(job):
    no_utf8 = {"HOME": str(job), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = run(job, "annotate", "job.yaml", **no_utf8)
    said = ended.stderr.decode()
    assert ended.returncode == 1, said
    assert "PYTHONUTF8=1" in said
    assert "Traceback" not in said
