"""The `reproduce` command: the paper's tables from a folder of the owners' data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import INCOMPLETE, checked_folder, open_console

if TYPE_CHECKING:
    from pipeline.config.schema import ModelConfig
    from pipeline.console import PatientConsole
    from pipeline.reproduce.owners_data import Found, Missing
    from pipeline.reproduce.run import Listener, Reproduced

LINE_INTERVAL_S = 30


def reproduce(
    root: Annotated[
        Path,
        typer.Argument(
            metavar="ROOT",
            help="Folder with the owners' data: ImageNetS919, openimages and imagenet/val, or some of them.",
        ),
    ],
    *,
    only: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Make one table alone: imagenet-s, openimages-v7 or perturbation."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of an open_clip model, hf-hub:..., local-dir:..., or demo. Default: ViT-B-16 with "
            "laion2b_s34b_b88k.",
        ),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(metavar="TAG", help="Pretrained tag, or path of a checkpoint.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=1,
            help="Side of the model's input; default: 448 for the paper's models, else the model's own.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Measure at most N images of each table, a random sample."),
    ] = None,
    to: Annotated[
        str,
        typer.Option(metavar="DEST", help="Local folder for the results of images and the tables."),
    ] = "out/reproduce",
) -> None:
    """Reproduce the paper's tables from the owners' data, with the paper's figures beside.

    Nothing is downloaded. Run the same command again to resume.
    """
    from pipeline.cli.explain import model_named
    from pipeline.reproduce import paper
    from pipeline.reproduce.run import look_for

    checked_folder(to)
    looked = look_for(root, only)
    chosen = model_named(model, pretrained, layers="all", precision="fp32")
    size = image_size or (paper.IMAGE_SIZE if chosen.name in paper.ARCHITECTURES else None)
    console = open_console()
    result = _run(looked, chosen.model_copy(update={"image_size": size}), to, limit, console)
    for line in _result_lines(result, to):
        _print(console, line)
    if not result.is_complete:
        raise typer.Exit(INCOMPLETE)


def _run(
    looked: dict[str, Found | Missing],
    model: ModelConfig,
    to: str,
    limit: int | None,
    console: PatientConsole,
) -> Reproduced:
    import torch

    from legrad.errors import LeGradError
    from pipeline.errors import UserError
    from pipeline.reproduce.run import reproduce

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return reproduce(looked, model, device, to, limit=limit, listener=_listener(console))
    except LeGradError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        _print(console, "Interrupted. Run the same command again to resume.")
        raise


def _listener(console: PatientConsole) -> Listener:
    """Return what prints a line for each table, and then one every LINE_INTERVAL_S."""
    from pipeline.reproduce.run import Listener

    last_s = [time.monotonic()]

    def found(name: str, data: Found, wanted: int, done: int) -> None:
        earlier = f", {done:,} of them measured before" if done else ""
        _print(console, f"{name}: {wanted:,} images in {data.place}{earlier}")

    def advanced(name: str, done: int, wanted: int) -> None:
        if time.monotonic() - last_s[0] >= LINE_INTERVAL_S:
            last_s[0] = time.monotonic()
            _print(console, f"{name}: {done:,} of {wanted:,} images")

    return Listener(found, advanced)


def _print(console: PatientConsole, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _result_lines(result: Reproduced, to: str) -> list[str]:
    from pipeline import storage
    from pipeline.reproduce.run import (
        JSON_SUFFIX,
        MARKDOWN_SUFFIX,
        MAX_ERROR_SHARE,
        RESULTS_SUFFIX,
        missing_lines,
    )

    shown = storage.shown_url(to)
    lines = [""]
    for table in result.tables:
        files = (f"{table.name}{suffix}" for suffix in (MARKDOWN_SUFFIX, JSON_SUFFIX))
        written = ", ".join(storage.join_url(shown, file) for file in files)
        lines += [table.as_markdown(), f"written: {written}", ""]
    if result.missing:
        lines += ["Not made, because data is missing:", *missing_lines(result.missing)]
    for name in result.failing:
        lines.append(
            f"{name}: more than {MAX_ERROR_SHARE:.0%} of the images cannot be read, or none can be used; see "
            f"{storage.join_url(shown, f'{name}{RESULTS_SUFFIX}')}"
        )
    return lines
