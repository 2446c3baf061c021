"""Commands and library modules that need no model load no model libraries."""

import subprocess
import sys

import pytest

import legrad
from tests.helpers.report_jobs import error, varied_rows, write_job

MODEL_LIBRARIES = {"torch", "torchvision", "ray", "open_clip", "timm", "transformers", "scipy", "matplotlib"}
DATA_LIBRARIES = {"pyarrow", "numpy", "pandas", "yaml"}  # pydantic is imported by typer itself


def packages_imported(*arguments):
    """Exit code, standard output and imported top-level packages of a Python process with these arguments."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=False
    )
    lines = [line for line in process.stderr.splitlines() if line.startswith("import time:")]
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "site" in names, process.stderr
    return process.returncode, process.stdout, names


def test_the_version_is_printed_before_any_other_package_is_imported():
    code, out, packages = packages_imported("-m", "pipeline", "--version")
    assert (code, out.split()[0]) == (0, "legrad")
    assert not packages & (MODEL_LIBRARIES | DATA_LIBRARIES | {"typer", "rich", "legrad"})


@pytest.mark.parametrize("arguments", [["--help"], ["annotate", "--help"], ["shards", "images", "--help"]])
def test_help_loads_neither_model_nor_data_libraries(arguments):
    code, out, packages = packages_imported("-m", "pipeline", *arguments)
    assert code == 0
    assert "Usage" in out
    assert not packages & (MODEL_LIBRARIES | DATA_LIBRARIES)


def test_the_list_of_models_is_printed_without_importing_a_model_library():
    code, shown, packages = packages_imported("-m", "pipeline", "models", "--refused")
    assert code == 0
    assert "RN50" in shown
    assert not packages & (MODEL_LIBRARIES | {"huggingface_hub"})


def test_the_status_of_an_output_folder_loads_no_model_library(tmp_path):
    out = write_job(tmp_path, [varied_rows(3)], errors=[error()])
    code, shown, packages = packages_imported("-m", "pipeline", "status", str(out))
    assert code in (0, 3)
    assert "shards" in shown
    # pyarrow imports pandas, where it is installed, for some comparisons
    assert not packages & (MODEL_LIBRARIES | {"pandas"})


@pytest.mark.parametrize(
    "module",
    ["legrad.errors", "legrad.masks.rle", "pipeline.config.row_keys", "pipeline.output.label_map"],
)
def test_modules_that_need_no_model_load_no_model_library(module):
    code, _, packages = packages_imported("-c", f"import {module}")
    assert code == 0
    assert not packages & MODEL_LIBRARIES


def test_decoding_images_loads_torch_and_no_other_model_library():
    code, _, packages = packages_imported("-c", "import pipeline.shards.images")
    assert code == 0
    assert packages & MODEL_LIBRARIES == {"torch"}


def test_every_public_name_of_the_library_is_found_when_it_is_used():
    assert set(legrad.__all__) <= set(dir(legrad))
    # a constant has no name of its own
    assert all(getattr(getattr(legrad, name), "__name__", name) == name for name in legrad.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Legrad'"):
        _ = legrad.Legrad
