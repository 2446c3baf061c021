"""The command line of `legrad`: one module for each command.

Exit codes: 0 done; 1 invalid input or configuration; 2 environment error or bug; 3 finished, but shards are
damaged, failed or left; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from pipeline.cli.annotate import annotate
from pipeline.cli.common import ENVIRONMENT_ERROR, INVALID_INPUT, open_console
from pipeline.cli.compact import compact
from pipeline.cli.demo import demo
from pipeline.cli.evaluate import evaluate
from pipeline.cli.explain import explain
from pipeline.cli.export import export
from pipeline.cli.init import init
from pipeline.cli.models import models
from pipeline.cli.remask import remask
from pipeline.cli.report import report
from pipeline.cli.reproduce import reproduce
from pipeline.cli.shards import shards_app
from pipeline.cli.status import status
from pipeline.cli.tune import tune
from pipeline.errors import PipelineError, UserError
from pipeline.text import PrintableFormatter, printable_streams

USAGE_EXIT_CODE = 2  # typer's own

app = typer.Typer(
    name="legrad",
    help="LeGrad pseudo-masks for corpora of captioned images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # plain help and usage errors: rich's would bypass what makes text printable
    rich_markup_mode=None,
)
COMMANDS: dict[Callable[..., None], str] = {
    init: "Write a configuration for a corpus.",
    annotate: "Annotate shards: the main job.",
    remask: "Make masks anew from stored maps, without the model.",
    tune: "Find mask settings on stored maps and ground truth.",
    status: "Show progress: shards, samples and errors.",
    report: "Write an HTML page with pictures and statistics.",
    evaluate: "Score masks and heat maps against ground truth.",
    reproduce: "Reproduce the paper's tables from the owners' data.",
    export: "Convert masks to COCO, VOC, YOLO and others.",
    compact: "Copy a job's rows to fewer, larger files.",
    explain: "Draw heat maps of one image for some texts.",
    models: "List the open_clip models that can be explained.",
    demo: "Annotate and evaluate the bundled demo.",
}
for command, short_help in COMMANDS.items():
    app.command(short_help=short_help)(command)
app.add_typer(shards_app, short_help="Convert images with captions, or a dataset, to shards.")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        typer.echo(f"legrad {version('legrad-pipeline')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """LeGrad pseudo-masks for corpora of captioned images."""


def main() -> None:
    """Run the command line; an error of the user's input takes one screen, without a traceback."""
    # usage errors and libraries repeat what was typed
    with printable_streams(_without_secrets):
        # torch's threads share the cores with decoding; spinning while they wait costs more than it saves
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # what Ray passes on from its workers is made printable as a whole, and would show its colours as text
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        log = logging.StreamHandler()
        log.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[log])
        _run()


def _run() -> None:
    try:
        app()
    except SystemExit as ending:
        sys.exit(INVALID_INPUT if ending.code == USAGE_EXIT_CODE else ending.code)
    except PipelineError as error:
        from pipeline.storage import with_plain_paths

        text = with_plain_paths(_without_secrets(f"legrad: {error}"))
        open_console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
        sys.exit(INVALID_INPUT if isinstance(error, UserError) else ENVIRONMENT_ERROR)
    except Exception:
        sys.stderr.write(traceback.format_exc())
        sys.exit(ENVIRONMENT_ERROR)


def _without_secrets(text: str) -> str:
    # errors of libraries quote URLs with their signatures
    from pipeline.storage import shown_text

    return shown_text(text)
