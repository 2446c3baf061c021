"""`legrad status` keeps footers between calls: outside of OUT, for its user alone, checked as when read."""

import os
import stat
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.output import footer_cache
from pipeline.output.status import read_status
from tests.helpers.report_jobs import varied_rows, write_job


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch):
    monkeypatch.setattr(footer_cache, "SETTLED_AFTER_S", 60)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder of this program."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "legrad"


@pytest.fixture
def out(tmp_path):
    return settled(write_job(tmp_path / "job", [varied_rows(4) for _ in range(3)]))


def settled(out, age_s=600):
    """Make all files look as if they had been written some time ago."""
    then_ns = time.time_ns() - age_s * 10**9
    for path in out.glob("*/*.parquet"):
        os.utime(path, ns=(then_ns, then_ns))
    return out


def first_annotations(out):
    return min((out / "annotations").iterdir())


def spoil_silently(path):
    """Put other bytes in a file, with the same size and time of change."""
    before = path.stat()
    path.write_bytes(b"\0" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_files_that_have_not_changed_are_not_read_again(out, cache):
    first = read_status(str(out))
    for path in out.glob("*/*.parquet"):
        spoil_silently(path)
    assert read_status(str(out)) == first
    assert len(first.done) == 3


@pytest.mark.parametrize("table", ["annotations", "errors"])
def test_a_file_with_another_time_or_size_is_read_again(table, out, cache):
    read_status(str(out))
    path = min((out / table).iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read_status(str(out)).mismatched) == 1
    spoil_silently(path)
    assert len(read_status(str(out)).mismatched) == 1


def test_a_file_that_is_gone_is_not_remembered(out, cache):
    read_status(str(out))
    first_annotations(out).unlink()
    status = read_status(str(out))
    assert (len(status.done), len(status.left)) == (2, 1)


def test_files_of_the_last_minute_are_read_each_time(out, cache):
    settled(out, age_s=5)
    read_status(str(out))
    assert not cache.exists()
    spoil_silently(first_annotations(out))
    assert len(read_status(str(out)).mismatched) == 1


def test_damaged_files_are_read_each_time(out, cache):
    path = first_annotations(out)
    content = path.read_bytes()
    before = path.stat()
    spoil_silently(path)
    assert len(read_status(str(out)).mismatched) == 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not read_status(str(out)).mismatched


def test_what_is_remembered_is_still_held_against_the_job(out, cache):
    read_status(str(out))
    job = out / "job.json"
    job.write_text(job.read_text().replace('"config_hash": "', '"config_hash": "x'))
    assert len(read_status(str(out)).mismatched) == 3


def test_the_cache_is_for_its_user_alone_and_outside_of_the_folder(out, cache):
    before = sorted(out.rglob("*"))
    read_status(str(out))
    (file,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(out.rglob("*")) == before


def test_each_folder_has_a_cache_of_its_own_however_it_is_named(out, cache, tmp_path, monkeypatch):
    other = settled(write_job(tmp_path / "other", [varied_rows(2)]))
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    for name in (out, "job/out", tmp_path / "link", other):
        read_status(str(name))
    assert len(list(cache.iterdir())) == 2


SPOILT = {
    "empty": lambda path: path.write_bytes(b""),
    "no Parquet": lambda path: path.write_bytes(b"nonsense" * 100),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "another table": lambda path: pq.write_table(pq.read_table(path).drop_columns(["errors_footer"]), path),
    "footers that are no JSON": lambda path: _with_footers(path, "{"),
    "footers without counts": lambda path: _with_footers(path, "{}"),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def _with_footers(path, text):
    rows = [{**row, "annotations_footer": text} for row in pq.read_table(path).to_pylist()]
    schema = pq.read_schema(path)
    pq.write_table(pq.read_table(path).from_pylist(rows, schema=schema), path)


@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_cache_is_ignored(name, out, cache, legrad):
    expected = read_status(str(out))
    SPOILT[name](next(cache.iterdir()))
    assert read_status(str(out)) == expected
    assert legrad("status", out)[0] == 0


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/nowhere"])
def test_status_needs_no_cache(place, out, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    assert len(read_status(str(out)).done) == 3


def test_a_user_without_home_has_no_cache(out, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert len(read_status(str(out)).done) == 3


def test_without_the_variable_the_cache_is_in_the_home_folder(out, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read_status(str(out))
    assert len(list((tmp_path / "home" / ".cache" / "legrad").iterdir())) == 1
