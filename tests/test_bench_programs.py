"""Benchmarks run, and their rows have what the layouts of their figures show."""

import json
import subprocess
import sys

import pytest

from tests.helpers.processes import REPOSITORY

BENCH = REPOSITORY / "tests" / "bench"

pytestmark = pytest.mark.slow


def rows_of(program, *options):
    """Run a program of tests/bench, and return the rows that it prints after its head."""
    printed = subprocess.check_output([sys.executable, BENCH / program, *options], text=True)
    head, *rows = map(json.loads, printed.splitlines())
    assert head["program"] == f"tests/bench/{program}"
    assert head["measures"]
    return rows


@pytest.mark.parametrize("workers", ["1:0", "1:1"])
def test_a_worker_without_its_device_is_measured_beside_its_floor(workers):
    (row,) = rows_of(
        "host_ceiling.py",
        *("--images", "64x48:1", "--workers", workers),
        *("--shards=2", "--samples=200", "--rounds=1"),
    )
    names = ["samples_per_s", "cpu_ms_per_sample", "device_process_cpu_ms_per_sample", "floor_ms_per_sample"]
    assert all(row[name] > 0 for name in names)
    assert row["ratio"] == pytest.approx(row["cpu_ms_per_sample"] / row["floor_ms_per_sample"], rel=0.2)


def test_the_costs_of_sample_processes_are_measured():
    (row,) = rows_of("process_costs.py", "--side=64x48", "--rounds=1")
    figures = [figure for name, figure in row.items() if name.endswith(("_s", "_ms", "_us"))]
    assert len(figures) == 9
    assert all(figure > 0 for figure in figures)
    assert row["used_process"]["private_mb"] < row["used_process"]["proportional_mb"]


def test_the_status_of_a_folder_is_measured_with_and_without_a_cache_and_compacted():
    (row,) = rows_of("status_of_many_shards.py", "--shards=5", "--rows=3", "--s3-shards=0")
    assert all(row[name]["wall_s"] > 0 for name in ("without_cache", "cached", "compacted"))


def test_a_variant_of_the_masks_is_scored_beside_the_default():
    default, plain = rows_of("ablation.py", "--sets=newartist", "--only=^plain$")
    assert default["difference"]["value"] == 0
    assert plain["mean_iou"]["value"] < default["mean_iou"]["value"]
    assert plain["map_average_precision"]["value"] < default["map_average_precision"]["value"]


def test_perturbation_scores_every_map_for_the_classes_shown_and_for_the_class_predicted():
    rows = rows_of("perturbation.py", "--sets=heldout", "--scenes=1")
    by_table = {table: [row for row in rows if row["table"] == table] for table in ("target", "predicted")}
    names = [row["map"] for row in by_table["target"]]
    assert names == [row["map"] for row in by_table["predicted"]]
    assert {"LeGrad, last 4", "LeGrad, last 4, keys", "LeGrad, last 4, contrast", "NACLIP", "random"} <= set(
        names
    )
    assert {row["pairs"] for row in by_table["predicted"]} == {1}
    assert all(0 <= row["deletion_positive"]["value"] <= 1 for row in rows)


def test_every_step_of_a_new_users_path_is_timed_or_named_as_skipped():
    *steps, total = rows_of("first_path.py", "--images=12", "--steps=2")
    outcome = {row["step"]: row["outcome"] for row in steps}
    assert "12 annotated" in outcome["maps and masks"]
    assert "12 label map(s)" in outcome["export to VOC"]
    assert "2 steps; loss" in outcome["2 steps by torchvision"]
    assert [row["step"] for row in steps if row["outcome"].startswith("skipped")] in (
        [],
        ["2 steps by ultralytics"],
    )
    assert total["seconds"] == pytest.approx(sum(row["seconds"] or 0 for row in steps), rel=1e-3)
