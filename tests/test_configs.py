"""Every configuration that is shipped loads, and says how to run it and what was measured."""

import re
from pathlib import Path

import open_clip
import pytest

from pipeline.config.load import load_config
from pipeline.evaluation.sweep import read_sweep

CONFIGS = Path(__file__).parents[1] / "configs"
SWEEP = CONFIGS / "protocol" / "sweep.yaml"
JOBS = sorted(path for path in CONFIGS.rglob("*.yaml") if "cluster" not in path.parts and path != SWEEP)
PROTOCOL = [path for path in JOBS if "protocol" in path.parts]


def opening(path):
    """The comment at the top of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])


def test_the_demo_a_corpus_and_the_papers_protocol_are_there():
    names = {str(path.relative_to(CONFIGS)) for path in JOBS}
    assert {"demo.yaml", "corpus-vit-b-16.yaml"} <= names
    assert {f"protocol/{name}.yaml" for name in ("vit-b-16", "vit-l-14", "vit-b-16-siglip")} <= names


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_configuration_loads_and_names_a_model_that_exists(path):
    model = load_config(path).model
    if model.pretrained != "demo":
        assert model.pretrained in open_clip.list_pretrained_tags_by_model(model.name)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_configuration_opens_with_its_command_and_what_was_measured(path):
    text = opening(path)
    assert f"legrad annotate {path.relative_to(CONFIGS.parent)}" in text
    assert re.search(r"not measured|Measured|tests/bench/README.md", text)


@pytest.mark.parametrize("path", PROTOCOL, ids=lambda path: path.stem)
def test_the_papers_protocol_is_a_map_for_each_class_in_the_image_cut_at_a_half(path):
    config = load_config(path)
    assert (config.masks.rule, config.masks.value, config.masks.refine) == ("fixed", 0.5, "none")
    assert (config.prompts.source, config.input.caption) == ("captions", "json:captions")
    assert config.prompts.templates == ("a photo of a {}.",)
    assert config.model.image_size == 448


def test_the_sweep_loads_for_every_model_of_the_protocol_and_opens_with_its_command():
    assert "python -m pipeline.cli.sweep configs/protocol/sweep.yaml --voc" in opening(SWEEP)
    assert "not measured" in opening(SWEEP)
    variants = read_sweep(SWEEP, ["a.tar"], "out")
    assert {each.model for each in variants} == {path.stem for path in PROTOCOL}
    assert len({each.config.output.dir for each in variants}) == len(variants)
    of_one = [each for each in variants if each.model == "vit-b-16"]
    contrasts = {
        (each.config.masks.contrast, each.config.masks.value) for each in of_one if "keys" not in each.name
    }
    assert contrasts >= {(share, value) for share in (0.3, 0.5, 0.7) for value in (0.4, 0.5)}
    assert {each.baseline for each in of_one} == {None, "NACLIP", "MaskCLIP"}
    assert "keys" in {each.config.model.affinity for each in of_one}
