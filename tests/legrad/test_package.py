"""The package's public face."""

import importlib.metadata
import subprocess
import sys

import legrad


def test_the_public_names_are_these():
    assert sorted(legrad.__all__) == [
        "Explanation",
        "ImageTransform",
        "InputError",
        "LayerTrace",
        "LeGrad",
        "LeGradError",
        "ModelLoadError",
        "ModelSupport",
        "Refinement",
        "TokenizerError",
        "Trace",
        "UnsupportedModelError",
        "Views",
        "explain_image",
        "layer_strip",
        "overlay",
        "refine_heatmaps",
        "supported_models",
        "view_relevance",
    ]
    assert all(hasattr(legrad, name) for name in legrad.__all__)


def test_the_version_is_the_one_of_the_installed_distribution():
    assert legrad.__version__ == importlib.metadata.version("legrad-pipeline")


def test_every_error_is_a_legrad_error():
    errors = [legrad.InputError, legrad.ModelLoadError, legrad.TokenizerError, legrad.UnsupportedModelError]
    assert all(issubclass(error, legrad.LeGradError) for error in errors)


def test_importing_legrad_brings_neither_ray_nor_the_application():
    program = "import sys, legrad; print([m for m in sys.modules if m.split('.')[0] in ('ray', 'pipeline')])"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
