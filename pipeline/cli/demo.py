"""The `demo` command: the whole pipeline on the shards and the model that the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.annotate import annotate_with_config
from pipeline.cli.common import open_console

if TYPE_CHECKING:
    from pipeline.config.schema import JobConfig
    from pipeline.console import PrintableConsole

SHOWN_ROWS = 6
ROW_COLUMNS = ("key", "prompt", "similarity", "peak", "area", "bbox_xywh")
SET_TITLES = {
    "heldout": "Held-out scenes: sprites by the artists of the training set, on new backgrounds",
    "newartist": "Another artist: neither the sprites nor the backgrounds were in the training set",
}
CONTACT_SHEET, REPORT = "contact_sheet.png", "report.html"
FILES = {
    "job.json": "configuration, versions, digests",
    "shards.parquet": "the list of shards",
    "annotations": "one file a shard: masks, scores, heat maps",
    "errors": "one file a shard: samples and prompts that failed",
    "_SUCCESS": "total counts",
    "evaluation-heldout.json": "scores on the held-out scenes",
    "evaluation-newartist.json": "scores on the other artist's scenes",
    "evaluation-heldout.png": "scores on the held-out scenes, as a plot",
    "evaluation-newartist.png": "scores on the other artist's scenes, as a plot",
    CONTACT_SHEET: "scenes chosen at random, with their masks",
    REPORT: "pictures, distributions, provenance; open it in a browser",
}


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")] = Path("out/demo"),
) -> None:
    """Annotate the shipped shards with the shipped model, then evaluate, draw a contact sheet and report."""
    raise typer.Exit(run_demo(out, open_console()))


def run_demo(out: Path, console: PrintableConsole) -> int:
    """Annotate the shipped shards, evaluate them, draw a contact sheet and write a report.

    Returns:
        The exit code of the annotation.

    Raises:
        PipelineError: as the annotation, the evaluation and the report do.
    """
    from pipeline.demo import assets
    from pipeline.evaluation.evaluate import evaluate_output
    from pipeline.evaluation.rendering import render_evaluation
    from pipeline.report import write_report
    from pipeline.report.contact_sheet import write_contact_sheet

    exit_code = annotate_with_config(demo_config(out), console)
    if exit_code:
        return exit_code
    _show_rows(out, console)
    for set_name, title in SET_TITLES.items():
        console.rule(title)
        shards = [str(path) for path in assets.demo_shard_paths(set_name)]
        found = evaluate_output(
            str(out), shards, assets.demo_classes_path(), result_name=f"evaluation-{set_name}.json"
        )
        console.print(render_evaluation(found))
    drawn = [str(path) for path in assets.demo_shard_paths("heldout")]
    write_contact_sheet(str(out), drawn, out / CONTACT_SHEET)
    write_report(str(out), classes_file=str(assets.demo_classes_path()))
    _show_files(out, console)
    return exit_code


def demo_config(out: Path) -> JobConfig:
    """Return the shipped configuration, for the shipped shards, with `out` as output folder."""
    from pipeline.config.load import load_config
    from pipeline.demo import assets

    config = load_config(assets.demo_config_path())
    shards = [str(path) for name in SET_TITLES for path in assets.demo_shard_paths(name)]
    return config.model_copy(
        update={
            "input": config.input.model_copy(update={"shards": shards}),
            "output": config.output.model_copy(update={"dir": str(out)}),
        }
    )


def _show_rows(out: Path, console: PrintableConsole) -> None:
    import pyarrow.dataset as ds
    from rich.table import Table
    from rich.text import Text

    rows = (
        ds.dataset(out / "annotations", format="parquet")
        .head(SHOWN_ROWS, columns=list(ROW_COLUMNS))
        .to_pylist()
    )
    table = Table(*ROW_COLUMNS, title=f"A few rows of {out}/annotations", title_justify="left")
    for row in rows:
        box = ", ".join(f"{value:g}" for value in row["bbox_xywh"])
        figures = (f"{row['similarity']:.3f}", f"{row['peak']:.5f}", f"{row['area']:,}", box)
        table.add_row(Text(row["key"]), Text(row["prompt"]), *figures)
    console.print(table)


def _show_files(out: Path, console: PrintableConsole) -> None:
    from rich.table import Table

    table = Table("file", "bytes", "content", title="Files written", title_justify="left")
    for name, content in FILES.items():
        path = out / name
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        shown = f"{path}/ ({len(files)} files)" if path.is_dir() else str(path)
        table.add_row(shown, f"{sum(file.stat().st_size for file in files):,}", content)
    console.print(table)
    console.print(f"Contact sheet: {out / CONTACT_SHEET}", soft_wrap=True)
    console.print(f"Report: {(out / REPORT).absolute().as_uri()}", soft_wrap=True)
