"""The command line of `legrad`: annotate, status, report, evaluate, export, shards, explain, models, demo.

Exit codes: 0 done; 1 the user's mistake; 2 the environment's or our own fault; 3 finished with shards failed
or left; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from pipeline.config import load_config
from pipeline.errors import PipelineError, UserError
from pipeline.progress import PatientConsole
from pipeline.readers.commands import shards_app
from pipeline.storage import shown_text
from pipeline.text import PrintableFormatter, printable_streams

USAGE_EXIT_CODE = 2  # typer's own
USER_MISTAKE, FAULT, INCOMPLETE = 1, 2, 3

app = typer.Typer(
    name="legrad",
    help="LeGrad pseudo-masks for corpora of captioned images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # plain help and usage errors: rich's would bypass what makes text printable
    rich_markup_mode=None,
)
app.add_typer(shards_app)
console = PatientConsole()
error_console = PatientConsole(stderr=True)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")]
TruthShards = Annotated[
    list[str], typer.Argument(metavar="SHARDS...", help="Annotated shards, with seg.png.")
]


def _folder(url: str) -> str:
    from pipeline import storage

    storage.check_folder(url)
    return url


OutputDir = Annotated[
    str,
    typer.Argument(
        metavar="OUT", help="Output folder of a job: local path, s3:// or gs://.", callback=_folder
    ),
]


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"legrad {version('legrad-pipeline')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and end."),
    ] = False,
) -> None:
    """LeGrad pseudo-masks for corpora of captioned images."""


@app.command()
def annotate(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG.yaml", help="The job's configuration: a path or a URL.")
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the shards and estimate; nothing is started or written.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Do N shards, spread evenly, and extrapolate to all."),
    ] = None,
    moved: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="Shards that lay in the folder OLD when they were annotated lie in NEW now, and are not "
            "annotated again. Repeatable.",
        ),
    ] = None,
) -> None:
    """Annotate shards: the main job. Runs here, or on the cluster that RAY_ADDRESS names."""
    from pipeline.annotate_job import annotate_with_config, tell_dry_run

    settings = load_config(config, overrides or ())
    if dry_run:
        tell_dry_run(settings, console, moved or ())
        return
    raise typer.Exit(annotate_with_config(settings, console, max_shards=limit, moves=moved or ()))


@app.command()
def status(out: OutputDir) -> None:
    """Show shards done, failed and left, samples and errors. Exit code 0: complete, 3: incomplete."""
    from pipeline.status import read_status, render_status

    found = read_status(out)
    console.print(render_status(found))
    raise typer.Exit(0 if found.complete else INCOMPLETE)


@app.command()
def evaluate(
    out: OutputDir,
    shards: TruthShards,
    classes: Annotated[
        str | None, typer.Option(help="File of the classes: line i of a .txt names class i; or .yaml.")
    ] = None,
    *,
    perturbation: Annotated[
        bool,
        typer.Option("--perturbation", help="Also hide patches by each map and ask the model again; slow."),
    ] = False,
    scenes: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many scenes --perturbation takes.")
    ] = 50,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The job's model, repeated, where it is a path or a hub's address."
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            metavar="P", help="The job's weights, if they are a file: repeated, or where it is now."
        ),
    ] = None,
) -> None:
    """Score masks and maps against ground truth in the shards, beside baselines on the same model."""
    from pipeline.evaluation.evaluate import evaluate_output, render_evaluation

    found = evaluate_output(
        out,
        shards,
        classes,
        perturbed_scenes=scenes if perturbation else 0,
        model_name=model,
        pretrained=pretrained,
    )
    console.print(render_evaluation(found))
    if found.written is not None and found.written.damaged_files:
        raise typer.Exit(INCOMPLETE)


@app.command()
def report(
    out: OutputDir,
    shards: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SHARDS...]",
            help="Where the tars are, if not where the job read them: paths, URLs, patterns; or OLD=NEW "
            "for a folder that moved.",
        ),
    ] = None,
    *,
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="The page; default: OUT/report.html.")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=0, max=300, help="Rows in the gallery.")] = 60,
    classes: Annotated[
        str | None, typer.Option(help="Names of the classes: .txt or .yaml; default: the job's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn at random.")] = 0,
) -> None:
    """Write one self-contained HTML page: pictures, distributions, errors, runs, provenance."""
    from pipeline.report import render_report, write_report

    written = write_report(out, shards or (), to=to, samples=samples, classes_file=classes, seed=seed)
    console.print(render_report(written), soft_wrap=True)
    raise typer.Exit(INCOMPLETE if written.damaged else 0)


@app.command()
def export(
    out: OutputDir,
    dest: Annotated[
        str,
        typer.Argument(metavar="DEST", help="A folder of its own: local, s3:// or gs://.", callback=_folder),
    ],
    *,
    format_: Annotated[
        Literal["coco", "voc", "webdataset"],
        typer.Option("--format", help="coco: JSON; voc: img_dir and ann_dir; webdataset: tars with seg.png."),
    ],
    shards: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARDS", help="Where the tars are now: paths, patterns; or OLD=NEW. Repeatable."
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Classes by name, for prompts that are captions.")
    ] = None,
    split: Annotated[str, typer.Option(help="voc: name of the subfolder.")] = "train",
    kind: Annotated[
        Literal["stuff", "instances"],
        typer.Option(help="coco: an annotation for each mask, or for each connected part of it."),
    ] = "stuff",
    images: Annotated[bool, typer.Option(help="coco: write the images too.")] = True,
    merged: Annotated[bool, typer.Option(help="coco: also join all shards in annotations.json.")] = True,
) -> None:
    """Write masks as COCO JSON, as a VOC or mmsegmentation tree, or as WebDataset shards."""
    from pipeline.export.told import told_export
    from pipeline.export.write import ExportOptions, export_job

    options = ExportOptions(format_, classes, split, kind, images, merged)
    totals = export_job(
        out,
        dest,
        options,
        shards or (),
        on_shard=lambda shard_id, written: console.print(f"{shard_id}: {written}"),
    )
    for line in told_export(totals, options, dest):
        console.print(line, soft_wrap=True)
    raise typer.Exit(INCOMPLETE if totals.damaged else 0)


@app.command()
def explain(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A JPEG, PNG, WebP, BMP or GIF.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What is looked for in it.")],
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="An open_clip model, hf-hub:..., local-dir:..., or demo, which is shipped and knows 64 "
            "things. Default: ViT-B-16 "
            "with laion2b_s34b_b88k, 600 MB from the hub at first.",
        ),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(metavar="TAG", help="Its hub tag, or the path of a checkpoint.")
    ] = None,
    layers: Annotated[
        str, typer.Option(metavar="N|all", help="How many of the last blocks are explained.")
    ] = "2",
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the pictures go.")] = "out/explain",
    fit: Annotated[
        str, typer.Option(metavar="stretch|keep", help="To the model's input size, or in the image's aspect.")
    ] = "stretch",
    precision: Annotated[str, typer.Option(metavar="fp32|bf16|fp16", help="Of the model.")] = "fp32",
) -> None:
    """Draw where one image speaks for each text: heat maps, layer by layer, side by side."""
    from pipeline.explain import explain_file, model_named, render_explained

    chosen = model_named(model, pretrained, layers=layers, fit=fit, precision=precision)
    written = explain_file(image, texts, chosen, out)
    console.print(render_explained(written, out), soft_wrap=True)


@app.command()
def models(
    refused: Annotated[bool, typer.Option("--refused", help="Also list the others, and why.")] = False,
    fetch: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="NAME TAG",
            help="Download this model's files into HF_HOME and load it once; TAG is null for hf-hub:...",
        ),
    ] = None,
) -> None:
    """List the open_clip models that can be explained, with their family; or fetch one ahead of a job."""
    import legrad

    if fetch:
        from pipeline.explain import model_named
        from pipeline.model import load_explainer

        explainer = load_explainer(model_named(fetch[0], None if fetch[1] == "null" else fetch[1]), "cpu")
        console.print(f"{' '.join(fetch)}: {explainer.tower.family}, its files are here")
        return
    table = Table("model", "family" if not refused else "family, or why it is refused")
    supported = legrad.supported_models()
    for name, support in supported.items():
        if support.family is not None:
            table.add_row(name, support.family)
        elif refused:
            table.add_row(name, Text(support.reason or "", style="dim"))
    console.print(table)
    counts = Counter(support.family is not None for support in supported.values())
    console.print(
        f"{counts[True]} of {len(supported)} open_clip models are supported; --refused shows the others"
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("out/demo"),
) -> None:
    """Annotate the shipped shards with the shipped model, then evaluate, draw and report."""
    from pipeline.demo.run_demo import run_demo

    raise typer.Exit(run_demo(out, console))


def _tell_error(error: PipelineError) -> None:
    text = shown_text(f"legrad: {error}")
    error_console.print(text, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; mistakes of the user's take one screen, without a traceback."""
    with printable_streams():
        _run()


def _run() -> None:
    # torch's threads share the cores with decoding; spinning while they wait costs more than it saves
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # what Ray passes on from its workers is made printable as a whole, and would show its colours as text
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    shown = logging.StreamHandler()
    shown.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[shown])
    try:
        app()
    except SystemExit as ending:
        sys.exit(USER_MISTAKE if ending.code == USAGE_EXIT_CODE else ending.code)
    except UserError as error:
        _tell_error(error)
        sys.exit(USER_MISTAKE)
    except PipelineError as error:
        _tell_error(error)
        sys.exit(FAULT)
    except Exception:
        # other people's errors quote URLs with their signatures
        sys.stderr.write(shown_text(traceback.format_exc()))
        sys.exit(FAULT)
