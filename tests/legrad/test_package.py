"""The public names of the package, and what importing it loads."""

import importlib
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import legrad

ROOT = Path(__file__).parents[2]
HEATMAPS = """
from tests.helpers.tiny_models import tiny_clip, tiny_images, unit_texts
explainer = legrad.LeGrad(tiny_clip())
explainer.heatmaps(tiny_images(), unit_texts(2))
refinement = legrad.Refinement(dilations=(1,))
legrad.refine_heatmaps(torch.rand(1, 3, 8, 8), torch.rand(1, 2, 8, 8), refinement=refinement)
"""


def test_the_public_names_are_these():
    assert sorted(legrad.__all__) == [
        "BASELINES",
        "Baseline",
        "Cleaning",
        "Explanation",
        "Explanations",
        "ImageMasks",
        "ImageTransform",
        "InputError",
        "LayerTrace",
        "LeGrad",
        "LeGradError",
        "LocalisationScores",
        "MapLocalisation",
        "MaskError",
        "MaskRule",
        "ModelLoadError",
        "ModelSupport",
        "PerturbationCurve",
        "Refinement",
        "Rle",
        "RleError",
        "TokenizerError",
        "Trace",
        "UnsupportedModelError",
        "Views",
        "baseline",
        "baseline_grids",
        "contrasted_grids",
        "decode_rle",
        "dilations_for_patch",
        "encode_rle",
        "explain_image",
        "explain_images",
        "grid_to_masks",
        "heatmaps_of",
        "insertion_deletion",
        "layer_strip",
        "load_trace",
        "localisation_scores",
        "map_localisation",
        "mask_area",
        "mask_bbox_xywh",
        "minmax_normalise",
        "otsu_threshold",
        "overlay",
        "refine_heatmaps",
        "save_trace",
        "smoothed_grids",
        "supported_models",
        "text_distances",
        "upsample_grid",
        "view_relevance",
    ]
    assert all(hasattr(legrad, name) for name in legrad.__all__)


def test_no_name_of_a_package_is_also_the_name_of_one_of_its_submodules():
    # Importing a submodule would put it in the place of the function.
    packages = [legrad]
    for found in pkgutil.walk_packages(legrad.__path__, "legrad."):
        if found.ispkg:
            packages.append(importlib.import_module(found.name))
    for package in packages:
        submodules = {module.name for module in pkgutil.iter_modules(package.__path__)}
        names = {name for name, value in vars(package).items() if not inspect.ismodule(value)}
        assert not submodules & (names | set(getattr(package, "__all__", ())))


def test_the_version_is_the_one_of_the_installed_distribution():
    assert legrad.__version__ == importlib.metadata.version("legrad-pipeline")


def test_every_error_is_a_legrad_error():
    errors = [getattr(legrad, name) for name in legrad.__all__ if name.endswith("Error")]
    assert len(errors) == 7
    assert all(issubclass(error, legrad.LeGradError) for error in errors)


def test_relevance_grids_become_masks_through_public_names_alone():
    grids = torch.zeros(2, 4, 6)
    grids[0, 1:3, 2:4] = 1
    masks = legrad.grid_to_masks(
        grids, 40, 60, legrad.MaskRule("otsu"), cleaning=legrad.Cleaning(max_hole=0.1)
    )
    pixels = legrad.decode_rle(masks.rles[0])
    heatmap = legrad.heatmaps_of(grids, 40, 60, "upsampled")[0]
    assert (pixels == (heatmap > legrad.otsu_threshold(heatmap)).numpy()).all()
    assert legrad.encode_rle(pixels[None]) == masks.rles[:1]
    assert legrad.mask_area(masks.rles).tolist() == masks.areas.tolist() == [pixels.sum(), 0]
    assert (legrad.mask_bbox_xywh(masks.rles) == masks.bboxes_xywh).all()


def loaded_after(program, packages):
    """The packages of a list that a program in a process of its own has imported at its end."""
    ending = f"print([name for name in {sorted(packages)} if name in sys.modules])"
    source = f"import sys, torch, legrad\n{program}\n{ending}"
    finished = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return finished.stdout.strip()


def test_importing_legrad_loads_neither_ray_nor_the_application():
    program = "from legrad import *"
    assert loaded_after(program, {"ray", "pipeline"}) == "[]"


@pytest.mark.parametrize("program", ["from legrad import *", HEATMAPS], ids=["import", "heat maps"])
def test_what_heat_maps_do_not_need_is_not_loaded(program):
    assert loaded_after(program, {"pycocotools", "scipy", "matplotlib", "sklearn"}) == "[]"
