"""What an evaluation found, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from legrad.quality.metrics import Estimate
from pipeline.evaluation.result import EvaluationResult, RecognitionScores, WrittenMaskScores


def render_evaluation(result: EvaluationResult) -> RenderableType:
    """The result as a person wants to see it on a terminal."""
    parts: list[RenderableType] = []
    if result.written is not None:
        parts += [*_written_parts(result.written), Text()]
    parts += _map_tables(result)
    if result.perturbation:
        parts += [Text(), *_perturbation_tables(result)]
    if result.recognition is not None:
        parts += [Text(), _recognition_table(result.recognition)]
    parts += [Text(line, style="dim") for line in _notes(result)]
    return Group(*parts)


def _map_tables(result: EvaluationResult) -> list[Table]:
    """Two tables for label maps, so that each fits into 80 columns, and one for points."""
    title = f"Maps of {result.model} for {result.pairs} prompts in {result.scenes} scenes"
    main = _table(title, ("map", "pointing", "IoU at .5", "IoU Otsu", "AP"))
    more = _table("The same maps", ("map", "mIoU Otsu", "IoU best", "cut", "own object"))
    points = _table("Labelled points", ("map", "mIoU at .5", "mIoU Otsu"))
    for scores in result.maps:
        name = f"{scores.method} *" if scores.configured else scores.method
        style = "bold" if scores.configured else None
        figures = (scores.pointing, scores.iou_at_half, scores.iou_otsu, scores.average_precision)
        main.add_row(name, *(_cell(figure) for figure in figures), style=style)
        cut = "-" if scores.best_threshold is None else _short(scores.best_threshold, digits=2)
        classes, best, own = (
            _cell(figure) for figure in (scores.mean_iou, scores.iou_best, scores.own_object)
        )
        more.add_row(name, classes, best, Text(cut, style="dim"), own, style=style)
        point_figures = (scores.point_mean_iou_at_half, scores.point_mean_iou_otsu)
        points.add_row(name, *(_cell(figure) for figure in point_figures), style=style)
    tables = [main, more] if any(scores.pointing for scores in result.maps) else []
    return [*tables, points] if any(scores.point_mean_iou_otsu for scores in result.maps) else tables


def _perturbation_tables(result: EvaluationResult) -> list[Table]:
    """Areas under accuracy, where there is a class list, and under the cosine."""
    columns = ("map", "deletion +", "deletion -", "insertion +", "insertion -")
    scenes = f"area over 0 to 90 % of the patches, {result.perturbed_scenes} scenes"
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
    figures = {
        "top-1": recognition.top1,
        "R@n": recognition.recall_at_n,
        "mAP": recognition.mean_average_precision,
        "AUROC present / absent": recognition.auroc,
    }
    for name in figures:
        table.add_column(name, justify="right")
    table.add_row(*(_cell(figure) for figure in figures.values()))
    return table


def _written_parts(written: WrittenMaskScores) -> list[RenderableType]:
    if not written.rows_scored:
        return [Text("Masks as written: none could be scored"), _account(written)]
    table = _table(
        f"Masks as written: {written.rows_scored} rows scored in {written.scenes} scenes",
        ("figure", "value", "95 % interval"),
    )
    table.add_column("of what", style="dim")
    for name, estimate, meaning in _written_figures(written):
        if estimate is not None:
            interval = f"{_short(estimate.low)} to {_short(estimate.high)}"
            table.add_row(name, _short(estimate.value), interval, meaning)
    return [table, _account(written)]


def _written_figures(written: WrittenMaskScores) -> list[tuple[str, Estimate | None, str]]:
    figures = [
        ("IoU per prompt", written.iou, "mean over rows"),
        ("boundary F", written.boundary_f, "mean over rows, within .75 % of diagonal"),
        ("mIoU", written.mean_iou, "mean over classes"),
        ("mIoU with background", written.mean_iou_with_background, "background as a class"),
        ("point-wise mIoU", written.point_mean_iou, "mean over classes, of labelled points"),
        ("pixel accuracy", written.pixel_accuracy, "all pixels"),
        ("precision", written.precision, "pixels in masks"),
        ("recall", written.recall, "pixels of objects"),
    ]
    if written.coverage is not None and written.coverage.value < 1:
        figures += [
            ("coverage", written.coverage, "pixels kept; the others are ignored"),
            ("mIoU of kept", written.mean_iou_kept, "mean over classes, kept pixels"),
            ("accuracy of kept", written.kept_accuracy, "kept pixels"),
        ]
    return [*figures, ("AUROC of presence", written.presence_auroc, "cosine of present and absent prompts")]


def _account(written: WrittenMaskScores) -> Text:
    lines = [
        f"  {count} {what}"
        for count, what in (
            (written.rows_without_object, "accepted rows whose prompt names no visible object"),
            (written.rows_rejected, "rows rejected by the job (no mask)"),
            (written.rows_rejected_rightly, "of them rightly: the prompt names no visible object"),
            (written.rows_unjudged, "rows of which no point says whether their object is there"),
            (written.rows_without_scene, "rows without a readable ground truth"),
            (written.rows_of_other_shards, "rows of shards that were not given"),
            (written.objects_without_row, "visible objects without a row"),
        )
        if count
    ]
    lines += [f"  no annotations for {shard}" for shard in written.shards_without_annotations]
    lines += [f"  left out, as it is damaged: {file}" for file in written.damaged_files]
    return Text("\n".join(lines))


def _notes(result: EvaluationResult) -> Sequence[str]:
    notes = [
        "± half the 95 % bootstrap interval over scenes; the cut of IoU best was chosen on these very scenes"
    ]
    if any(scores.configured for scores in result.maps):
        notes.append("* the layers that this job used")
    if result.perturbation:
        notes.append(
            "+ the most relevant patches first, - the least relevant; good maps fall early (low) under "
            "deletion + and late (high) under deletion -, rise early (high) under insertion + and late (low) "
            "under insertion -"
        )
    notes += [f"left out: {count} {reason}" for reason, count in result.left_out.items()]
    return notes


def _cell(estimate: Estimate | None) -> Text:
    if estimate is None:
        return Text("-")
    return Text.assemble(_short(estimate.value), (f" ±{_short((estimate.high - estimate.low) / 2)}", "dim"))


def _short(value: float, *, digits: int = 3) -> str:
    """A share without its leading zero, as tables of this field have it."""
    return f"{value:.{digits}f}".replace("0.", ".", 1)
