"""What libraries find of the process around them, where pods and plain accounts lack it."""

import os
import tempfile
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.process.surroundings import CACHE_VARIABLES, READ_CACHES, settle_in


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files that is looked up anew; no name, no settings of ray or caches."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "RAY_TMPDIR", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in (*CACHE_VARIABLES, *READ_CACHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def settled():
    environ = dict(os.environ)
    settle_in(environ)
    return environ


def unwritable(monkeypatch, *folders):
    """The tests may run as root, who can write anywhere."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in folders and real(path, mode))


def test_a_home_that_is_there_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = settled()
    assert environ["HOME"] == str(tmp_path)
    assert "MPLCONFIGDIR" not in environ


@pytest.mark.parametrize("home", [None, "", "/no/such/folder", "relative"])
def test_a_home_that_is_missing_is_made_where_this_user_alone_can_look(monkeypatch, home):
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    made = settled()["HOME"]
    assert Path(made).stat().st_mode & 0o777 == 0o700


def test_a_private_folder_of_someone_else_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/no/such/folder")
    (tmp_path / f"legrad-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"legrad-{os.getuid()}").chmod(0o777)
    made = settled()["HOME"]
    assert made != str(tmp_path / f"legrad-{os.getuid()}")
    assert made.startswith(str(tmp_path))


def test_a_home_that_cannot_be_written_keeps_what_is_read_there(monkeypatch, tmp_path):
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    unwritable(monkeypatch, str(home))
    environ = settled()
    assert environ["HOME"] == str(home)
    assert "HF_HOME" not in environ
    for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_HOME"):
        assert environ[name].startswith(str(tmp_path))


def test_an_account_without_a_name_gets_one(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert settled()["USER"] == "uid12345"
    monkeypatch.setenv("LOGNAME", "me")
    assert "USER" not in settled()


def test_a_temporary_folder_that_cannot_be_used_is_replaced_and_none_at_all_is_told(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    assert Path(settled()["TMPDIR"]).is_dir()

    def nowhere():
        raise FileNotFoundError

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(UserError, match="set TMPDIR"):
        settled()


@pytest.mark.parametrize("name", ["x" * 60, "é", "a b"])
def test_a_temporary_folder_that_ray_cannot_use_is_left_to_others(monkeypatch, tmp_path, name):
    (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    environ = settled()
    assert environ["TMPDIR"] == str(tmp_path / name)
    assert environ["RAY_TMPDIR"] == "/tmp"
