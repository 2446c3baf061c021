"""The work on samples in processes of their own: one that dies costs the sample that it died of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.annotate import parcels
from pipeline.annotate.chunk_rows import ChunkRows, joined, rows_of_chunk
from pipeline.annotate.processes import ProcessDied, SampleProcesses
from pipeline.annotate.rows import SampleRows
from pipeline.annotate.sample_states import ExplainedSample, PreparedSample
from pipeline.annotate.sample_work import FINISH, PREPARE, WorkSettings
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, SampleFields

PROCESS_DIED, OUT_OF_MEMORY = "process_died", "out_of_memory"


class WorkInProcesses:
    """Prepares samples and makes their rows as `SampleWork` does, a chunk at a time in the next idle process.

    Where a process dies, or runs out of memory, the samples of its chunk are tried one by one: the one at
    fault becomes an error row, and the others lose nothing.

    Args:
        processes: number of processes.
        settings: of the job.
    """

    def __init__(self, processes: int, settings: WorkSettings) -> None:
        self._processes = SampleProcesses(processes, settings, settings.config.run.decode_bytes)

    def prepare(self, items: Sequence[RawSample | SampleError]) -> list[PreparedSample | SampleRows]:
        """Prepare samples; called by several threads."""
        try:
            prepared: list[PreparedSample | SampleRows] = self._processes.run(
                PREPARE, [_for_transport(item) for item in items]
            )
            return prepared
        except (ProcessDied, MemoryError) as error:
            if len(items) == 1:
                return [SampleRows(errors=(_error_of(items[0], "decode", error),))]
        return [sample for item in items for sample in self.prepare([item])]

    def finish(self, explained: Sequence[ExplainedSample]) -> ChunkRows:
        """Make rows; called by several threads."""
        try:
            rows: ChunkRows = self._processes.run(FINISH, explained)
            return rows
        except (ProcessDied, MemoryError) as error:
            if len(explained) == 1:
                sample = explained[0]
                errors = (*sample.errors, _error_of(sample, "mask", error))
                return rows_of_chunk([SampleRows(errors=errors, dropped_prompts=sample.dropped_prompts)])
        return joined([self.finish([sample]) for sample in explained])

    def close(self) -> None:
        """End the processes."""
        self._processes.close()


def _for_transport(item: RawSample | SampleError) -> RawSample | SampleError:
    if isinstance(item, SampleError):
        return item
    fields: Any = {name: parcels.Large(content) for name, content in item.fields.items()}
    return RawSample(item.index, item.key, SampleFields(fields.items(), item.fields.skipped))


def _error_of(
    sample: RawSample | SampleError | ExplainedSample, stage: str, error: BaseException
) -> SampleError:
    index = sample.sample_index if isinstance(sample, SampleError) else sample.index
    kind, message = PROCESS_DIED, f"the process that worked on the sample {error}"
    if isinstance(error, MemoryError):
        kind, message = OUT_OF_MEMORY, "memory ran out while the sample was worked on"
    return SampleError(stage, kind, message, sample.key, index)
