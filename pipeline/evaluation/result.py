"""What an evaluation found, as values and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from legrad.quality.metrics import Estimate


@dataclass(frozen=True)
class MapScores:
    """How well one kind of map finds the objects; means over (scene, prompt) with 95 % intervals over scenes.

    Attributes:
        method: name of the map.
        configured: whether these are the maps that the job under evaluation wrote its masks from.
        pointing: share of maps whose hottest pixel lies on the object. None, like the other figures, where no
            scene has the truth that it takes.
        iou_at_half: foreground IoU of the normalised map cut at 0.5.
        iou_otsu: the same, each map cut where Otsu's rule says.
        iou_best: the same, all maps cut at ``best_threshold``, which was chosen on these very scenes.
        best_threshold: the one threshold of the 0.05 grid with the highest mean IoU.
        average_precision: of the map as a ranking of the pixels.
        mean_iou: IoU of a class over the whole set, each map cut by Otsu's rule and the hottest of a scene's
            maps taking a pixel; mean over classes, without background.
        point_mean_iou_at_half: IoU of a class over labelled points, each map cut at 0.5; mean over classes.
        point_mean_iou_otsu: the same, each map cut where Otsu's rule says.
        own_object: in scenes with two objects, how often a prompt's map is hotter on its own object than on
            the other; 0.5 for maps that ignore the prompt. None where no scene has two objects.
        iou_curve: mean foreground IoU at every threshold of the 0.05 grid; empty without label maps.
    """

    method: str
    configured: bool
    pointing: Estimate | None
    iou_at_half: Estimate | None
    iou_otsu: Estimate | None
    iou_best: Estimate | None
    best_threshold: float | None
    average_precision: Estimate | None
    mean_iou: Estimate | None
    point_mean_iou_at_half: Estimate | None
    point_mean_iou_otsu: Estimate | None
    own_object: Estimate | None
    iou_curve: tuple[float, ...]


@dataclass(frozen=True)
class PerturbationCurve:
    """What the model says as patches are hidden, or shown, from 0 to 90 % in steps of 10.

    Attributes:
        test: deletion: patches are taken away; insertion: patches are shown in a blurred image.
        order: positive: the most relevant first; negative: the least relevant first.
        accuracy: share of prompts whose class scores above every class that the scene does not show; empty
            without a class list.
        cosine: mean similarity of image and prompt.
        accuracy_area: area under ``accuracy``, over its range; None without a class list.
        cosine_area: area under ``cosine``, over its range.
    """

    test: str
    order: str
    accuracy: tuple[float, ...]
    cosine: tuple[float, ...]
    accuracy_area: Estimate | None
    cosine_area: Estimate


@dataclass(frozen=True)
class PerturbationScores:
    """How faithful one kind of map is to the model.

    Attributes:
        method: name of the map.
        configured: whether these are the maps that the job under evaluation wrote its masks from.
        curves: one entry a test and order.
    """

    method: str
    configured: bool
    curves: tuple[PerturbationCurve, ...]


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

    Pixels are judged by the label map of each scene's rows (`pipeline.output.label_map`). Where rows ignore
    pixels (rule ``band``, ``argmax``) these count as background, unless a figure is of the kept pixels.
    Figures are None where nothing decides them.

    Attributes:
        iou: foreground IoU of a row's mask, mean over the scored rows.
        boundary_f: F-measure of its boundary, mean over the same rows.
        mean_iou: IoU of a class over the whole set, mean over classes, background left out.
        mean_iou_with_background: the same, background as one of the classes.
        mean_iou_kept: the mean over classes without background, over the kept pixels alone.
        point_mean_iou: IoU of a class over labelled points, mean over classes.
        pixel_accuracy: share of all pixels with the right label.
        precision: share of the pixels in masks with the right label.
        recall: share of the objects' pixels with the right label.
        coverage: share of all pixels that are kept.
        kept_accuracy: share of the kept pixels with the right label.
        presence_auroc: of telling by the cosine whether what a prompt names is in its scene.
        class_iou: IoU by class id; 0 is background.
        scenes: scenes with ground truth, also such without rows.
        rows_scored: accepted rows whose object is there.
        rows_without_object: accepted rows whose prompt names no visible object: false alarms.
        rows_rejected: rows of prompts that the job rejected, which have no mask.
        rows_rejected_rightly: those of them whose object is not there.
        rows_unjudged: rows of which the point labels do not say whether their object is there.
        rows_without_scene: rows whose sample has no readable ground truth in the shard, or another key there.
        rows_of_other_shards: rows of shards that were not given, or could not be told apart by name.
        objects_without_row: objects in the given shards for which the job wrote no row.
        shards_without_annotations: given shards that the output folder knows nothing of.
        damaged_files: annotations files that are left out, and why.
    """

    iou: Estimate | None
    boundary_f: Estimate | None
    mean_iou: Estimate | None
    mean_iou_with_background: Estimate | None
    mean_iou_kept: Estimate | None
    point_mean_iou: Estimate | None
    pixel_accuracy: Estimate | None
    precision: Estimate | None
    recall: Estimate | None
    coverage: Estimate | None
    kept_accuracy: Estimate | None
    presence_auroc: Estimate | None
    class_iou: Mapping[int, float]
    scenes: int
    rows_scored: int
    rows_without_object: int
    rows_rejected: int
    rows_rejected_rightly: int
    rows_unjudged: int
    rows_without_scene: int
    rows_of_other_shards: int
    objects_without_row: int
    shards_without_annotations: tuple[str, ...]
    damaged_files: tuple[str, ...] = ()


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
        perturbation: one entry a method; empty where it was not asked for.
        perturbed_scenes: how many scenes it rests on.
    """

    model: str
    scenes: int
    pairs: int
    left_out: Mapping[str, int]
    maps: tuple[MapScores, ...]
    recognition: RecognitionScores | None = None
    written: WrittenMaskScores | None = None
    perturbation: tuple[PerturbationScores, ...] = ()
    perturbed_scenes: int = 0

    def to_json(self) -> str:
        """The whole result as indented JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"
