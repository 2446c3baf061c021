"""Errors of the application.

PipelineError
├── UserError            the user's own mistake: one screen, no traceback, exit code 1
├── OutputError          the output folder cannot be written: exit code 2
├── DamagedFileError     a file of an output folder is not what this package writes there: exit code 2
│   └── MismatchError    a shard's two files are sound, but do not belong together or to the job
├── ShardError           a shard could not be read as a whole: retried, then given up
│   └── ShortReadError   fewer bytes came than the object holds
└── SampleFailure        one sample (or one of its prompts) could not be annotated: an error row
"""

from __future__ import annotations


class PipelineError(Exception):
    """Base of everything that this package raises on purpose."""


class UserError(PipelineError):
    """A mistake in a config, a path or an argument, told in one screen."""


class OutputError(PipelineError):
    """The output could not be written (disk full, permission denied)."""


class DamagedFileError(PipelineError):
    """A file of an output folder that is not what this package writes there.

    Attributes:
        url: the file, as it may be shown.
        problem: what is wrong with it, in one line.
    """

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url = url
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.url}: {self.problem}"


class MismatchError(DamagedFileError):
    """A shard's annotations that do not belong to its errors, to the job, or to the shard as it is listed."""


class ShardError(PipelineError):
    """A shard could not be opened or read to its end; worth another attempt."""


class ShortReadError(ShardError):
    """A connection ended before all the bytes of an object had come."""


class SampleFailure(PipelineError):
    """A sample that cannot be annotated; the annotator adds key and index.

    Attributes:
        stage: where it happened: open, read, decode, caption, model or mask.
        kind: short machine-readable name, such as ``truncated``.
    """

    def __init__(self, stage: str, kind: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.kind = kind
        self.message = message
