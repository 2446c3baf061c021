"""Benchmarks that replace parts of the pipeline still run, and print the keys that their page names."""

import json
import subprocess
import sys

import pytest

from tests.helpers.processes import REPOSITORY

BENCH = REPOSITORY / "tests" / "bench"

pytestmark = pytest.mark.slow


def row_of(program, *options):
    """Run a program of tests/bench, and return the JSON row that it prints."""
    printed = subprocess.check_output([sys.executable, BENCH / program, *options], text=True)
    return json.loads(printed)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_worker_without_its_device_is_measured_beside_its_floor(processes):
    row = row_of(
        "host_ceiling.py",
        *("--side=64x48", "--cores=1", f"--processes={processes}"),
        *("--shards=2", "--samples=200", "--rounds=1"),
    )
    names = ["samples_per_s", "cpu_ms_per_sample", "device_process_cpu_ms_per_sample", "floor_ms_per_sample"]
    assert all(row[name] > 0 for name in names)
    assert row["ratio"] == pytest.approx(row["cpu_ms_per_sample"] / row["floor_ms_per_sample"], rel=0.2)


def test_the_costs_of_sample_processes_are_measured():
    row = row_of("process_costs.py", "--side=64x48", "--rounds=1")
    figures = [figure for name, figure in row.items() if name.endswith(("_s", "_ms", "_us"))]
    assert len(figures) == 9
    assert all(figure > 0 for figure in figures)
    assert row["used_process"]["private_mb"] < row["used_process"]["proportional_mb"]


def test_the_status_of_a_folder_is_measured_with_and_without_a_cache_and_compacted():
    row = row_of("status_of_many_shards.py", "--shards=5", "--rows=3", "--s3-shards=0")
    assert list(row["local"]) == ["no cache", "cached", "compacted"]
    assert all(figure["wall_s"] > 0 for figure in row["local"].values())
