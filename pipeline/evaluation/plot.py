"""What an evaluation found, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from legrad.quality.metrics import Estimate
from pipeline.evaluation.map_measures import THRESHOLDS
from pipeline.evaluation.result import EvaluationResult, MapScores

CURVES_PER_LINE = 3
# Tol's muted colours, which most eyes tell apart
BASELINE_COLOURS = ("#117733", "#ddaa33", "#882255", "#44aa99", "#aa4499", "#999933", "#888888", "#332288")
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


def plot_evaluation(result: EvaluationResult) -> bytes:
    """Draw bars with their 95 % intervals for every method, and curves over thresholds and hidden patches.

    Args:
        result: of any evaluation; panels for which it has no figures are left out.

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
    """LeGrad's are told apart by dashes, the baselines by colours."""
    if method.startswith("LeGrad"):
        dashes = ("-", "--", ":", "-.")[[scores.method for scores in maps].index(method) % 4]
        return {"color": _colour(method, configured), "linestyle": dashes, "linewidth": 1.6}
    others = [scores.method for scores in maps if not scores.method.startswith("LeGrad")]
    return {"color": BASELINE_COLOURS[others.index(method) % len(BASELINE_COLOURS)], "linewidth": 0.9}


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
