"""A machine without room for temporary files: a ScratchError that names the folder, never an OutputError."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from multiprocessing import Pipe

import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.annotate.parcels import Parcels
from pipeline.errors import OutputError, ScratchError
from pipeline.output.writer import ROWS_PER_GROUP, ROWS_SCHEMA, ShardWriter
from pipeline.storage.pipes import CommandOutput

MEBIBYTE = 1 << 20


@contextmanager
def largest_file(size_bytes):
    """From here on the kernel refuses to let a file of this process grow above the size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_temporary_disk_is_named_with_its_folder_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with (
        storage.Spool(max_size=1000) as spool,
        largest_file(2 * MEBIBYTE),
        pytest.raises(ScratchError, match=rf"in {tmp_path} on this machine: File too large; .* set TMPDIR"),
    ):
        for _ in range(3):
            spool.write(bytes(MEBIBYTE))


def test_what_is_still_buffered_when_the_disk_is_full_is_noticed_before_it_is_published(tmp_path):
    with storage.Spool(max_size=1) as spool:
        spool.write(b"on the disk")
        with largest_file(5), pytest.raises(ScratchError, match="File too large"):
            spool.write(b"buffered")
            storage.publish(str(tmp_path), "x.bin", spool)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_for_temporary_files_is_a_scratch_error(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with (
        storage.Spool(max_size=10) as spool,
        pytest.raises(ScratchError, match="in /nowhere on this machine"),
    ):
        spool.write(bytes(11))
    with pytest.raises(ScratchError, match="in /nowhere on this machine"):
        CommandOutput("pipe:cat 0.tar", "0.tar")


def rows(number):
    """Rows with masks that zstd cannot make smaller."""
    columns = [pa.nulls(number, field.type) for field in ROWS_SCHEMA]
    place = ROWS_SCHEMA.get_field_index("heatmap")
    columns[place] = pa.array([os.urandom(100_000) for _ in range(number)], ROWS_SCHEMA.field(place).type)
    return pa.table(columns, schema=pa.schema([field.with_nullable(True) for field in ROWS_SCHEMA]))


def shard():
    return storage.ShardSource("0", "file:///0.tar", "file:///0.tar", None)


def test_a_shard_whose_rows_overflow_the_temporary_disk_fails_for_want_of_it():
    outcomes = {"annotated": ROWS_PER_GROUP}
    with (
        ShardWriter(shard(), {}) as writer,
        largest_file(MEBIBYTE),
        pytest.raises(ScratchError, match="temporary files cannot be written"),
    ):
        writer.add(rows(ROWS_PER_GROUP), [], outcomes)


def test_a_full_output_folder_stays_an_output_error(tmp_path):
    with largest_file(MEBIBYTE), pytest.raises(OutputError, match=r"x\.bin: cannot be written: .*too large"):
        storage.publish(str(tmp_path), "x.bin", bytes(2 * MEBIBYTE))
    assert list(tmp_path.iterdir()) == []


ON_A_FULL_DISK = """
import sys
from pipeline import storage
from pipeline.errors import ScratchError
try:
    with storage.Spool(max_size=1) as spool:
        for _ in range(2):
            spool.write(bytes(1 << 20))
except ScratchError as error:
    print(error)
"""


@pytest.fixture
def small_disk(tmp_path):
    """A folder and a command that runs another with a file system of 1 MiB mounted there."""
    place = tmp_path / "small"
    place.mkdir()
    inside = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"', str(place)]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this user may not mount a file system")
    return place, inside


def test_a_file_system_that_is_really_full_is_named(small_disk):
    place, inside = small_disk
    ran = subprocess.run(
        [*inside, sys.executable, "-c", ON_A_FULL_DISK],
        env={**os.environ, "TMPDIR": str(place)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        f"temporary files cannot be written in {place} on this machine: No space left on device" in ran.stdout
    )


def test_memory_that_cannot_be_had_for_samples_is_a_lack_of_this_machine():
    ours, theirs = Pipe()
    with (
        ours,
        theirs,
        largest_file(MEBIBYTE),
        pytest.raises(ScratchError, match="memory for samples cannot be"),
    ):
        Parcels(ours).send(np.zeros(4 * MEBIBYTE, np.uint8))
