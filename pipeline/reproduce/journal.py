"""Results of images on disk, one line of JSON each, in a fixed order, so that an interrupted run resumes.

The first line holds the settings. Lines are written batch by batch; a resumed run keeps whole batches alone,
so that every image is computed in the same batch as without the interruption, and has the same result.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.errors import OutputError, UserError

MAX_LINE_BYTES = 1 << 24


class Journal:
    """An open file of results.

    Attributes:
        done: number of images, from the first name on, whose results are there.
    """

    def __init__(self, stream: IO[bytes], path: Path, done: int) -> None:
        self._stream = stream
        self._path = path
        self.done = done

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the results of a batch.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            self._stream.write(b"".join(_line(record) for record in records))
            self._stream.flush()
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error.strerror}") from error
        self.done += len(records)


@contextmanager
def open_journal(
    path: Path, settings: Mapping[str, Any], names: Sequence[str], batch_size: int
) -> Iterator[Journal]:
    """Open the file of a table's results, new or as an earlier run has left it.

    Args:
        path: the file.
        settings: everything that the results depend on.
        names: all images, in their order; the file holds those of the first ones.
        batch_size: number of images that are computed together.

    Raises:
        UserError: the file has other settings, or another run is writing it.
        OutputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+b")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another run is writing it; wait, or choose another --to") from None
        try:
            done = _resume(stream, path, settings, names, batch_size)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        yield Journal(stream, path, done)


def read_records(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield the results of the first images."""
    with path.open("rb") as stream:
        stream.readline()
        for _ in range(count):
            yield json.loads(stream.readline())


def _resume(
    stream: IO[bytes], path: Path, settings: Mapping[str, Any], names: Sequence[str], batch_size: int
) -> int:
    """Cut off what is not the result of a whole batch; return the number of images that are done."""
    stream.seek(0)
    first = stream.readline(MAX_LINE_BYTES)
    if first.endswith(b"\n"):
        _check_settings(first, path, settings)
    else:
        # new, or interrupted within its first line
        stream.truncate(0)
        stream.write(_line(settings))
        stream.flush()
        return 0
    done, ends = 0, [stream.tell()]
    for name in names:
        if _name_in(stream.readline(MAX_LINE_BYTES)) != name:
            break
        done += 1
        ends.append(stream.tell())
    if done < len(names):
        done -= done % batch_size
        stream.truncate(ends[done])
    stream.seek(0, os.SEEK_END)
    return done


def _check_settings(line: bytes, path: Path, settings: Mapping[str, Any]) -> None:
    try:
        earlier = json.loads(line)
    except ValueError:
        earlier = None
    if not isinstance(earlier, dict):
        raise UserError(f"{path}: its first line holds no settings; choose another --to, or remove the file")
    expected = json.loads(_line(settings))
    different = [key for key in expected if earlier.get(key) != expected[key]]
    if different:
        key = different[0]
        was, now = json.dumps(earlier.get(key)), json.dumps(expected[key])
        raise UserError(
            f"{path}: holds results of other settings: {key} was {was:.100} and is {now:.100}; choose "
            "another --to, or remove the file"
        )


def _name_in(line: bytes) -> str | None:
    if not line.endswith(b"\n"):
        return None
    try:
        name = json.loads(line)["name"]
    except (ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"
