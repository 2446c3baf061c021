"""The work on samples in sample processes; a process that dies or hangs costs one sample."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pipeline.annotate import parcels
from pipeline.annotate.chunk_rows import ChunkRows, joined, rows_of_chunk
from pipeline.annotate.class_prompts import ReadySample, SentSample, with_classes
from pipeline.annotate.processes import FINISH, PREPARE, ProcessDied, ProcessTimedOut, SampleProcesses
from pipeline.annotate.rows import SampleRows
from pipeline.annotate.sample_states import ExplainedSample
from pipeline.annotate.sample_work import WorkSettings, outcome_of
from pipeline.annotate.stored_samples import StoredItem
from pipeline.prompts.sample_prompts import Prompt
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, SampleFields

Item = RawSample | StoredItem | SampleError | SampleRows

_DEATHS = (ProcessDied, MemoryError)
PROCESS_DIED, OUT_OF_MEMORY, TIMED_OUT = "process_died", "out_of_memory", "timed_out"


class WorkInProcesses:
    """Prepares samples and makes their rows as `SampleWork` does, a chunk at a time in the next idle process.

    Where a process dies, does not answer in time or runs out of memory, the samples of its chunk are tried
    one by one. One that is alone with two more such failures becomes an error row; a process killed by
    something else costs nothing.

    Args:
        processes: do this work, and no other.
        settings: of the job.
        every_class: prompts of all classes, in their order; none where captions are the prompts.
    """

    def __init__(
        self, processes: SampleProcesses, settings: WorkSettings, every_class: tuple[Prompt, ...] = ()
    ) -> None:
        self._processes = processes
        self._settings = settings
        self._every_class = every_class

    def prepare(self, items: Sequence[Item]) -> list[ReadySample]:
        """Prepare samples; called by several threads."""
        if len(items) > 1:
            with suppress(*_DEATHS):
                return self._prepared(items)
        return [sample for item in items for sample in self._prepared_alone(item)]

    def finish(self, explained: Sequence[ExplainedSample]) -> ChunkRows:
        """Make rows; called by several threads."""
        if len(explained) > 1:
            with suppress(*_DEATHS):
                return self._finished(explained)
        return joined([self._finished_alone(sample) for sample in explained])

    def _prepared(self, items: Sequence[Item]) -> list[ReadySample]:
        sent = [_for_transport(item) for item in items]
        prepared: list[SentSample] = self._processes.run(self._settings, PREPARE, sent)
        return with_classes(prepared, self._every_class)

    def _prepared_alone(self, item: Item) -> list[ReadySample]:
        if isinstance(item, SampleError):
            # it needs no work, and must stay as it is: it may be an error of the whole shard
            return [outcome_of(item)]
        if isinstance(item, SampleRows):
            return [item]
        with suppress(*_DEATHS):
            return self._prepared([item])
        try:
            return self._prepared([item])
        except _DEATHS as error:
            errors = item.errors if isinstance(item, StoredItem) else ()
            return [SampleRows(errors=(*errors, _error_of(item, "decode", error)))]

    def _finished(self, explained: Sequence[ExplainedSample]) -> ChunkRows:
        rows: ChunkRows = self._processes.run(self._settings, FINISH, explained)
        return rows

    def _finished_alone(self, sample: ExplainedSample) -> ChunkRows:
        with suppress(*_DEATHS):
            return self._finished([sample])
        try:
            return self._finished([sample])
        except _DEATHS as error:
            errors = (*sample.errors, _error_of(sample, "mask", error))
            return rows_of_chunk([SampleRows(errors=errors, dropped_prompts=sample.dropped_prompts)])

    def close(self) -> None:
        """End the processes."""
        self._processes.close()


def _for_transport(item: Item) -> Item:
    if isinstance(item, StoredItem) and item.image is not None:
        return replace(item, image=_with_large_fields(item.image))
    return _with_large_fields(item) if isinstance(item, RawSample) else item


def _with_large_fields(item: RawSample) -> RawSample:
    fields: Any = {name: parcels.Large(content) for name, content in item.fields.items()}
    return RawSample(item.index, item.key, SampleFields(fields.items(), item.fields.skipped), item.shard)


def _error_of(
    sample: RawSample | StoredItem | ExplainedSample, stage: str, error: BaseException
) -> SampleError:
    kind, message = PROCESS_DIED, f"the process that worked on the sample {error}"
    if isinstance(error, ProcessTimedOut):
        kind = TIMED_OUT
    if isinstance(error, MemoryError):
        kind, message = OUT_OF_MEMORY, "memory ran out while the sample was worked on"
    return SampleError(stage, kind, message, sample.key, sample.index)
