"""Add the maps of a sample to its rows, so that its masks can be made again without the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.annotate.sample_states import ContextText, SampleMaps
from pipeline.output.schema import AnnotationRow, ContextRow, MappedAnnotationRow
from pipeline.output.stored_grids import stored_bytes


def with_maps(
    rows: Sequence[AnnotationRow],
    map_numbers: Sequence[int],
    maps: SampleMaps,
    context: Sequence[ContextText],
) -> list[AnnotationRow]:
    """Return the rows of a sample with their raw grids, and with those of the texts beside the prompts.

    Args:
        rows: rows of one sample, all with finite grids.
        map_numbers: for each row, which of the maps is its own.
        maps: the maps of the sample.
        context: the texts of its context grids; those whose grid is not finite are omitted.
    """
    finite = _finite_context(maps, context)
    background_maps = [maps.prompt_maps + number for number in finite if context[number].kind == "background"]
    mapped: list[AnnotationRow] = []
    for position, (row, number) in enumerate(zip(rows, map_numbers, strict=True)):
        grid = maps.relevance_grids[number]
        earlier = [*map_numbers[:position], *background_maps]
        mapped_row: MappedAnnotationRow = {
            **row,
            "heatmap": stored_bytes(grid, row["peak"]),
            "heatmap_height": grid.shape[0],
            "heatmap_width": grid.shape[1],
            "context_heatmaps": _context_rows(maps, context, finite) if position == 0 else None,
            "text_distances": _distances(maps.distances, number, earlier),
        }
        mapped.append(mapped_row)
    return mapped


def _distances(distances: np.ndarray | None, number: int, others: Sequence[int]) -> bytes | None:
    return None if distances is None else distances[number, others].astype("<f4").tobytes()


def _finite_context(maps: SampleMaps, context: Sequence[ContextText]) -> list[int]:
    grids = maps.context_grids
    return [
        number for number in range(len(context)) if grids is not None and np.isfinite(grids[number]).all()
    ]


def _context_rows(
    maps: SampleMaps, context: Sequence[ContextText], numbers: Sequence[int]
) -> list[ContextRow]:
    grids = np.empty(0) if maps.context_grids is None else maps.context_grids
    return [
        {
            "text": context[number].text,
            "kind": context[number].kind,
            "similarity": context[number].similarity,
            "peak": float(grids[number].max()),
            "heatmap": stored_bytes(grids[number], float(grids[number].max())),
        }
        for number in numbers
    ]
