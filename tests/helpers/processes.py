"""The environment of processes that tests start."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def python_path() -> str:
    """Return the PYTHONPATH with which another process, such as a Ray worker, imports `tests.helpers`."""
    return os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
