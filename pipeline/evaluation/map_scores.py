"""From what was measured on the maps of all scenes to figures with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from legrad.quality import metrics
from legrad.quality.label_metrics import bootstrap_sums, mean_iou, tabulate_counts
from legrad.quality.metrics import Estimate
from legrad.quality.perturbation import area_under_curve
from pipeline.evaluation.map_figures import ExaminedBatch
from pipeline.evaluation.map_measures import (
    AVERAGE_PRECISION,
    FIRST_IOU,
    IOU_AT_HALF,
    IOU_OTSU,
    OWN_OBJECT,
    PIXELS_OTSU,
    POINTING,
    POINTS_AT_HALF,
    POINTS_OTSU,
    THRESHOLDS,
)
from pipeline.evaluation.perturbation_scores import TESTS, PerturbedScores
from pipeline.evaluation.result import MapScores, PerturbationCurve, PerturbationScores


def all_map_scores(
    batches: Sequence[ExaminedBatch], configured_name: str | None, seed: int
) -> tuple[MapScores, ...]:
    """Figures of every method over all batches.

    Args:
        batches: at least one.
        configured_name: name of the method that a job used, if any.
        seed: of the bootstrap.
    """
    figures = np.concatenate([batch.measures.figures for batch in batches], axis=1)
    counts = np.concatenate([batch.measures.counts for batch in batches], axis=1)
    class_of_pair = np.concatenate([batch.class_of_pair for batch in batches])
    scene_of_pair = _scene_numbers(batches)
    return tuple(
        _map_scores(
            method,
            figures[row],
            counts[row],
            class_of_pair,
            scene_of_pair,
            configured=method == configured_name,
            seed=seed,
        )
        for row, method in enumerate(batches[0].methods)
    )


def all_perturbation_scores(
    batches: Sequence[ExaminedBatch], configured_name: str | None, seed: int
) -> tuple[PerturbationScores, ...]:
    """Curves and areas of every method over all batches; nothing where no batch was perturbed."""
    perturbed = [batch.perturbed for batch in batches if batch.perturbed is not None]
    if not perturbed:
        return ()
    merged = PerturbedScores(
        np.concatenate([scores.cosines for scores in perturbed], axis=-1),
        np.concatenate([scores.hits for scores in perturbed], axis=-1),
    )
    # the pairs of a batch that were perturbed are its first ones
    numbers = np.split(
        _scene_numbers(batches), np.cumsum([len(batch.scene_of_pair) for batch in batches])[:-1]
    )
    scene_of_pair = np.concatenate(
        [
            own[: batch.perturbed.cosines.shape[-1]]
            for own, batch in zip(numbers, batches, strict=True)
            if batch.perturbed is not None
        ]
    )
    return tuple(
        PerturbationScores(
            method,
            method == configured_name,
            tuple(
                _curve(
                    test,
                    order,
                    merged.cosines[row, kind],
                    merged.hits[row, kind],
                    scene_of_pair=scene_of_pair,
                    seed=seed,
                )
                for kind, (test, order) in enumerate(TESTS)
            ),
        )
        for row, method in enumerate(batches[0].methods)
    )


def _scene_numbers(batches: Sequence[ExaminedBatch]) -> Int[np.ndarray, " pairs"]:
    """Scene of every pair, counted through all batches."""
    offsets = np.cumsum([0, *(len(batch.present) for batch in batches[:-1])])
    return np.concatenate(
        [batch.scene_of_pair + offset for batch, offset in zip(batches, offsets, strict=True)]
    )


def _map_scores(
    method: str,
    figures: Float[np.ndarray, "pairs figures"],
    counts: Float[np.ndarray, "pairs kinds 3"],
    class_of_pair: Int[np.ndarray, " pairs"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    *,
    configured: bool,
    seed: int,
) -> MapScores:
    def estimate(column: int) -> Estimate | None:
        return _mean_of_defined(figures[:, column], scene_of_pair, seed)

    def class_mean(kind: int) -> Estimate | None:
        return _class_mean(counts[:, kind], class_of_pair, scene_of_pair, seed)

    curves = figures[~np.isnan(figures[:, FIRST_IOU]), FIRST_IOU:]
    threshold, best_column = metrics.best_threshold(curves, THRESHOLDS) if len(curves) else (None, 0)
    return MapScores(
        method=method,
        configured=configured,
        pointing=estimate(POINTING),
        iou_at_half=estimate(IOU_AT_HALF),
        iou_otsu=estimate(IOU_OTSU),
        iou_best=estimate(FIRST_IOU + best_column),
        best_threshold=threshold,
        average_precision=estimate(AVERAGE_PRECISION),
        mean_iou=class_mean(PIXELS_OTSU),
        point_mean_iou_at_half=class_mean(POINTS_AT_HALF),
        point_mean_iou_otsu=class_mean(POINTS_OTSU),
        own_object=estimate(OWN_OBJECT),
        iou_curve=tuple(curves.mean(axis=0).tolist()) if len(curves) else (),
    )


def _mean_of_defined(
    values: Float[np.ndarray, " pairs"], scene_of_pair: Int[np.ndarray, " pairs"], seed: int
) -> Estimate | None:
    defined = ~np.isnan(values)
    if not defined.any():
        return None
    return metrics.bootstrap_mean(values[defined], scene_of_pair[defined], seed=seed)


def _class_mean(
    counts: Float[np.ndarray, "pairs 3"],
    class_of_pair: Int[np.ndarray, " pairs"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    seed: int,
) -> Estimate | None:
    defined = ~np.isnan(counts[:, 0])
    scenes, image = np.unique(scene_of_pair[defined], return_inverse=True)
    table = tabulate_counts(counts[defined], class_of_pair[defined], image, len(scenes))
    return bootstrap_sums(table.counts, mean_iou(table, background=False), seed=seed)


def _curve(
    test: str,
    order: str,
    cosines: Float[np.ndarray, "shares pairs"],
    hits: Float[np.ndarray, "shares pairs"],
    *,
    scene_of_pair: Int[np.ndarray, " pairs"],
    seed: int,
) -> PerturbationCurve:
    has_classes = not np.isnan(hits).any()
    return PerturbationCurve(
        test=test,
        order=order,
        accuracy=tuple(hits.mean(axis=1).tolist()) if has_classes else (),
        cosine=tuple(cosines.mean(axis=1).tolist()),
        accuracy_area=metrics.bootstrap_mean(area_under_curve(hits.T), scene_of_pair, seed=seed)
        if has_classes
        else None,
        cosine_area=metrics.bootstrap_mean(area_under_curve(cosines.T), scene_of_pair, seed=seed),
    )
