"""The queries in the documents give the right answers on a job whose rows are known."""

import re

import pyarrow.parquet as pq
import pytest

from tests.helpers.documents import PAGES, blocks
from tests.helpers.report_jobs import row, write_job

BUCKET = "s3://my-masks/"


def block(*words):
    """The one block of Python in the documents that has all the words."""
    (found,) = (
        block.text
        for page in PAGES
        for block in blocks(page)
        if block.language == "python" and all(word in block.text for word in words)
    )
    return found


@pytest.fixture
def job(tmp_path, monkeypatch):
    """out/demo, as in the documents: 40 rows, in which larger numbers have larger masks."""
    rows = [
        row(
            i,
            prompt=f"thing {i % 3}",
            class_id=1 + i % 3,
            similarity=i / 100,
            status="ok" if i % 10 else "rejected_peak",
        )
        for i in range(40)
    ]
    out = write_job(
        tmp_path / "job",
        [rows[:25], [{**r, "sample_index": r["sample_index"] - 25} for r in rows[25:]]],
        runs=False,
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    return out


@pytest.fixture
def remote_job(job, store, only_loopback, monkeypatch):
    """The same on a store, in a bucket of its own: the job, and the bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    bucket = f"queries-{job.parent.parent.name.replace('_', '-')}"
    store.ask("PUT", bucket)
    for path in (job / "annotations").iterdir():
        store.put(f"{bucket}/run-1/annotations/{path.name}", path.read_bytes())
    return job, bucket


def accepted_rows(job):
    rows = [r for path in (job / "annotations").iterdir() for r in pq.read_table(path).to_pylist()]
    return [r for r in rows if r["status"] == "ok"]


def numbers(text):
    return [float(word) for word in re.findall(r"(?<![\w.])\d+\.?\d*(?![\w.])", text)]


def test_duckdb_finds_the_largest_masks(job, capsys):
    exec(block("import duckdb", "out/demo"), {})
    shares = [value for value in numbers(capsys.readouterr().out) if 0 < value < 1]
    expected = sorted((r["area"] / (48 * 64) for r in accepted_rows(job)), reverse=True)[:5]
    assert shares == pytest.approx(expected)


def test_polars_finds_what_is_least_similar(job, capsys):
    exec(block("import polars", "out/demo"), {})
    printed = capsys.readouterr().out
    assert "key000" in printed
    assert "key001" not in printed


def test_pandas_counts_prompts(job, capsys):
    exec(block("import pandas"), {})
    printed = capsys.readouterr().out
    assert re.search(r"thing 0\s+14", printed)
    assert re.search(r"thing 2\s+13", printed)


@pytest.mark.parametrize("library", ["import polars", "import duckdb"])
def test_the_balance_of_classes_is_read_from_a_store(library, remote_job, capsys):
    rows, bucket = accepted_rows(remote_job[0]), remote_job[1]
    exec(block(library, BUCKET).replace(BUCKET, f"s3://{bucket}/"), {})
    printed = numbers(capsys.readouterr().out)
    for class_id in (1, 2, 3):
        count = sum(r["class_id"] == class_id for r in rows)
        assert float(class_id) in printed
        assert float(count) in printed


def test_datasets_of_hugging_face_load_the_rows(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    exec(block("load_dataset"), {})
    assert re.search(r"^40 thing \d$", capsys.readouterr().out.strip(), re.MULTILINE)
