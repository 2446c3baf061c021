"""What calls of the library are refused with, in a process where shapes are not checked, as for users."""

import json
import subprocess
import sys
from collections.abc import Iterable

from tests.helpers.processes import REPOSITORY

_CALLS = """
import json as _json, sys as _sys
from legrad import InputError as _InputError

_said = {}
for _call in _json.load(_sys.stdin):
    try:
        exec(_call)
    except _InputError as _error:
        _said[_call] = str(_error)
print(_json.dumps(_said))
"""


def messages_of(calls: Iterable[str], setup: str) -> dict[str, str]:
    """Return the message of the InputError of each call that raises one.

    Args:
        calls: statements of Python, run one after the other.
        setup: code that defines the names that they use.
    """
    finished = subprocess.run(
        [sys.executable, "-c", setup + _CALLS],
        input=json.dumps(list(calls)),
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    return json.loads(finished.stdout)
