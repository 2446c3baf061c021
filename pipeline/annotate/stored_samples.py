"""Samples with stored maps: the rows of an output folder become what the device step made of their images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.annotate.chunk_rows import ChunkRows
from pipeline.annotate.rows import SampleRows
from pipeline.annotate.sample_states import ContextText, ExplainedPrompt, ExplainedSample
from pipeline.annotate.sample_work import WorkSettings, finished, outcome_of
from pipeline.config.marks import Marks
from pipeline.errors import SampleFailure, ShardError, UserError
from pipeline.output.stored_grids import is_of_earlier_version, stored_grid
from pipeline.prompts.sample_prompts import job_marks
from pipeline.shards.decode_memory import Room, no_limit
from pipeline.shards.fields import find_field
from pipeline.shards.images import decode_image
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample
from pipeline.text import printable

Row = Mapping[str, Any]

ROW_COLUMNS = (
    *("key", "sample_index", "shard", "prompt_index", "prompt", "prompt_truncated", "class_id"),
    *("image_height", "image_width", "similarity", "peak"),
    *("heatmap", "heatmap_height", "heatmap_width", "context_heatmaps", "text_distances"),
)


@dataclass(frozen=True)
class StoredItem:
    """A sample as an output folder has it.

    Attributes:
        key: sample key.
        index: ordinal in the shard.
        rows: its annotation rows, in order; none for a sample that failed.
        errors: its error rows.
        image: the sample in its shard; None where images are not read.
    """

    key: str | None
    index: int
    rows: tuple[Row, ...] = ()
    errors: tuple[SampleError, ...] = ()
    image: RawSample | None = None


@dataclass(frozen=True)
class StoredSample:
    """A sample whose maps are known.

    Attributes:
        index: ordinal in the shard.
        key: sample key.
        image_height: rows of the original image, after EXIF orientation.
        image_width: columns of the original image, after EXIF orientation.
        prompts: those that have a row.
        context: background texts, then the neutral text if there is one.
        map_of_prompt: for each prompt, which of the maps is its own, int64 [prompts].
        grids: raw relevance of prompts, then of the context, float32 [maps, grid_height, grid_width].
        similarities: of the text of each map, float32 [maps].
        distances: between the texts of prompts and backgrounds, float32 [texts, texts]; those between two
            backgrounds are 0, as nobody needs them.
        canvases: the image resized for its views; none where images are not read.
        errors: error rows of the sample.
    """

    index: int
    key: str
    image_height: int
    image_width: int
    prompts: tuple[ExplainedPrompt, ...]
    context: tuple[ContextText, ...]
    map_of_prompt: np.ndarray
    grids: np.ndarray
    similarities: np.ndarray
    distances: np.ndarray
    canvases: tuple[np.ndarray, ...] = ()
    errors: tuple[SampleError, ...] = ()

    @property
    def backgrounds(self) -> int:
        """Number of background texts."""
        return sum(text.kind == "background" for text in self.context)

    @property
    def shape(self) -> Hashable:
        """What samples that share a batch have in common: the sizes of their grids and canvases."""
        return self.grids.shape[1:], tuple(canvas.shape for canvas in self.canvases)

    @property
    def held_bytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in (self.grids, self.distances, *self.canvases))

    @property
    def decoded_images(self) -> int:
        """Number of images that were decoded for it."""
        return int(bool(self.canvases))


class StoredWork:
    """Prepares samples with stored maps and makes their rows, a chunk at a time.

    Args:
        settings: of the job.
        room: called with the bytes that a large image takes; held while it takes them.
    """

    def __init__(self, settings: WorkSettings, room: Room = no_limit) -> None:
        self._settings = settings
        self._room = room
        self._marks = job_marks(settings.config.prompts)

    def prepare(
        self, items: Sequence[StoredItem | SampleError | SampleRows]
    ) -> list[StoredSample | SampleRows]:
        """Restore maps, and decode the images of samples that have one.

        Raises:
            ShardError: a row's maps are not what is stored now, or an image has changed.
        """
        return [self._prepared(item) for item in items]

    def finish(self, explained: Sequence[ExplainedSample]) -> ChunkRows:
        """Make masks from maps, and rows from masks."""
        return finished(explained, self._settings.config, self._room)

    def close(self) -> None:
        """Nothing is open: `WorkInProcesses` has processes to end."""

    def _prepared(self, item: StoredItem | SampleError | SampleRows) -> StoredSample | SampleRows:
        if isinstance(item, SampleRows):
            return item
        if isinstance(item, SampleError):
            return outcome_of(item)
        if not item.rows:
            return SampleRows(errors=item.errors)
        try:
            kept = _kept_rows(item, self._marks)
        except UserError as error:
            failure = SampleError("caption", "other_prompt_marked", str(error), item.key, item.index)
            return SampleRows(errors=(failure,))
        if not kept:
            return SampleRows(errors=item.errors)
        canvases = () if item.image is None else self._canvases(item, item.image)
        try:
            sample = stored_sample(item, canvases, self._settings.config.prompts.neutral)
        except (ValueError, TypeError) as error:
            raise ShardError(f"sample {_name(item)}: its stored maps cannot be read: {error}") from error
        return sample if len(kept) == len(item.rows) else with_prompts(sample, kept)

    def _canvases(self, item: StoredItem, sample: RawSample) -> tuple[np.ndarray, ...]:
        settings = self._settings.config.input
        try:
            image = decode_image(
                find_field(sample.fields, settings.image),
                self._settings.transform,
                max_image_pixels=settings.max_image_pixels,
                # all of them: how far a JPEG is reduced while it is decoded depends on the largest
                views=self._settings.views,
                resize=settings.resize,
                room=self._room,
            )
        except SampleFailure as failure:
            raise ShardError(
                f"sample {_name(item)}: its image was annotated and cannot be decoded now "
                f"({failure.message}): the shard has changed; annotate it again"
            ) from failure
        annotated = (item.rows[0]["image_height"], item.rows[0]["image_width"])
        if (image.image_height, image.image_width) != annotated:
            raise ShardError(
                f"sample {_name(item)}: its image has {image.image_height} x {image.image_width} pixels; "
                f"the one that was annotated had {annotated[0]} x {annotated[1]}: the shard has changed; "
                "annotate it again"
            )
        return image.canvases[:1]


def _name(item: StoredItem) -> str:
    return printable(item.key or f"number {item.index}")


def stored_sample(
    item: StoredItem, canvases: tuple[np.ndarray, ...] = (), neutral: str | None = None
) -> StoredSample:
    """Restore the maps of a sample from its rows.

    Args:
        item: with at least one row.
        canvases: of its image.
        neutral: the neutral text of the job; where its map could not be stored, it claims no patch.

    Raises:
        ValueError: the rows do not hold what is stored now.
    """
    rows, context_rows = item.rows, item.rows[0]["context_heatmaps"] or []
    shape = (rows[0]["heatmap_height"], rows[0]["heatmap_width"])
    context = [
        ContextText(entry["text"], entry["kind"], float(entry["similarity"])) for entry in context_rows
    ]
    backgrounds = _backgrounds_of(context, has_neutral=neutral is not None)
    distances = [_row_distances(row, position + backgrounds) for position, row in enumerate(rows)]
    map_of_prompt, firsts = _shared_maps(distances)
    grids = [_grid(rows[first], shape) for first in firsts] + [_grid(entry, shape) for entry in context_rows]
    if neutral is not None and backgrounds == len(context):
        context.append(ContextText(neutral, "neutral", 0.0))
        grids.append(np.zeros(shape, np.float32))
    similarities = [rows[first]["similarity"] for first in firsts] + [text.similarity for text in context]
    if not (np.isfinite(similarities).all() and all(np.isfinite(grid).all() for grid in grids)):
        raise ValueError("a stored map or similarity is not finite")
    return StoredSample(
        index=item.index,
        key=rows[0]["key"],
        image_height=rows[0]["image_height"],
        image_width=rows[0]["image_width"],
        prompts=tuple(_prompt(row) for row in rows),
        context=tuple(context),
        map_of_prompt=np.array(map_of_prompt, np.int64),
        grids=np.stack(grids),
        similarities=np.array(similarities, np.float32),
        distances=_distance_matrix(distances, firsts, backgrounds),
        canvases=canvases,
        errors=item.errors,
    )


def _backgrounds_of(context: Sequence[ContextText], *, has_neutral: bool) -> int:
    """Return the number of background texts, which come before the neutral text."""
    kinds = [text.kind for text in context]
    backgrounds = kinds.count("background")
    if kinds[backgrounds:] not in ([], ["neutral"] * has_neutral):
        raise ValueError(f"context_heatmaps: kinds {kinds}; expected background texts, then a neutral one")
    return backgrounds


def with_prompts(sample: StoredSample, positions: Sequence[int]) -> StoredSample:
    """Return a sample with some of its prompts, and without the maps that only the others have."""
    prompt_maps = len(sample.grids) - len(sample.context)
    own = sample.map_of_prompt[list(positions)]
    maps = np.unique(own)
    texts = np.r_[maps, prompt_maps : prompt_maps + sample.backgrounds]
    of_context = np.r_[maps, prompt_maps : len(sample.grids)]
    return replace(
        sample,
        prompts=tuple(sample.prompts[position] for position in positions),
        map_of_prompt=np.searchsorted(maps, own),
        grids=sample.grids[of_context],
        similarities=sample.similarities[of_context],
        distances=sample.distances[np.ix_(texts, texts)],
    )


def _kept_rows(item: StoredItem, marks: Marks | None) -> list[int]:
    """Return the positions of the rows that marks keep; raise UserError if a mark is of another prompt."""
    return [
        position
        for position, row in enumerate(item.rows)
        if marks is None or marks.keeps(row["shard"], row["key"], row["prompt_index"], row["prompt"])
    ]


def _prompt(row: Row) -> ExplainedPrompt:
    return ExplainedPrompt(
        row["prompt_index"], row["prompt"], row["class_id"], row["prompt_truncated"], row["similarity"]
    )


def _grid(row: Row, shape: tuple[int, int]) -> np.ndarray:
    """Return a raw grid; rows of one sample have grids of one shape."""
    if row["heatmap"] is None:
        raise ValueError("heatmap: none is stored")
    if is_of_earlier_version(row["heatmap"], *shape):
        raise ValueError("heatmap: it has 8 bits a value, which is too few; annotate again")
    return stored_grid(row["heatmap"], *shape) * np.float32(row["peak"])


def _row_distances(row: Row, others: int) -> np.ndarray:
    """Return the distances of a row's text to those of earlier rows, then to background texts."""
    stored = row["text_distances"]
    if stored is None or len(stored) != 4 * others:
        size = "none" if stored is None else f"{len(stored)} bytes"
        raise ValueError(f"text_distances: {size} stored; expected {4 * others} bytes")
    distances = np.frombuffer(stored, "<f4")
    if not ((distances >= 0) & (distances <= 1)).all():
        raise ValueError("text_distances: expected values from 0 to 1")
    return distances


def _shared_maps(distances: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Return the map of each row, and the first row of each map: rows without distance share one."""
    map_of_row: list[int] = []
    firsts: list[int] = []
    for position, own in enumerate(distances):
        equal = np.flatnonzero(own[:position] == 0)
        if len(equal):
            map_of_row.append(map_of_row[equal[0]])
        else:
            map_of_row.append(len(firsts))
            firsts.append(position)
    return map_of_row, firsts


def _distance_matrix(distances: Sequence[np.ndarray], firsts: Sequence[int], backgrounds: int) -> np.ndarray:
    matrix = np.zeros((len(firsts) + backgrounds,) * 2, np.float32)
    for number, first in enumerate(firsts):
        own = distances[first]
        matrix[number, :number] = own[list(firsts[:number])]
        matrix[number, len(firsts) :] = own[first:]
    return matrix + matrix.T
