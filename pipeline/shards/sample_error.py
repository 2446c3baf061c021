"""An error of a sample or its shard, as a row of the errors file."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from pipeline.text import printable

MAX_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True)
class SampleError:
    """An error of a sample, of one of its prompts, or of its shard.

    Attributes:
        stage: open, read, decode, caption, model or mask.
        kind: short machine-readable name.
        message: one sentence that says what was found.
        key: sample key; None where the sample is unknown.
        sample_index: ordinal of the sample in its shard; None where the sample is unknown.
        prompt_index: ordinal of the prompt in its sample; None for an error of the whole sample.
        damages_shard: whether the archive could not be read to its end, so that samples may be missing.
        read_before: of an error without a sample, the ordinal of the sample that comes next in the shard.
    """

    stage: str
    kind: str
    message: str
    key: str | None = None
    sample_index: int | None = None
    prompt_index: int | None = None
    damages_shard: bool = False
    read_before: int | None = field(default=None, compare=False)

    @property
    def place(self) -> tuple[int, bool]:
        """Sorts errors as the shard was read, however its samples were shared out to chunks."""
        if self.sample_index is not None:
            return self.sample_index, True
        return (sys.maxsize if self.read_before is None else self.read_before), False

    def as_row(self, shard: str) -> dict[str, Any]:
        """Return the row of the errors file; texts are made printable, the message is cut."""
        return {
            "key": None if self.key is None else printable(self.key),
            "sample_index": self.sample_index,
            "shard": shard,
            "stage": self.stage,
            "kind": self.kind,
            "message": printable(self.message[:MAX_MESSAGE_CHARACTERS]),
            "prompt_index": self.prompt_index,
        }
