"""The documents' recipes for Iceberg and Delta: a compacted folder becomes a table with the same rows."""

import re

import pyarrow.parquet as pq
import pytest

from pipeline.output.status import read_status
from tests.helpers.compacted_jobs import compacted, rows_by_shard
from tests.helpers.documents import PAGES, blocks
from tests.helpers.report_jobs import varied_rows, write_job

pytestmark = pytest.mark.medium


@pytest.fixture
def job(tmp_path, monkeypatch):
    """out/compacted, as in the documents: 40 rows of two shards, 32 of them accepted."""
    out = write_job(tmp_path / "job", [varied_rows(25), varied_rows(15)], runs=False)
    compacted(out, tmp_path / "out" / "compacted")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out" / "compacted"


def run_block(*words):
    """Run the block of Python in the documents that has all the words; returns its names."""
    (text,) = (
        block.text
        for page in PAGES
        for block in blocks(page)
        if block.language == "python" and all(word in block.text for word in words)
    )
    names = {}
    exec(text, names)
    return names


def test_iceberg_takes_the_files_where_they_are(job, capsys):
    pytest.importorskip("pyiceberg.catalog.sql", reason="pyiceberg[sql-sqlite] is not installed")
    before = {path: path.stat().st_mtime_ns for path in job.rglob("*")}
    table = run_block("pyiceberg")["table"]
    assert re.search(r"^32$", capsys.readouterr().out, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in job.rglob("*")} == before
    assert_same_rows(table.scan().to_arrow(), job)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_delta_takes_the_files_where_they_are(job, capfd):
    pytest.importorskip("deltalake", reason="deltalake is not installed")
    expected, status = rows_by_shard(job), read_status(str(job))
    table = run_block("deltalake")["table"]
    assert re.search(r"^32$", capfd.readouterr().out, re.MULTILINE)
    assert_same_rows(table.to_pyarrow_table(), job)
    # its log stays out of the way of our readers, also as a Parquet file
    table.create_checkpoint()
    assert rows_by_shard(job) == expected
    assert read_status(str(job)) == status


def assert_same_rows(found, job):
    (path,) = (job / "annotations").glob("*.parquet")
    assert sorted(map(repr, found.to_pylist())) == sorted(map(repr, pq.read_table(path).to_pylist()))
