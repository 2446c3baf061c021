"""The `evaluate` command."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.common import INCOMPLETE, OutputDir, open_console


def evaluate(
    out: OutputDir,
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS...",
            help="The annotated shards, with ground truth in seg.png, and in inst.png for instances: paths, "
            "URLs, patterns.",
        ),
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Names of the classes: line i of a .txt names class i; or a .yaml list."
        ),
    ] = None,
    *,
    perturbation: Annotated[
        bool,
        typer.Option(
            "--perturbation",
            help="Also measure how the similarity falls as patches are hidden by each map; slow.",
        ),
    ] = False,
    scenes: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of scenes that --perturbation measures.")
    ] = 50,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The job's model, which must be repeated here where it is a folder or the address of a hub.",
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Path of the job's checkpoint, where its weights are a file: the same, or where it is now.",
        ),
    ] = None,
) -> None:
    """Score masks and heat maps against ground truth in the shards, beside baselines on the same model."""
    from pipeline.evaluation.evaluate import evaluate_output
    from pipeline.evaluation.rendering import render_evaluation

    found = evaluate_output(
        out,
        shards,
        classes,
        perturbed_scenes=scenes if perturbation else 0,
        model_name=model,
        pretrained=pretrained,
    )
    open_console().print(render_evaluation(found))
    if found.written is not None and found.written.damaged_files:
        raise typer.Exit(INCOMPLETE)
