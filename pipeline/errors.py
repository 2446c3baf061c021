"""Exceptions of the application.

PipelineError
├── UserError            invalid input or configuration: one screen, no traceback, exit code 1
├── OutputError          the output folder cannot be written: exit code 2
├── DamagedFileError     a file of an output folder is not what this package writes there: exit code 2
│   └── MismatchError    a shard's two files are intact, but do not belong together or to the job
├── ScratchError         this machine's temporary disk or memory is full: another machine may succeed
├── ShardError           a shard could not be read to its end: retried, then given up
│   └── ShortReadError   fewer bytes arrived than the object has
└── SampleFailure        one sample (or one of its prompts) could not be annotated: an error row
"""

from __future__ import annotations


class PipelineError(Exception):
    """Base of all exceptions that this package raises deliberately."""


class UserError(PipelineError):
    """Invalid configuration, path or argument; the message fits on one screen."""


class OutputError(PipelineError):
    """The output could not be written (disk full, permission denied)."""


class DamagedFileError(PipelineError):
    """A file of an output folder is not what this package writes there.

    Attributes:
        url: the file, without credentials.
        problem: what is wrong with it, in one line.
    """

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url = url
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.url}: {self.problem}"


class MismatchError(DamagedFileError):
    """A shard's annotations do not belong to its errors file, to the job, or to the shard as listed now."""


class ScratchError(PipelineError):
    """This machine's own temporary disk or memory cannot take what a shard needs: another machine may."""


class ShardError(PipelineError):
    """A shard could not be opened or read to its end; another attempt may succeed."""


class ShortReadError(ShardError):
    """A connection ended before all bytes of an object had arrived."""


class SampleFailure(PipelineError):
    """A sample cannot be annotated; the annotator adds key and index.

    Attributes:
        stage: where it happened: open, read, decode, caption, model or mask.
        kind: short machine-readable name, such as ``truncated``.
    """

    def __init__(self, stage: str, kind: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.kind = kind
        self.message = message
