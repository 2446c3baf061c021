"""What an evaluation found, as values, as JSON and as a table for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from legrad.metrics import Estimate


@dataclass(frozen=True)
class MapScores:
    """How well one kind of map finds the objects; means over (scene, prompt) with 95 % intervals over scenes.

    Attributes:
        method: name of the map.
        configured: whether these are the maps that the job under evaluation wrote its masks from.
        pointing: share of maps whose hottest pixel lies on the object.
        iou_at_half: foreground IoU of the normalised map cut at 0.5.
        iou_otsu: the same, each map cut where Otsu's rule says.
        iou_best: the same, all maps cut at ``best_threshold``, which was chosen on these very scenes.
        best_threshold: the one threshold of the 0.05 grid with the highest mean IoU.
        average_precision: of the map as a ranking of the pixels.
        own_object: in scenes with two objects, how often a prompt's map is hotter on its own object than on
            the other; 0.5 for maps that ignore the prompt. None where no scene has two objects.
    """

    method: str
    configured: bool
    pointing: Estimate
    iou_at_half: Estimate
    iou_otsu: Estimate
    iou_best: Estimate
    best_threshold: float
    average_precision: Estimate
    own_object: Estimate | None


@dataclass(frozen=True)
class RecognitionScores:
    """Whether the model knows what is in the scenes, whatever its maps show.

    Attributes:
        classes: how many classes were told apart.
        template: the text that each class name was put into.
        top1: share of scenes whose highest-scoring class is present.
        recall_at_n: share of a scene's n classes among its n highest-scoring ones.
        mean_average_precision: of ranking the scenes by class score, averaged over the classes that occur.
        auroc: of telling present from absent classes, all scores pooled; None where no class is ever absent.
    """

    classes: int
    template: str
    top1: Estimate
    recall_at_n: Estimate
    mean_average_precision: Estimate
    auroc: Estimate | None


@dataclass(frozen=True)
class WrittenMaskScores:
    """The masks as they stand in the Parquet files, and what became of every row and every object.

    Attributes:
        iou: mean foreground IoU over the scored rows; None where no row could be scored.
        rows_scored: rows whose mask was held against an object.
        rows_rejected: rows of prompts that the job rejected, which have no mask.
        rows_without_object: rows whose prompt names no object with visible pixels.
        rows_without_scene: rows whose sample has no readable ground truth in the shard, or another key there.
        rows_of_other_shards: rows of shards that were not given, or could not be told apart by name.
        objects_without_row: visible objects in the given shards for which the job wrote no row.
        shards_without_annotations: given shards that the output folder knows nothing of.
    """

    iou: Estimate | None
    rows_scored: int
    rows_rejected: int
    rows_without_object: int
    rows_without_scene: int
    rows_of_other_shards: int
    objects_without_row: int
    shards_without_annotations: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationResult:
    """Everything that one evaluation found.

    Attributes:
        model: what was evaluated, for a person to read.
        scenes: scenes whose maps were scored.
        pairs: (scene, prompt) pairs whose maps were scored.
        left_out: why samples or objects took no part, and how many.
        maps: one entry a method, LeGrad first.
        recognition: None where no class list was given.
        written: None where no output folder was evaluated.
    """

    model: str
    scenes: int
    pairs: int
    left_out: Mapping[str, int]
    maps: tuple[MapScores, ...]
    recognition: RecognitionScores | None = None
    written: WrittenMaskScores | None = None

    def to_json(self) -> str:
        """The whole result as indented JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


def render_evaluation(result: EvaluationResult) -> RenderableType:
    """The result as a person wants to see it on a terminal."""
    parts: list[RenderableType] = []
    if result.written is not None:
        parts += [_written_lines(result.written), Text()]
    parts += _map_tables(result)
    if result.recognition is not None:
        parts += [Text(), _recognition_table(result.recognition)]
    parts += [Text(line, style="dim") for line in _notes(result)]
    return Group(*parts)


def _map_tables(result: EvaluationResult) -> list[Table]:
    """Two tables rather than one: each fits into 80 columns."""
    title = f"Maps of {result.model} for {result.pairs} prompts in {result.scenes} scenes"
    main = _table(title, ("map", "pointing", "IoU at .5", "IoU Otsu", "AP"))
    more = _table("The same maps", ("map", "IoU best", "cut", "own object"))
    for scores in result.maps:
        name = f"{scores.method} *" if scores.configured else scores.method
        style = "bold" if scores.configured else None
        figures = (scores.pointing, scores.iou_at_half, scores.iou_otsu, scores.average_precision)
        main.add_row(name, *(_cell(figure) for figure in figures), style=style)
        cut = Text(_short(scores.best_threshold, digits=2), style="dim")
        more.add_row(name, _cell(scores.iou_best), cut, _cell(scores.own_object), style=style)
    return [main, more]


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


def _written_lines(written: WrittenMaskScores) -> Text:
    iou = "none could be scored" if written.iou is None else f"mean foreground IoU {_plain(written.iou)}"
    lines = [f"Masks as written: {written.rows_scored} rows scored, {iou}"]
    lines += [
        f"  {count} {what}"
        for count, what in (
            (written.rows_rejected, "rows rejected by the job (no mask)"),
            (written.rows_without_object, "rows whose prompt names no visible object"),
            (written.rows_without_scene, "rows without a readable ground truth"),
            (written.rows_of_other_shards, "rows of shards that were not given"),
            (written.objects_without_row, "visible objects without a row"),
        )
        if count
    ]
    lines += [f"  no annotations for {shard}" for shard in written.shards_without_annotations]
    return Text("\n".join(lines))


def _notes(result: EvaluationResult) -> Sequence[str]:
    notes = [
        "± half the 95 % bootstrap interval over scenes; the cut of IoU best was chosen on these very scenes"
    ]
    if any(scores.configured for scores in result.maps):
        notes.append("* the layers that this job used")
    notes += [f"left out: {count} {reason}" for reason, count in result.left_out.items()]
    return notes


def _cell(estimate: Estimate | None) -> Text:
    if estimate is None:
        return Text("-")
    return Text.assemble(_short(estimate.value), (f" ±{_short((estimate.high - estimate.low) / 2)}", "dim"))


def _short(value: float, *, digits: int = 3) -> str:
    """A share without its leading zero, as tables of this field have it."""
    return f"{value:.{digits}f}".removeprefix("0")


def _plain(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} (95 % interval {estimate.low:.3f} to {estimate.high:.3f})"
