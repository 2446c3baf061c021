"""Outcomes of samples: counts of a shard or of several, and their errors in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ShardCounts:
    """Outcomes of a shard's samples; ``samples_in == annotated + empty + failed`` always holds.

    Attributes:
        annotated: samples with at least one annotation row.
        empty: readable samples to which no prompt applies.
        failed: samples with only error rows.
        rows: annotation rows.
        error_rows: rows of the errors file.
        dropped_prompts: prompts dropped by ``prompts.max_per_sample``.
        errors_by_kind: error rows by ``stage/kind``.
        error_examples: for each of these kinds the key of one sample, or the shard if the
            error names no sample.
    """

    annotated: int = 0
    empty: int = 0
    failed: int = 0
    rows: int = 0
    error_rows: int = 0
    dropped_prompts: int = 0
    errors_by_kind: Mapping[str, int] = field(default_factory=dict)
    error_examples: Mapping[str, str] = field(default_factory=dict)

    @property
    def samples_in(self) -> int:
        """Samples of the shard."""
        return self.annotated + self.empty + self.failed

    def __add__(self, other: ShardCounts) -> ShardCounts:
        kinds = dict(self.errors_by_kind)
        for kind, count in other.errors_by_kind.items():
            kinds[kind] = kinds.get(kind, 0) + count
        return ShardCounts(
            annotated=self.annotated + other.annotated,
            empty=self.empty + other.empty,
            failed=self.failed + other.failed,
            rows=self.rows + other.rows,
            error_rows=self.error_rows + other.error_rows,
            dropped_prompts=self.dropped_prompts + other.dropped_prompts,
            errors_by_kind=kinds,
            error_examples={**other.error_examples, **self.error_examples},
        )


def sample_outcome(rows: Sequence[object], errors: Sequence[object]) -> str:
    """Return `annotated` if a sample has rows, `failed` if it has only errors, `empty` if it has neither."""
    return "annotated" if rows else "failed" if errors else "empty"


def total_counts(counts: Iterable[ShardCounts]) -> ShardCounts:
    """Return the sum over shards."""
    return sum(counts, start=ShardCounts())


SHOWN_KINDS = 3


def error_kinds_text(counts: ShardCounts, most: int = SHOWN_KINDS) -> str:
    """Return the most frequent kinds of errors: ``decode/truncated 60, for example 000123``."""
    largest = sorted(counts.errors_by_kind.items(), key=lambda item: (-item[1], item[0]))
    kinds = [f"{kind} {rows:,}{_example(counts, kind)}" for kind, rows in largest[:most]]
    kinds += [f"{len(largest) - most} more kinds"] if len(largest) > most else []
    return "; ".join(kinds)


def _example(counts: ShardCounts, kind: str) -> str:
    example = counts.error_examples.get(kind)
    return f", for example {example}" if example else ""
