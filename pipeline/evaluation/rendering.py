"""Show an evaluation: tables for a terminal, and a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from legrad.quality.metrics import Estimate
from pipeline.evaluation.map_scores import THRESHOLDS
from pipeline.evaluation.result import (
    EvaluationResult,
    InstanceScores,
    MapScores,
    RecognitionScores,
    WrittenMaskScores,
)

CURVES_PER_LINE = 3
# Tol's muted colours, which most eyes distinguish
BASELINE_COLOURS = (
    *("#117733", "#ddaa33", "#882255", "#44aa99", "#aa4499", "#999933", "#888888", "#332288"),
    *("#88ccee", "#cc6677"),
)
OWN_DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3)), (0, (3, 1, 1, 1, 1, 1)))
OWN_COLOUR, OTHER_COLOUR, CONFIGURED_COLOUR = "#4477aa", "#bbbbbb", "#cc3311"
PANEL_WIDTH_IN, ROW_HEIGHT_IN, CURVE_HEIGHT_IN = 3.4, 0.24, 2.6
DOTS_PER_INCH = 120
BARS = {
    "pointing": "pointing game",
    "mean_iou": "mIoU over classes, Otsu",
    "iou_otsu": "IoU per prompt, Otsu",
    "average_precision": "average precision",
    "point_mean_iou_at_half": "point-wise mIoU, cut at 0.5",
}


def render_evaluation(result: EvaluationResult) -> RenderableType:
    """Return the result as tables for a terminal."""
    parts: list[RenderableType] = []
    if result.written is not None:
        parts += [*_written_parts(result.written), *_instance_parts(result.written.instances), Text()]
    parts += _map_tables(result)
    if result.perturbation:
        parts += [Text(), *_perturbation_tables(result)]
    if result.recognition is not None:
        parts += [Text(), _recognition_table(result.recognition)]
    parts += [Text(line, style="dim") for line in _notes(result)]
    return Group(*parts)


def _map_tables(result: EvaluationResult) -> list[Table]:
    """Return two tables for label maps, each within 80 columns, and one for points."""
    title = f"Maps of {result.model} for {result.pairs} prompts in {result.scenes} scenes"
    main = _table(title, ("map", "pointing", "IoU at .5", "IoU Otsu", "AP"))
    more = _table("The same maps", ("map", "mIoU Otsu", "IoU best", "cut", "own object"))
    points = _table("Labelled points", ("map", "mIoU at .5", "mIoU Otsu"))
    for scores in result.maps:
        name = f"{scores.method} *" if scores.configured else scores.method
        style = "bold" if scores.configured else None
        cells = (scores.pointing, scores.iou_at_half, scores.iou_otsu, scores.average_precision)
        main.add_row(name, *(_cell(cell) for cell in cells), style=style)
        cut = "-" if scores.best_threshold is None else _short(scores.best_threshold, digits=2)
        classes, best, own = (_cell(cell) for cell in (scores.mean_iou, scores.iou_best, scores.own_object))
        more.add_row(name, classes, best, Text(cut, style="dim"), own, style=style)
        point_cells = (scores.point_mean_iou_at_half, scores.point_mean_iou_otsu)
        points.add_row(name, *(_cell(cell) for cell in point_cells), style=style)
    tables = [main, more] if any(scores.pointing for scores in result.maps) else []
    return [*tables, points] if any(scores.point_mean_iou_otsu for scores in result.maps) else tables


def _perturbation_tables(result: EvaluationResult) -> list[Table]:
    """Return the areas under accuracy, where there is a class list, and under the cosine."""
    columns = ("map", "deletion +", "deletion -", "insertion +", "insertion -")
    scenes = f"area over 0 to 90 % of the patches, {result.perturbed_scenes} scene(s)"
    tables = [
        _table(f"{name}: {scenes}", columns)
        for name in ("Accuracy under perturbation", "Cosine under perturbation")
    ]
    for scores in result.perturbation:
        name = f"{scores.method} *" if scores.configured else scores.method
        style = "bold" if scores.configured else None
        tables[0].add_row(name, *(_cell(curve.accuracy_area) for curve in scores.curves), style=style)
        tables[1].add_row(name, *(_cell(curve.cosine_area) for curve in scores.curves), style=style)
    has_classes = any(curve.accuracy_area for curve in result.perturbation[0].curves)
    return tables if has_classes else tables[1:]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _recognition_table(recognition: RecognitionScores) -> Table:
    title = f"Recognition of {recognition.classes} classes"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    scores = {
        "top-1": recognition.top1,
        "R@n": recognition.recall_at_n,
        "mAP": recognition.mean_average_precision,
        "AUROC present / absent": recognition.auroc,
    }
    for name in scores:
        table.add_column(name, justify="right")
    table.add_row(*(_cell(score) for score in scores.values()))
    return table


def _written_parts(written: WrittenMaskScores) -> list[RenderableType]:
    if not written.rows_scored:
        return [Text("Masks as written: none could be scored"), _account(written)]
    table = _table(
        f"Masks as written: {written.rows_scored} rows scored in {written.scenes} scenes",
        ("score", "value", "95 % interval"),
    )
    table.add_column("computed over", style="dim")
    for name, estimate, meaning in _written_scores(written):
        if estimate is not None:
            interval = f"{_short(estimate.low)} to {_short(estimate.high)}"
            table.add_row(name, _short(estimate.value), interval, meaning)
    return [table, _account(written)]


def _instance_parts(instances: Sequence[InstanceScores]) -> list[RenderableType]:
    if not instances:
        return []
    table = _table(f"Instances: {instances[0].truth} in the ground truth", ("kind", "found", "AP", "AP50"))
    for scores in instances:
        cells = (_cell(scores.average_precision), _cell(scores.average_precision_50))
        table.add_row(scores.kind, f"{scores.found:,}", *cells)
    return [Text(), table]


def _written_scores(written: WrittenMaskScores) -> list[tuple[str, Estimate | None, str]]:
    rows = [
        ("IoU per prompt", written.iou, "mean over rows"),
        ("boundary F", written.boundary_f, "mean over rows, .75 % tolerance"),
        ("mIoU", written.mean_iou, "mean over classes"),
        ("mIoU with background", written.mean_iou_with_background, "background as a class"),
        ("point-wise mIoU", written.point_mean_iou, "mean over classes, labelled points"),
        ("pixel accuracy", written.pixel_accuracy, "all pixels"),
        ("precision", written.precision, "pixels in masks"),
        ("recall", written.recall, "pixels of objects"),
    ]
    if written.coverage is not None and written.coverage.value < 1:
        rows += [
            ("coverage", written.coverage, "pixels kept; the others are ignored"),
            ("mIoU of kept", written.mean_iou_kept, "mean over classes, kept pixels"),
            ("accuracy of kept", written.kept_accuracy, "kept pixels"),
        ]
    return [*rows, ("AUROC of presence", written.presence_auroc, "cosine of present and absent prompts")]


def _account(written: WrittenMaskScores) -> Text:
    lines = [
        f"  {count} {what}"
        for count, what in (
            (written.rows_without_object, "accepted rows whose object is not visible"),
            (written.rows_rejected, "rows rejected by the job (without a mask)"),
            (written.rows_rejected_rightly, "of the rejected rows have no visible object: rightly rejected"),
            (written.rows_unjudged, "rows for which no point says whether their object is present"),
            (written.rows_without_scene, "rows without readable ground truth"),
            (written.rows_of_other_shards, "rows of shards that were not given"),
            (written.objects_without_row, "visible objects without a row"),
        )
        if count
    ]
    lines += [f"  no annotations file for {shard}" for shard in written.shards_without_annotations]
    lines += [f"  damaged file, skipped: {file}" for file in written.damaged_files]
    return Text("\n".join(lines))


def _notes(result: EvaluationResult) -> Sequence[str]:
    notes = [
        "± half the 95 % bootstrap interval over scenes; the cut of IoU best was chosen on the same scenes"
    ]
    if any(scores.configured for scores in result.maps):
        notes.append("* the layers of this job")
    if result.perturbation:
        notes.append(
            "+ the most relevant patches first, - the least relevant first; a faithful map has a small area "
            "under deletion + and insertion -, and a large area under deletion - and insertion +"
        )
    notes += [f"skipped: {count} {reason}" for reason, count in result.omitted.items()]
    return notes


def _cell(estimate: Estimate | None) -> Text:
    if estimate is None:
        return Text("-")
    return Text.assemble(_short(estimate.value), (f" ±{_short((estimate.high - estimate.low) / 2)}", "dim"))


def _short(value: float, *, digits: int = 3) -> str:
    """Format a share without its leading zero, as in tables of the field."""
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def plot_evaluation(result: EvaluationResult) -> bytes:
    """Draw bars with their 95 % intervals for every method, and curves over thresholds and hidden patches.

    Args:
        result: of any evaluation; panels without scores are omitted.

    Returns:
        The bytes of a PNG.
    """
    bars = [name for name in BARS if getattr(result.maps[0], name) is not None]
    curves = ["threshold"] if result.maps[0].iou_curve else []
    curves += [f"{curve.test} {curve.order}" for scores in result.perturbation[:1] for curve in scores.curves]
    # one panel more for the legend
    lines = -(-(len(curves) + 1) // CURVES_PER_LINE) if curves else 0
    heights = [1.0 + ROW_HEIGHT_IN * len(result.maps), *([CURVE_HEIGHT_IN * lines] if lines else [])]
    figure = Figure(
        figsize=(PANEL_WIDTH_IN * max(len(bars), CURVES_PER_LINE), sum(heights)),
        dpi=DOTS_PER_INCH,
        layout="constrained",
    )
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, name in zip(parts[0].subplots(1, len(bars), squeeze=False)[0], bars, strict=True):
        _draw_bars(axes, name, result.maps, with_names=name == bars[0])
    if curves:
        grid = parts[1].subplots(lines, CURVES_PER_LINE, squeeze=False).ravel()
        for axes, name in zip(grid, curves, strict=False):
            if name == "threshold":
                _draw_threshold_curves(axes, result.maps)
            else:
                _draw_perturbation(axes, name, result)
        for axes in grid[len(curves) :]:
            axes.set_axis_off()
        grid[len(curves)].legend(
            *grid[0].get_legend_handles_labels(), fontsize=7, frameon=False, loc="center"
        )
    figure.suptitle(f"{result.model}: {result.pairs} prompts in {result.scenes} scenes", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_bars(axes: Axes, name: str, maps: Sequence[MapScores], *, with_names: bool) -> None:
    found: list[Estimate | None] = [getattr(scores, name) for scores in maps]
    values = [0.0 if estimate is None else estimate.value for estimate in found]
    # a percentile interval need not hold the value
    below = [0.0 if e is None else max(0.0, e.value - e.low) for e in found]
    above = [0.0 if e is None else max(0.0, e.high - e.value) for e in found]
    positions = range(len(maps))
    colours = [_colour(scores.method, scores.configured) for scores in maps]
    axes.barh(positions, values, xerr=[below, above], color=colours, error_kw={"elinewidth": 0.8})
    axes.set_yticks(
        positions, [scores.method for scores in maps] if with_names else [""] * len(maps), fontsize=7
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    _dress(axes, BARS[name])


def _draw_threshold_curves(axes: Axes, maps: Sequence[MapScores]) -> None:
    for scores in maps:
        axes.plot(
            THRESHOLDS, scores.iou_curve, label=scores.method, **_line(scores.method, scores.configured, maps)
        )
    axes.set_xlabel("threshold", fontsize=7)
    axes.set_ylim(bottom=0)
    _dress(axes, "IoU per prompt")


def _draw_perturbation(axes: Axes, name: str, result: EvaluationResult) -> None:
    for scores in result.perturbation:
        curve = next(curve for curve in scores.curves if f"{curve.test} {curve.order}" == name)
        drawn = curve.accuracy or curve.cosine
        shares = [10 * step for step in range(len(drawn))]
        axes.plot(shares, drawn, label=scores.method, **_line(scores.method, scores.configured, result.maps))
    axes.set_xlabel("% of the patches", fontsize=7)
    _dress(axes, f"{'accuracy' if result.perturbation[0].curves[0].accuracy else 'cosine'}, {name}")


def _colour(method: str, configured: bool) -> str:
    if configured:
        return CONFIGURED_COLOUR
    return OWN_COLOUR if method.startswith("LeGrad") else OTHER_COLOUR


def _line(method: str, configured: bool, maps: Sequence[MapScores]) -> dict[str, Any]:
    """Return the style of a line: dashes distinguish LeGrad's methods, colours the baselines."""
    if method.startswith("LeGrad"):
        dashes = OWN_DASHES[[scores.method for scores in maps].index(method) % len(OWN_DASHES)]
        return {"color": _colour(method, configured), "linestyle": dashes, "linewidth": 1.6}
    others = [scores.method for scores in maps if not scores.method.startswith("LeGrad")]
    return {"color": BASELINE_COLOURS[others.index(method) % len(BASELINE_COLOURS)], "linewidth": 0.9}


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
