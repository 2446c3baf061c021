"""Published figures are what programs wrote: pages are made from data files, and show all of them."""

import json
import re
import subprocess
import sys

import pytest

from tests.helpers.documents import PAGES, name_of, prose
from tests.helpers.processes import REPOSITORY

BENCH = REPOSITORY / "tests" / "bench"
sys.path.append(str(BENCH))

import figure_values  # noqa: E402
import figures  # noqa: E402
import layouts  # noqa: E402
import measured_files  # noqa: E402
import published  # noqa: E402

PROGRAMS = sorted(
    path for path in BENCH.glob("*.py") if "__main__" in path.read_text() and path.name != "explain_server.py"
)
# prints the help of each program, in one process, so that libraries are imported once
HELP = """
import contextlib, runpy, sys
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(program, run_name="__main__")
"""
ON_EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=name_of)
TABLE = re.compile(r"^\|.*\n\|[-|: ]+\n(?:\|.*\n?)+", re.MULTILINE)
# a cell that is a figure: a number, perhaps signed, with a unit or an interval
NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+(e-?\d+)?( ?(±|/|to|%|ms|s|GB|MB|MiB|kB) ?[\d.,e-]*)*")
# headers of tables of numbers that no program measures, and what the numbers are
NOT_MEASURED_HERE = {
    "| what | value | why |": "values of configuration keys",
    "| key | method | depends on the text | range of a cell |": "lowest and highest values by definition",
}


def tables_outside_of_regions(text):
    """Return the tables of a page that no program wrote."""
    return TABLE.findall(figures.REGION.sub("", text))


def is_of_figures(table):
    """Whether some cells of a table are nothing but numbers."""
    cells = [cell.strip() for line in table.splitlines()[2:] for cell in line.split("|")[2:-1]]
    return sum(bool(NUMBER.fullmatch(cell)) for cell in cells) > 1


@ON_EACH_PAGE
def test_regions_of_figures_are_what_the_data_files_make(page):
    text = page.read_text(encoding="utf-8")
    assert figures.with_figures(text) == text, "run python tests/bench/figures.py --pages"


@ON_EACH_PAGE
def test_every_table_of_figures_is_made_from_a_data_file(page):
    found = [
        table.splitlines()[0] for table in tables_outside_of_regions(prose(page)) if is_of_figures(table)
    ]
    assert [header for header in found if header not in NOT_MEASURED_HERE] == []


def test_a_figure_that_is_edited_by_hand_is_found():
    page = BENCH / "README.md"
    text = page.read_text(encoding="utf-8")
    edited = re.sub(r"\| 1\.000 \|", "| 1.001 |", text, count=1)
    assert edited == text or figures.with_figures(edited) != edited


def test_a_table_of_numbers_outside_of_a_region_is_found():
    table = "| a | b |\n|---|---|\n| x | 1.5 |\n| y | 2.5 ±.1 |\n"
    region = f"<!-- figures: cluster_simulation begin -->\n{table}<!-- figures: cluster_simulation end -->"
    assert [is_of_figures(each) for each in tables_outside_of_regions(table)] == [True]
    assert tables_outside_of_regions(region) == []


def test_every_region_has_a_layout_and_every_data_file_a_region():
    shown = {
        match[1] for page in PAGES for match in figures.REGION.finditer(page.read_text(encoding="utf-8"))
    }
    shown = {
        name for page in PAGES for _, name, *_ in figures.REGION.findall(page.read_text(encoding="utf-8"))
    }
    assert shown == layouts.REGIONS.keys()
    read = {region.figure for region in layouts.REGIONS.values()}
    assert set(figure_values.names_of_figures()) <= read


@pytest.mark.parametrize("name", figure_values.names_of_figures())
def test_a_data_file_names_its_program_commit_and_files(name):
    document = figure_values.read_figure(name).document
    assert (REPOSITORY / document["program"]).exists()
    assert document["commit"] and document["date"] and document["command"]
    assert document["program"] in document["files"]


@pytest.mark.medium
def test_every_program_explains_itself():
    shown = subprocess.check_output([sys.executable, "-c", HELP, *map(str, PROGRAMS)], text=True, cwd=BENCH)
    assert re.findall(r"^usage: (\w+\.py)", shown, re.MULTILINE) == [path.name for path in PROGRAMS]


def test_comments_and_docstrings_change_no_digest(tmp_path):
    def digest_of(text):
        path = tmp_path / "code.py"
        path.write_text(text)
        return measured_files.digest(path)

    first = digest_of('"""What it does."""\n\ndef f(x):\n    """Return x."""\n    return x + 1\n')
    assert digest_of('# why\ndef f(x):\n    """Else."""\n    return x + 1  # because\n') == first
    assert digest_of("def f(x):\n    return x + 2\n") != first


def test_files_are_measured_that_a_program_imports_through_others():
    files = measured_files.measured_files(
        ["tests/bench/rows_agreement.py"], ["pipeline/demo/shards/newartist-*.tar"]
    )
    assert {
        "tests/bench/rows_agreement.py",
        "tests/helpers/row_agreement.py",
        "pipeline/annotate/rows.py",
        "legrad/masks/rle.py",
        "pipeline/demo/shards/newartist-000000.tar",
    } <= files.keys()
    assert not any("published" in path or "making" in path for path in files)


def test_a_pattern_without_files_is_an_error():
    with pytest.raises(FileNotFoundError, match="no file matches 'nothing/"):
        measured_files.measured_files([], ["nothing/*.tar"])


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return a function that records a row with some options, and returns the data file."""
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    monkeypatch.setattr(figures, "renew_pages", list)

    def record_with(*options, row):
        arguments = published.figure_parser("").parse_args(options)
        with published.recording(str(BENCH / "small_shards.py"), arguments, name="trial") as record:
            record("rows", row)
        return json.loads((tmp_path / "trial.json").read_text())

    return record_with


def test_a_data_file_has_values_and_what_they_were_measured_with(written, monkeypatch):
    monkeypatch.setattr(published, "changed_files", lambda paths: [])
    found = written(
        "--write", row={"iou": figure_values.Interval(1 / 3, 0.2, 0.4), "images": 3, "cpu_s": 2 / 3}
    )
    assert found["tables"]["rows"] == [
        {"iou": {"value": 0.333333, "low": 0.2, "high": 0.4}, "images": 3, "cpu_s": 0.666667}
    ]
    assert found["is_clean"] and found["program"] in found["files"] and found["machine"]["processor"]


def test_figures_of_changed_files_are_written_only_on_request(written, monkeypatch):
    monkeypatch.setattr(published, "changed_files", lambda paths: ["legrad/text.py"])
    with pytest.raises(SystemExit, match=r"1 measured files differ .* legrad/text.py"):
        written("--write", row={"images": 3})
    assert not written("--write", "--allow-dirty", row={"images": 3})["is_clean"]


def test_a_figure_is_older_once_a_measured_file_differs(written, monkeypatch):
    monkeypatch.setattr(published, "changed_files", lambda paths: [])
    document = written("--write", row={"images": 3})
    assert figures.changes_since(figure_values.Figure("trial", document)) == []
    changed = document["files"] | {"legrad/text.py": "0" * 12, "legrad/gone.py": "0" * 12}
    older = figure_values.Figure("trial", document | {"files": changed})
    assert figures.changes_since(older) == ["legrad/gone.py", "legrad/text.py"]


@pytest.mark.parametrize(
    ("form", "shown"),
    [
        ("{short_half}", ".912 ±.030"),
        ("{span}", ".912 (.880 to .940)"),
        ("{percent_half}", "91.2 ±3.0"),
        ("{signed_percent_half}", "+91.2 ±3.0"),
    ],
)
def test_an_interval_is_shown_in_the_forms_of_the_pages(form, shown):
    interval = figure_values.Interval(0.9123, 0.88, 0.94)
    assert form.replace("{", "{0.").format(interval) == shown


def test_what_was_not_measured_is_shown_as_a_dash():
    assert "{0[forward][median_ms]:.3g} {0.share.short}".format(figure_values.Missing()) == "- -"
