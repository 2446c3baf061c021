"""The `models` command."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.common import open_console


def models(
    refused: Annotated[
        bool, typer.Option("--refused", help="Also list the models that cannot be explained, and why.")
    ] = False,
    fetch: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="NAME TAG",
            help="Download the files of this model into HF_HOME and load it once, instead of listing; TAG is "
            "null for hf-hub:...",
        ),
    ] = None,
) -> None:
    """List the open_clip models that can be explained, with their family; or fetch one ahead of a job."""
    if fetch:
        name, tag = fetch
        _fetch(name, None if tag == "null" else tag)
    else:
        _list(refused=refused)


def _fetch(name: str, tag: str | None) -> None:
    from pipeline.annotate.model import load_explainer
    from pipeline.cli.explain import model_named

    explainer = load_explainer(
        model_named(name, tag, tag_option="--fetch", without_tag="pass null as TAG"), "cpu"
    )
    open_console().print(f"{name} {tag or 'null'}: {explainer.tower.family}; its files are downloaded")


def _list(*, refused: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    import legrad

    table = Table("model", "family, or why it is refused" if refused else "family")
    models_known = legrad.supported_models()
    supported = [name for name, support in models_known.items() if support.family is not None]
    for name, support in models_known.items():
        if support.family is not None:
            table.add_row(name, support.family)
        elif refused:
            table.add_row(name, Text(support.reason or "", style="dim"))
    console = open_console()
    console.print(table)
    console.print(
        f"{len(supported)} of {len(models_known)} open_clip models are supported; --refused lists the others"
    )
