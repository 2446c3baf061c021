"""The page of keys is what the configuration's model says."""

from pathlib import Path

import pytest

from pipeline.config.load import known_keys
from pipeline.config.reference import BEGIN, END, keys_as_markdown, with_keys

PAGE = Path(__file__).parents[2] / "configs" / "README.md"


def test_the_page_lists_the_keys_as_they_are():
    page = PAGE.read_text(encoding="utf-8")
    renewed = with_keys(page)
    assert page == renewed, "stale: run `python -m pipeline.config.reference configs/README.md`"


def test_every_key_has_its_line():
    lines = keys_as_markdown().splitlines()
    for key in known_keys():
        if "." in key:
            assert sum(line.startswith(f"| `{key}` |") for line in lines) == 1, key


def test_values_defaults_and_bounds_are_reported():
    table = keys_as_markdown()
    assert "| `input.shards` | string or list of string | required |" in table
    assert "| `run.gpus_per_worker` | number ≥ 0 | `1` |" in table
    assert "| `output.rows` | `all` or `accepted` or null | `null` |" in table
    assert "| `masks.value` | number ≥ 0, ≤ 1 | `0.5` |" in table
    assert "| `output.heatmap` | boolean | `true` |" in table
    assert "| `prompts.max_background` | integer > 0 | `4` |" in table
    assert "| `run.workers` | integer ≥ 1, ≤ 65536 or null | `null` |" in table


def test_only_the_text_between_the_marks_is_renewed():
    assert with_keys(f"before{BEGIN}old{END}after") == f"before{BEGIN}\n\n{keys_as_markdown()}\n\n{END}after"


@pytest.mark.parametrize("page", ["", BEGIN, END, f"{END}{BEGIN}"])
def test_a_page_without_the_marks_is_refused(page):
    with pytest.raises(ValueError, match="marks"):
        with_keys(page)
