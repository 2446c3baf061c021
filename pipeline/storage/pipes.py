"""Read shards from the standard output of a command: ``pipe:COMMAND`` among the shard patterns.

For shards that no supported URL reaches, such as ``pipe:zstd -dc /data/{0000..0009}.tar.zst``. The command is
split into words as by a shell, but run without one: redirections, variables and globs have no effect. It runs
on the worker, in the worker's environment, which should also provide its credentials.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from posixpath import basename
from types import TracebackType
from urllib.parse import urlsplit

from pipeline.errors import ShardError, UserError
from pipeline.storage.limits import RateMeter, ReadLimits, TooSlowError
from pipeline.storage.scratch import scratch_errors
from pipeline.text import printable

COMMAND_PREFIX = "pipe:"
START_TIMEOUT_S = 300.0
DEFAULT_LIMITS = ReadLimits()
SHOWN_STDERR_BYTES = 2000
_TAR_NAME = re.compile(r"\.(tar|tgz|tbz2?|txz|tzst)\b", re.IGNORECASE)


def is_command(url: str) -> bool:
    """Return whether opening the URL runs a command."""
    return url.lstrip().lower().startswith(COMMAND_PREFIX)


def named_shard(url: str) -> str:
    """Return the one argument of a command that names the tar; it is stored instead of the command.

    Raises:
        UserError: the command cannot be split, or names no tar, or more than one.
    """
    program, *arguments = _words(url)
    named = [word for word in arguments or [program] if _TAR_NAME.search(basename(urlsplit(word).path))]
    if len(named) != 1:
        raise UserError(
            f"input.shards: {COMMAND_PREFIX}{_plain(program)}: expected one argument that names the shard "
            f"(*.tar, *.tar.gz, ...) and identifies its results; found {len(named)}"
        )
    return named[0]


def _plain(program: str) -> str:
    """Return a program's name; anything else in its place may be a secret."""
    name = basename(program)
    return name if re.fullmatch(r"[\w.+-]+", name) and "://" not in program else "..."


def _words(url: str) -> list[str]:
    try:
        words = shlex.split(url.lstrip()[len(COMMAND_PREFIX) :])
    except ValueError as error:
        raise UserError(
            f"input.shards: the command after {COMMAND_PREFIX} cannot be split into words: {error}"
        ) from None
    if not words:
        raise UserError(f"input.shards: expected a command after {COMMAND_PREFIX}, got none")
    return words


class CommandOutput:
    """Reads what a command writes; an exit code other than 0 is an error of the shard.

    Args:
        url: the command, with its prefix.
        canonical_url: the shard's name in errors.
        limits: the smallest rate at which it must write, once it has written something.
        start_timeout_s: seconds in which it must write its first bytes, and end after its last.

    Raises:
        OSError: the command cannot be started.
        ScratchError: there is no room for its error messages.
    """

    def __init__(
        self,
        url: str,
        canonical_url: str,
        limits: ReadLimits = DEFAULT_LIMITS,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._words = _words(url)
        self._canonical_url = canonical_url
        self._limits = limits
        self._start_timeout_s = start_timeout_s
        self._meter: RateMeter | None = None
        with scratch_errors():
            self._stderr_file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the command)
        try:
            self._process = subprocess.Popen(  # noqa: S603 (the user's own command, allowed by the configuration)
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._stderr_file,
                bufsize=0,
                start_new_session=True,
            )
        except OSError:
            self._stderr_file.close()
            raise
        assert self._process.stdout is not None  # noqa: S101 (for the type checker: it is a pipe)
        self._output = self._process.stdout
        self._readable = select.poll()
        self._readable.register(self._output, select.POLLIN)

    def read(self, size_bytes: int) -> bytes:
        """Return up to so many bytes; none at the end, if the command has succeeded.

        Raises:
            ShardError: the exit code is not 0, or the command writes nothing or too slowly.
        """
        started_s, meter = time.monotonic(), self._meter
        patience_s = self._start_timeout_s if meter is None else meter.patience_s
        if not self._readable.poll(1000 * patience_s):
            nothing = f"the command wrote nothing for {self._start_timeout_s:g} s"
            raise self._failure(nothing if meter is None else str(meter.too_slow()))
        data = self._output.read(size_bytes)
        if not data:
            self._check_exit_code()
        self._count(time.monotonic() - started_s, len(data))
        return data

    def _count(self, waited_s: float, received_bytes: int) -> None:
        if self._meter is not None:
            try:
                self._meter.add(waited_s, received_bytes)
            except TooSlowError as error:
                raise self._failure(str(error)) from None
        elif self._limits.min_bytes_per_s:
            # a command may take its time to start
            self._meter = RateMeter(self._limits)

    def _check_exit_code(self) -> None:
        try:
            code = self._process.wait(self._start_timeout_s)
        except subprocess.TimeoutExpired:
            raise self._failure("the command closed its output but does not end") from None
        if code:
            raise self._failure(f"the command ended with exit code {code}")

    def _failure(self, what: str) -> ShardError:
        end = self._stderr_file.seek(0, os.SEEK_END)
        self._stderr_file.seek(max(0, end - SHOWN_STDERR_BYTES))
        stderr = printable(" ".join(self._stderr_file.read().decode("utf-8", "replace").split()))
        shown = f": {self._without_arguments(stderr)}" if stderr else ""
        return ShardError(f"{self._canonical_url}: {what}{shown}")

    def _without_arguments(self, text: str) -> str:
        """Remove the arguments from an error: they may hold credentials, which programs tend to repeat."""
        arguments = self._words[1:]
        pieces = {piece for word in arguments for piece in (word, *re.split(r"[^\w.~+-]+", word))}
        for piece in sorted(pieces, key=len, reverse=True):
            if len(piece) > 3:
                text = text.replace(piece, "***")
        return text

    def close(self) -> None:
        """End the command and the processes that it started, if they still run."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()
        self._stderr_file.close()

    def __enter__(self) -> CommandOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
