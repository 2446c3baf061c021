"""The result of an evaluation, as values and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from legrad.quality.metrics import Estimate


@dataclass(frozen=True)
class MapScores:
    """Scores of one kind of map: means over (scene, prompt) with 95 % intervals over scenes.

    Attributes:
        method: name of the map.
        configured: whether the evaluated job used these maps for its masks.
        pointing: share of maps whose hottest pixel lies on the object. None, like the other scores, where no
            scene has the ground truth that it needs.
        iou_at_half: foreground IoU of the normalised map cut at 0.5.
        iou_otsu: the same, each map cut by Otsu's rule.
        iou_best: the same, all maps cut at ``best_threshold``, which was chosen on the same scenes.
        best_threshold: the one threshold of the 0.05 grid with the highest mean IoU.
        average_precision: of the map as a ranking of the pixels.
        mean_iou: IoU of a class over the whole set, each map cut by Otsu's rule and the hottest of a scene's
            maps taking a pixel; mean over classes, without background.
        point_mean_iou_at_half: IoU of a class over labelled points, each map cut at 0.5; mean over classes.
        point_mean_iou_otsu: the same, each map cut by Otsu's rule.
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
    """The output of the model as patches are hidden, or shown, from 0 to 90 % in steps of 10.

    Attributes:
        test: deletion: patches are taken away; insertion: patches are shown in a blurred image.
        order: positive: the most relevant first; negative: the least relevant first.
        accuracy: share of prompts whose class scores above every class that is absent from the scene; empty
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
        configured: whether the evaluated job used these maps for its masks.
        curves: one entry for each test and order.
    """

    method: str
    configured: bool
    curves: tuple[PerturbationCurve, ...]


@dataclass(frozen=True)
class RecognitionScores:
    """Scores of the model as a classifier of scenes, without its maps.

    Attributes:
        classes: number of classes.
        template: prompt for a class; {} is replaced by its name.
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
class InstanceScores:
    """Scores of one kind of instances against ground truth, as COCO computes them for masks.

    Attributes:
        kind: instances: those of the column `instances`; connected parts: the parts of masks.
        average_precision: mean over classes and over IoU from .5 to .95 in steps of .05.
        average_precision_50: at IoU .5, mean over classes.
        truth: number of instances in the ground truth.
        found: number of instances of the job in the same scenes.
    """

    kind: str
    average_precision: Estimate
    average_precision_50: Estimate
    truth: int
    found: int


@dataclass(frozen=True)
class WrittenMaskScores:
    """Scores of the masks that a job wrote, and counts of all rows and objects.

    The rows of a scene are merged into a label map (`pipeline.output.label_map`). Pixels that they ignore
    (rule ``band``, ``argmax``) count as background, except in the scores of kept pixels. Undefined scores are
    None.

    Attributes:
        iou: foreground IoU of a row's mask, mean over the scored rows.
        boundary_f: F-measure of its boundary, mean over the same rows.
        mean_iou: IoU of a class over the whole set, mean over classes, without background.
        mean_iou_with_background: the same, background as one of the classes.
        mean_iou_kept: the mean over classes without background, over the kept pixels alone.
        point_mean_iou: IoU of a class over labelled points, mean over classes.
        pixel_accuracy: share of all pixels with the right label.
        precision: share of the pixels in masks with the right label.
        recall: share of the objects' pixels with the right label.
        coverage: share of all pixels that are kept.
        kept_accuracy: share of the kept pixels with the right label.
        presence_auroc: of the cosine as a test of whether the object of a prompt is in the scene.
        class_iou: IoU by class id; 0 is background.
        scenes: scenes with ground truth, also those without rows.
        rows_scored: accepted rows whose object is present.
        rows_without_object: accepted rows whose prompt names no visible object: false alarms.
        rows_rejected: rows of prompts that the job rejected, which have no mask.
        rows_rejected_rightly: rejected rows whose object is absent.
        rows_unjudged: rows for which the point labels do not say whether their object is present.
        rows_without_scene: rows whose sample has no readable ground truth in the shard, or another key there.
        rows_of_other_shards: rows of shards that were not given, or that share their name with another.
        objects_without_row: objects in the given shards for which the job wrote no row.
        shards_without_annotations: given shards without an annotations file in the output folder.
        damaged_files: annotations files that are skipped, and why.
        instances: scores of instances, where the ground truth has some.
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
    instances: tuple[InstanceScores, ...] = ()


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one evaluation.

    Attributes:
        model: name of the evaluated model.
        scenes: scenes whose maps were scored.
        pairs: (scene, prompt) pairs whose maps were scored.
        omitted: number of skipped samples and objects by reason.
        maps: one entry for each method, LeGrad first.
        recognition: None without a class list.
        written: scores of written masks; None where no output folder was evaluated.
        perturbation: one entry for each method; empty where no scene was perturbed.
        perturbed_scenes: number of scenes of the perturbation tests.
    """

    model: str
    scenes: int
    pairs: int
    omitted: Mapping[str, int]
    maps: tuple[MapScores, ...]
    recognition: RecognitionScores | None = None
    written: WrittenMaskScores | None = None
    perturbation: tuple[PerturbationScores, ...] = ()
    perturbed_scenes: int = 0

    def to_json(self) -> str:
        """Return the result as indented JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"
