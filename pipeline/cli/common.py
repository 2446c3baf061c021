"""What the commands share: exit codes, arguments, and the console that they print to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.console import PatientConsole

INVALID_INPUT, ENVIRONMENT_ERROR, INCOMPLETE = 1, 2, 3


def open_console(*, stderr: bool = False) -> PatientConsole:
    """Return a console that shows untrusted text as text."""
    # imported here: rich and pyarrow are not needed for --help
    from pipeline.console import PatientConsole

    return PatientConsole(stderr=stderr)


def checked_folder(url: str) -> str:
    """Return the URL of a folder; raises UserError if it cannot be one that is read and written."""
    import os

    from pipeline import storage
    from pipeline.errors import UserError
    from pipeline.storage.urls import is_local, local_path

    storage.check_folder(url)
    if is_local(url) and os.path.isfile(local_path(url)):  # noqa: PTH113 (false where a path cannot be looked at)
        raise UserError(f"{url}: is a file; expected a folder")
    return url


OutputDir = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        help="Output folder of a job: local path, s3:// or gs://.",
        callback=checked_folder,
    ),
]
Destination = Annotated[
    str,
    typer.Argument(
        metavar="DEST",
        help="Folder for the new files, which holds nothing else: local path, s3:// or gs://.",
        callback=checked_folder,
    ),
]
