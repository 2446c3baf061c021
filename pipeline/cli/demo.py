"""The `demo` command: the whole pipeline on what the package ships."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds
from rich.table import Table
from rich.text import Text

from pipeline.config.load import load_config
from pipeline.config.schema import JobConfig
from pipeline.console import PrintableConsole
from pipeline.demo import assets
from pipeline.evaluation.evaluate import evaluate_output, render_evaluation
from pipeline.report import REPORT_FILE, write_report
from pipeline.report.contact_sheet import write_contact_sheet
from pipeline.run.command import annotate_with_config

SHOWN_ROWS = 6
ROW_COLUMNS = ("key", "prompt", "similarity", "peak", "area", "bbox_xywh")
SET_TITLES = {
    "heldout": "Held-out scenes: artists of the training, new scenes, new backgrounds",
    "newartist": "Another artist: neither sprites nor backgrounds were ever trained on",
}


def run_demo(out: Path, console: PrintableConsole) -> int:
    """Annotate the shipped shards, evaluate them, draw a contact sheet and write a report.

    Returns:
        The exit code of the annotation.

    Raises:
        PipelineError: as the annotation, the evaluation and the report do.
    """
    config = demo_config(out)
    exit_code = annotate_with_config(config, console)
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
    shown = [str(path) for path in assets.demo_shard_paths("heldout")]
    write_contact_sheet(str(out), shown, out / "contact_sheet.png")
    write_report(str(out), classes_file=str(assets.demo_classes_path()))
    _show_written(out, console)
    return exit_code


def demo_config(out: Path) -> JobConfig:
    """The shipped configuration, on the shipped shards, writing into `out`."""
    config = load_config(assets.demo_config_path())
    shards = [str(path) for name in SET_TITLES for path in assets.demo_shard_paths(name)]
    return config.model_copy(
        update={
            "input": config.input.model_copy(update={"shards": shards}),
            "output": config.output.model_copy(update={"dir": str(out)}),
        }
    )


def _show_rows(out: Path, console: PrintableConsole) -> None:
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


def _show_written(out: Path, console: PrintableConsole) -> None:
    table = Table("file", "bytes", "what it is", title="Written", title_justify="left")
    kinds = {
        "job.json": "configuration, versions, digests",
        "shards.parquet": "the list of shards",
        "annotations": "one file a shard: masks, scores, heat maps",
        "errors": "one file a shard: what went wrong",
        "_SUCCESS": "totals",
        "evaluation-heldout.json": "scores on the held-out scenes",
        "evaluation-newartist.json": "scores on the other artist's scenes",
        "evaluation-heldout.png": "the scores as a plot",
        "evaluation-newartist.png": "the same of the other artist's scenes",
        "contact_sheet.png": "scenes chosen at random",
        REPORT_FILE: "pictures, distributions, provenance; open it in a browser",
    }
    for name, meaning in kinds.items():
        path = out / name
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        shown = f"{path}/ ({len(files)} files)" if path.is_dir() else str(path)
        table.add_row(shown, f"{sum(file.stat().st_size for file in files):,}", meaning)
    console.print(table)
    console.print(f"Picture: {out / 'contact_sheet.png'}", soft_wrap=True)
    console.print(f"Report: {(out / REPORT_FILE).absolute().as_uri()}", soft_wrap=True)
