"""One thing that went wrong with a sample or its shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.text import printable

MAX_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True)
class SampleError:
    """One thing that went wrong, as a row of the errors file.

    Attributes:
        stage: open, read, decode, caption, model or mask.
        kind: short machine-readable name.
        message: one sentence for a person.
        key: sample key; None where no sample can be named.
        sample_index: ordinal of the sample in its shard; None where no sample can be named.
        prompt_index: ordinal of the prompt in its sample; None where the whole sample is meant.
        damages_shard: the archive was not read to a sound end, so samples that nothing names may be missing.
    """

    stage: str
    kind: str
    message: str
    key: str | None = None
    sample_index: int | None = None
    prompt_index: int | None = None
    damages_shard: bool = False

    def as_row(self, shard: str) -> dict[str, Any]:
        """The row of the errors file; texts printable, message bounded to MAX_MESSAGE_CHARACTERS."""
        return {
            "key": None if self.key is None else printable(self.key),
            "sample_index": self.sample_index,
            "shard": shard,
            "stage": self.stage,
            "kind": self.kind,
            "message": printable(self.message[:MAX_MESSAGE_CHARACTERS]),
            "prompt_index": self.prompt_index,
        }
