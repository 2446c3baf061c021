"""Work on samples that needs no device: raw ones are prepared for it, explained ones become rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from legrad.canvases import Views
from legrad.images import ImageTransform
from legrad.tokens import RowTokenizer
from pipeline.annotate.caption_tokens import caption_tokens
from pipeline.annotate.chunk_rows import ChunkRows, rows_of_chunk
from pipeline.annotate.rows import SampleRows, sample_rows
from pipeline.annotate.sample_states import ExplainedSample, PreparedSample
from pipeline.config.schema import JobConfig
from pipeline.errors import SampleFailure
from pipeline.output.label_map import mask_frame
from pipeline.prompts.sample_prompts import SamplePrompts
from pipeline.shards.decode_memory import Room, no_limit, room_for
from pipeline.shards.fields import find_field
from pipeline.shards.images import decode_image
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample

# of a mask's frame, a pixel: heat maps, comparisons and masks of two texts that compete
_MASK_BYTES = 20
# and labels, distances and the nearest label of each pixel where masks are split
_INSTANCE_BYTES = 30


@dataclass(frozen=True)
class WorkSettings:
    """What the work on samples depends on; a job's, and the same for every process.

    Attributes:
        config: the job's configuration, files read.
        transform: the model's preprocessing.
        views: of every image.
        tokenizer: of captions; None: they are tokenised beside the model.
    """

    config: JobConfig
    transform: ImageTransform
    views: Views
    tokenizer: RowTokenizer | None


class SampleWork:
    """Prepares samples and makes their rows, a chunk at a time.

    Args:
        settings: of the job.
        room: called with the bytes that a large image takes; held while it takes them.
    """

    def __init__(self, settings: WorkSettings, room: Room = no_limit) -> None:
        self._settings = settings
        self._room = room
        self._prompts = SamplePrompts(settings.config)

    def prepare(self, items: Sequence[RawSample | SampleError]) -> list[PreparedSample | SampleRows]:
        """Decode images and find prompts; a sample that fails, or has no prompt, has its outcome already."""
        return [self._prepared(item) for item in items]

    def finish(self, explained: Sequence[ExplainedSample]) -> ChunkRows:
        """Make masks from maps, and rows from masks."""
        return finished(explained, self._settings.config, self._room)

    def close(self) -> None:
        """Nothing is open: `WorkInProcesses` has processes to end."""

    def _prepared(self, item: RawSample | SampleError) -> PreparedSample | SampleRows:
        if isinstance(item, SampleError):
            return outcome_of(item)
        settings = self._settings.config.input
        try:
            found = self._prompts.of(item.fields, shard=item.shard, key=item.key)
            errors = tuple(error_of(failure, item, prompt_index) for prompt_index, failure in found.failures)
            if not found.prompts:
                return SampleRows(errors=errors)
            image = decode_image(
                find_field(item.fields, settings.image),
                self._settings.transform,
                max_image_pixels=settings.max_image_pixels,
                views=self._settings.views,
                resize=settings.resize,
                room=self._room,
            )
        except SampleFailure as failure:
            return SampleRows(errors=(error_of(failure, item),))
        return PreparedSample(
            index=item.index,
            key=item.key,
            image_height=image.image_height,
            image_width=image.image_width,
            canvases=image.canvases,
            prompts=found.prompts,
            errors=errors,
            tokens=caption_tokens(found.prompts, self._settings.tokenizer),
        )


def finished(explained: Sequence[ExplainedSample], config: JobConfig, room: Room) -> ChunkRows:
    """Make masks from the maps of samples, and rows from masks.

    Args:
        explained: the samples.
        config: of the job.
        room: called with the bytes that large masks take; held while they take them.
    """
    bytes_per_pixel = _MASK_BYTES + (_INSTANCE_BYTES if config.masks.has_instances else 0)
    rows = []
    for sample in explained:
        height, width = mask_frame(sample.image_height, sample.image_width, config.masks.max_side)
        with room_for(bytes_per_pixel * height * width, room):
            rows.append(sample_rows(sample, config))
    return rows_of_chunk(rows)


def outcome_of(error: SampleError) -> SampleRows:
    """Return what an error adds that was found while the shard was read."""
    return SampleRows(errors=(error,), is_sample=error.sample_index is not None)


def error_of(failure: SampleFailure, sample: RawSample, prompt_index: int | None = None) -> SampleError:
    """Return what failed of a sample as a row of the errors file."""
    return SampleError(failure.stage, failure.kind, failure.message, sample.key, sample.index, prompt_index)
