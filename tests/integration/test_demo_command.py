"""The command of the README's first screen, run as a person runs it."""

import subprocess
import sys

import pyarrow.parquet as pq
import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_annotates_every_scene_evaluates_and_writes_a_report(tmp_path):
    command = [sys.executable, "-m", "pipeline", "demo", "--out", str(tmp_path / "demo")]
    ended = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "368 annotated, 0 empty, 0 failed" in ended.stdout
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    evaluations = {"evaluation-heldout.json", "evaluation-newartist.json"}
    assert written >= {"job.json", "_SUCCESS", "runs", "report.html"} | evaluations
    annotations = (tmp_path / "demo" / "annotations").iterdir()
    assert sum(pq.read_metadata(path).num_rows for path in annotations) > 368
