"""Find out whether the installed `legrad` is this distribution's, which the authors' package can replace.

Their distribution, legrad_torch, installs a folder `legrad` too, and pip lets the later installation win.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import Distribution

DISTRIBUTION = "legrad-pipeline"  # legrad/__init__.py contains this name
MAX_FILES_NAMED = 8
_INIT = "legrad/__init__.py"


def problem_with_legrad() -> str | None:
    """Return what is wrong with the `legrad` that Python finds, and the way out; None if it is ours.

    It is not imported: the authors' package would import torch, and may fail.
    """
    spec = find_spec("legrad")
    if spec is None or spec.origin is None:
        return _explained(None)
    loader: Any = spec.loader
    return None if DISTRIBUTION.encode() in loader.get_data(spec.origin) else _explained(spec.origin)


def is_command() -> bool:
    """Return whether this process runs the command `legrad` or a module of this package."""
    from pathlib import PurePath

    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    # "-m" while Python imports the package of the module that it is to run
    return program == "-m" or PurePath(program).name == "legrad"


def _explained(origin: str | None) -> str:
    from importlib.metadata import distribution, packages_distributions
    from pathlib import PurePath

    owners = [distribution(name) for name in dict.fromkeys(packages_distributions().get("legrad", []))]
    ours = next((owner for owner in owners if owner.name == DISTRIBUTION), None)
    others = [owner for owner in owners if owner.name != DISTRIBUTION]
    places = {os.path.realpath(str(owner.locate_file(_INIT))) for owner in owners}
    if origin is not None and os.path.realpath(origin) not in places:
        return (
            f"Python finds another package named `legrad` first, not the one of {DISTRIBUTION}: {origin}\n"
            f"Way out: run in another folder, or remove {PurePath(origin).parents[1]} from "
            "PYTHONPATH"
        )
    return "\n".join([_found(origin, others), *_changed_files(ours), *_way_out(ours, others)])


def _found(origin: str | None, others: list[Distribution]) -> str:
    if origin is None:
        return (
            f"{_INIT} of {DISTRIBUTION} is missing. Uninstalling another distribution with a folder "
            "`legrad`, such as legrad_torch, removes it"
        )
    names = " and ".join(f"{other.name} {other.version}" for other in others)
    reason = f", but the one of {names}, which installs a folder `legrad` too" if names else ""
    return f"{origin} is not the file of {DISTRIBUTION}{reason}"


def _changed_files(ours: Distribution | None) -> Iterator[str]:
    """Yield lines that name the files of ours that are missing or no longer as they were installed."""
    import base64
    import hashlib

    changed: dict[str, list[str]] = {"replaced": [], "missing": []}
    for file in (ours.files if ours else None) or []:
        if file.parts[0] != "legrad" or file.hash is None:
            continue
        try:
            digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
        except FileNotFoundError:
            changed["missing"].append(str(file))
            continue
        if base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value:
            changed["replaced"].append(str(file))
    for state, names in changed.items():
        if names:
            further = len(names) - MAX_FILES_NAMED
            more = f" and {further} more" if further > 0 else ""
            yield f"Files of {DISTRIBUTION} that are {state}: {', '.join(names[:MAX_FILES_NAMED])}{more}"


def _way_out(ours: Distribution | None, others: list[Distribution]) -> Iterator[str]:
    yield f"Way out, for an environment with {DISTRIBUTION} alone:"
    if others:
        yield f"  python -m pip uninstall -y {' '.join(other.name for other in others)}"
    yield f"  python -m pip install --force-reinstall --no-deps {_requirement(ours)}"
    yield "To use both packages, install each in an environment of its own: legrad/README.md, 'Beside the"
    yield "authors' package', shows how, and how to compare their maps"


def _requirement(ours: Distribution | None) -> str:
    """Return what pip has to be given to install this distribution again from where it came."""
    import json
    from shlex import quote

    record = json.loads((ours.read_text("direct_url.json") if ours else None) or "{}")
    if "url" not in record:
        return DISTRIBUTION
    if record.get("dir_info", {}).get("editable"):
        return f"--editable {quote(record['url'])}"
    return quote(f"{record['vcs_info']['vcs']}+{record['url']}" if "vcs_info" in record else record["url"])
