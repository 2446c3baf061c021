"""The `init` command: look at a corpus, and write a configuration for it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import open_console
from pipeline.cli.explain import DEFAULT_MODEL, DEFAULT_TAG, model_named
from pipeline.errors import OutputError, UserError


def init(
    corpus: Annotated[
        str,
        typer.Argument(
            metavar="CORPUS", help="The shards: a folder of tars, or a pattern as input.shards takes it."
        ),
    ],
    *,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", metavar="FILE", help="File to write. Without it, the text goes to the standard output."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE if it exists.")] = False,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Model to name: of open_clip, hf-hub:..., or demo.")
    ] = DEFAULT_MODEL,
    pretrained: Annotated[
        str | None,
        typer.Option(
            metavar="TAG",
            help=f"Pretrained tag, or path of a checkpoint. Default for {DEFAULT_MODEL}: {DEFAULT_TAG}.",
        ),
    ] = None,
) -> None:
    """Look at three shards of a corpus, and write a configuration with comments for it.

    A folder of images or Parquet files has no shards yet: the message names the command that makes them.
    """
    chosen = model_named(model, pretrained)
    if to is not None and to.is_dir():
        raise UserError(f"--to: {to} is a folder, and a file is expected")
    if to is not None and to.exists() and not force:
        raise UserError(f"--to: {to} exists; --force overwrites it")
    from pipeline.corpus.first_config import first_config

    found = first_config(corpus, chosen)
    said = open_console(stderr=to is None)
    if to is None:
        open_console().print(found.text.rstrip(), soft_wrap=True)
        again = shlex.join(["legrad", "init", corpus, "--to", "job.yaml"])
        said.print(f"Not written to a file; to do so: {again}", soft_wrap=True)
    else:
        _write(to, found.text)
        looked = f"{found.samples:,} samples of {found.shards} shard(s)"
        said.print(f"{to}: written, from a look at {looked}", soft_wrap=True)
    file = shlex.quote(str(to or "job.yaml"))
    said.print("Next:", soft_wrap=True)
    for line in (*found.to_do, f"legrad annotate {file} --dry-run", f"legrad annotate {file}"):
        said.print(f"  {line}", soft_wrap=True)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise OutputError(f"--to: {file} cannot be written: {error.strerror or error}") from error
