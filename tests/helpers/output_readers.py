"""What the readers that people use find in an output folder, beside what the job says is there."""

import json

import duckdb
import polars as pl
import pyarrow.dataset as ds

from pipeline.output.folder import OutputFolder
from pipeline.output.status import read_status
from pipeline.report.totals import read_totals


def rows_by_reader(out):
    """How many rows each reader finds, by the patterns that people write."""
    pattern = str(out / "annotations" / "*.parquet")
    folder = OutputFolder(str(out))
    return {
        "duckdb": duckdb.sql(f"SELECT count(*) FROM '{pattern}'").fetchall()[0][0],
        "polars": pl.scan_parquet(pattern).select(pl.len()).collect().item(),
        "polars, the folder": pl.scan_parquet(out / "annotations").select(pl.len()).collect().item(),
        "pyarrow": ds.dataset(out / "annotations", format="parquet").count_rows(),
        "status": read_status(str(out)).counts.rows,
        "report": read_totals(folder, folder.job()).counts.rows,
    }


def assert_all_readers_find(out, rows=None):
    """The same number of rows by every reader, whatever it is where none is expected; nothing else beside."""
    found = rows_by_reader(out)
    rows = found["status"] if rows is None else rows
    assert set(found.values()) == {rows}, found
    anywhere = {path.parent.name for path in out.glob("**/*.parquet")} - {out.name}
    assert anywhere <= {"annotations", "errors"}
    success = out / "_SUCCESS"
    if success.exists():
        assert json.loads(success.read_text())["rows"] == rows
