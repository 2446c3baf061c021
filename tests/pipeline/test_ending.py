"""Exit codes in spite of native code that breaks after Python has ended."""

import subprocess
import sys

import pytest

BREAKS_AT_EXIT = "import ctypes, sys; libc = ctypes.CDLL(None); libc.on_exit(libc.abort, None)\n"


def ended(program, *arguments):
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
def test_the_command_line_keeps_its_exit_code_and_all_it_said(argument, code):
    process = ended("from pipeline.__main__ import run; run()", argument)
    assert process.returncode == code, process.stderr
    assert "annotate" in process.stdout or "nonsense" in process.stderr


def test_exit_handlers_of_what_is_imported_later_still_run():
    process = ended(
        "from pipeline.process.ending import skip_native_exit\n"
        "end_with = skip_native_exit()\n"
        "import atexit; atexit.register(print, 'tidied up')\n"
        "end_with(7)\n"
    )
    assert (process.returncode, process.stdout) == (7, "tidied up\n")


def test_an_uncaught_exception_ends_as_usual():
    process = ended("from pipeline.process.ending import skip_native_exit; skip_native_exit(); 1 / 0")
    assert process.returncode < 0
    assert "ZeroDivisionError" in process.stderr
