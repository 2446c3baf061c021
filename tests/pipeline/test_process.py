"""The process of a command: what libraries need of it where pods lack it, and its exit code."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.process import (
    CACHE_VARIABLES,
    READ_CACHES,
    SIGTERM_EXIT_CODE,
    exit_on_sigterm,
    prepare_environment,
)

BREAKS_AT_EXIT = "import ctypes, sys; libc = ctypes.CDLL(None); libc.on_exit(libc.abort, None)\n"


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Return a function that prepares a copy of the environment and returns it.

    Temporary files go to tmp_path; there is no user name, and no setting of Ray or of caches.
    """
    names = ("LOGNAME", "USER", "LNAME", "USERNAME", "RAY_TMPDIR", *CACHE_VARIABLES, *READ_CACHES)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def prepare():
        environ = dict(os.environ)
        prepare_environment(environ)
        return environ

    return prepare


def make_unwritable(monkeypatch, *folders):
    """Let folders look unwritable, also to root."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in folders and real(path, mode))


def test_a_writable_home_is_kept(prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = prepared()
    assert environ["HOME"] == str(tmp_path)
    assert "MPLCONFIGDIR" not in environ


@pytest.mark.parametrize("home", [None, "", "/no/such/folder", "relative"])
def test_a_missing_home_is_replaced_by_a_folder_that_only_this_user_can_read(prepared, monkeypatch, home):
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    made = prepared()["HOME"]
    assert Path(made).stat().st_mode & 0o777 == 0o700


def test_a_private_folder_that_others_can_write_is_not_used(prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/no/such/folder")
    (tmp_path / f"legrad-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"legrad-{os.getuid()}").chmod(0o777)
    made = prepared()["HOME"]
    assert made != str(tmp_path / f"legrad-{os.getuid()}")
    assert made.startswith(str(tmp_path))


def test_an_unwritable_home_keeps_the_caches_that_exist_there(prepared, monkeypatch, tmp_path):
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    make_unwritable(monkeypatch, str(home))
    environ = prepared()
    assert environ["HOME"] == str(home)
    assert "HF_HOME" not in environ
    for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_HOME"):
        assert environ[name].startswith(str(tmp_path))


def test_an_account_without_a_name_gets_one(prepared, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert prepared()["USER"] == "uid12345"
    monkeypatch.setenv("LOGNAME", "me")
    assert "USER" not in prepared()


def test_an_unusable_temporary_folder_is_replaced_and_none_at_all_is_an_error(prepared, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    assert Path(prepared()["TMPDIR"]).is_dir()

    def nowhere():
        raise FileNotFoundError

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(UserError, match="set TMPDIR"):
        prepared()


@pytest.mark.parametrize("name", ["x" * 60, "é", "a b"])
def test_ray_gets_another_temporary_folder_where_it_cannot_use_the_given_one(
    prepared, monkeypatch, tmp_path, name
):
    (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    environ = prepared()
    assert environ["TMPDIR"] == str(tmp_path / name)
    assert environ["RAY_TMPDIR"] == "/tmp"


@pytest.mark.parametrize("raised", [None, SystemExit(15)])
def test_sigterm_ends_a_block_with_143_whatever_is_raised_meanwhile_and_the_handler_is_restored(raised):
    before = signal.getsignal(signal.SIGTERM)

    def block():
        with exit_on_sigterm():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                # Ray replaces the exception while it waits
                if raised is not None:
                    raise raised

    with pytest.raises(SystemExit) as ended:
        block()
    assert ended.value.code == SIGTERM_EXIT_CODE
    assert signal.getsignal(signal.SIGTERM) is before


def ended(program, *arguments):
    """Run a program whose native code aborts after Python has ended; return the finished process."""
    return subprocess.run(
        [sys.executable, "-c", BREAKS_AT_EXIT + program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_injected_fault_spoils_an_exit_code():
    assert ended("print('done')").returncode < 0


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("nonsense", 1)])
def test_the_command_line_keeps_its_exit_code_and_its_output(argument, code):
    process = ended("from pipeline.__main__ import run; run()", argument)
    assert process.returncode == code, process.stderr
    assert "annotate" in process.stdout or "nonsense" in process.stderr


def test_exit_handlers_of_later_imports_still_run():
    process = ended(
        "from pipeline.process import skip_native_exit\n"
        "end_with = skip_native_exit()\n"
        "import atexit; atexit.register(print, 'tidied up')\n"
        "end_with(7)\n"
    )
    assert (process.returncode, process.stdout) == (7, "tidied up\n")


def test_an_uncaught_exception_ends_as_usual():
    process = ended("from pipeline.process import skip_native_exit; skip_native_exit(); 1 / 0")
    assert process.returncode < 0
    assert "ZeroDivisionError" in process.stderr
