"""The `tune` command: find settings of masks on stored maps, by ground truth."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.common import OutputDir, open_console


def tune(
    out: OutputDir,
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS...",
            help="Shards that the job has annotated and that have ground truth in seg.png, some or all of "
            "them: paths, URLs, patterns.",
        ),
    ],
    trials: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="masks.KEY=VALUE,...",
            help="Values to try for a key, such as masks.value=0.3,0.4,0.5; keys are tried in the given "
            "order. Repeatable. Default: contrast, smooth, combine, and value or quantile where the job's "
            "rule is fixed or quantile.",
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Metric to make as high as possible: mean_iou, mean_iou_with_background, iou, boundary_f, "
            "pixel_accuracy or point_mean_iou.",
        ),
    ] = "mean_iou",
) -> None:
    """Try other settings of masks on the maps in OUT, score them by ground truth, and print the best.

    Settings are chosen on one half of the samples and confirmed on the other. Nothing is written; `legrad
    remask` makes the masks.
    """
    from pipeline.evaluation.tuning import METRICS, default_trials, read_trials, tune
    from pipeline.evaluation.tuning_text import render_tuning
    from pipeline.run.remask import stored_job
    from pipeline.shards.ground_truth import list_truth_shards

    if metric not in METRICS:
        raise typer.BadParameter(f"expected one of {', '.join(METRICS)}, got {metric!r}")
    console = open_console()
    source = stored_job(out)
    found = tune(
        source,
        list_truth_shards(shards),
        read_trials(trials) if trials else default_trials(source.config),
        metric=metric,
        on_pass=lambda line: console.print(line, markup=False, highlight=False),
    )
    console.print(render_tuning(found, out), soft_wrap=True)
