"""What the samples of a chunk add to the files of their shard, in a form that is cheap to pass on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.annotate.rows import SampleRows
from pipeline.output.counts import sample_outcome
from pipeline.output.schema import INSTANCES, TEXT_DISTANCES
from pipeline.output.writer import ROWS_SCHEMA, ShardWriter, rows_schema
from pipeline.shards.sample_error import SampleError


@dataclass(frozen=True)
class ChunkRows:
    """The outcomes of some samples of one shard.

    Attributes:
        ipc: annotation rows without the column `shard`, in the order of samples: Arrow IPC streams, perhaps
            none.
        errors: error rows, in the order of samples.
        outcomes: how many samples are `annotated`, `empty` and `failed`, and how many `dropped_prompts`.
    """

    ipc: tuple[bytes, ...] = ()
    errors: tuple[SampleError, ...] = ()
    outcomes: Counter[str] = field(default_factory=Counter)


def rows_of_chunk(samples: Sequence[SampleRows]) -> ChunkRows:
    """Put the outcomes of samples together."""
    rows = [row for sample in samples for row in sample.rows]
    outcomes = Counter(sample_outcome(each.rows, each.errors) for each in samples if each.is_sample)
    outcomes["dropped_prompts"] = sum(sample.dropped_prompts for sample in samples)
    # all rows of a job have the same columns
    names = rows[0].keys() if rows else ()
    schema = rows_schema(with_instances=INSTANCES in names, with_maps=TEXT_DISTANCES in names)
    return ChunkRows(
        (_as_ipc(pa.RecordBatch.from_pylist(rows, schema=schema)),) if rows else (),
        tuple(error for sample in samples for error in sample.errors),
        outcomes,
    )


def joined(parts: Sequence[ChunkRows]) -> ChunkRows:
    """Put the outcomes of further samples together."""
    return ChunkRows(
        tuple(stream for part in parts for stream in part.ipc),
        tuple(error for part in parts for error in part.errors),
        sum((part.outcomes for part in parts), Counter[str]()),
    )


def add_chunk(writer: ShardWriter, parts: Sequence[ChunkRows | SampleRows]) -> None:
    """Add the outcomes of a chunk's samples to the files of their shard, in the order of samples.

    Args:
        writer: of the shard.
        parts: outcomes of all samples of the chunk, in any order.
    """
    chunks = [part for part in parts if isinstance(part, ChunkRows)]
    alone = [part for part in parts if isinstance(part, SampleRows)]
    chunks += [rows_of_chunk(alone)] if alone else []
    whole = joined(chunks)
    batches = [batch for stream in whole.ipc for batch in pa.ipc.open_stream(stream)]
    errors = sorted(whole.errors, key=lambda error: error.place)
    writer.add(_in_order(batches), errors, whole.outcomes)


def _as_ipc(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    ipc: bytes = sink.getvalue().to_pybytes()
    return ipc


def _in_order(batches: Sequence[pa.RecordBatch]) -> pa.Table:
    table = pa.Table.from_batches(batches, schema=batches[0].schema if batches else ROWS_SCHEMA)
    indices = table["sample_index"].to_numpy()
    if (indices[1:] >= indices[:-1]).all():
        return table
    # stable, so that the prompts of a sample stay in their order
    return table.take(pa.array(indices.argsort(kind="stable")))
