"""Readers of an output folder that was damaged or made up: one line that names the file, the rest goes on."""

import json
import logging
import re
import shutil
import signal
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from pipeline.annotate.model import load_explainer
from pipeline.cli import main as cli
from pipeline.cli.explain import model_named
from pipeline.errors import DamagedFileError, PipelineError
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.evaluate import evaluate_shards
from pipeline.output.folder import OutputFolder
from pipeline.training import MaskDataset
from tests.helpers.compacted_jobs import compacted
from tests.helpers.ground_truth_shards import label_map, scene_fields, two_object_shard, write_shard
from tests.helpers.hostile_outputs import HOSTILE_OUTPUTS, good_output, target_of

GUARD_S = 120
SECOND_SHARD_SAMPLES = 3


def compacted_output(folder):
    """The good output folder, compacted."""
    return compacted(good_output(folder), folder / "compacted")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return good_output(tmp_path_factory.mktemp("good"))


@pytest.fixture(autouse=True)
def _guard():
    """A reader that hangs is ended; nothing is said about how fast the others are."""

    def end(*_):
        raise AssertionError("the reader hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(GUARD_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run(capfd, monkeypatch, *words):
    """Exit code and everything that a command showed."""
    monkeypatch.setattr("sys.argv", ["legrad", *map(str, words)])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    shown = capfd.readouterr()
    return ending.value.code or 0, shown.out + shown.err


def read_by_report(out, tools):
    code, shown = run(tools.capfd, tools.monkeypatch, "report", out)
    return shown, code, (out / "report.html").is_file()


def read_by_export(out, tools):
    code, shown = run(tools.capfd, tools.monkeypatch, "export", out, out.parent / "dest", "--format", "coco")
    return shown + tools.caplog.text, code, (out.parent / "dest" / "annotations.json").is_file()


def read_by_training(out, tools):
    try:
        keys = [
            sample["key"] for sample in MaskDataset(out, target="masks", shuffle=False, skip_unreadable=True)
        ]
    except PipelineError as error:
        return str(error), 1, False
    return tools.caplog.text, 0, len(keys) >= SECOND_SHARD_SAMPLES


def read_by_status(out, tools):
    code, shown = run(tools.capfd, tools.monkeypatch, "status", out)
    # a line as it was before it was folded to the width of the screen
    unfolded = re.sub(r"(?<=\S)\s*\n(?=\S)|(?<=\S)\n\s{0,4}(?=\S)", "", shown)
    return unfolded, code, "samples" in shown


def read_by_evaluate(out, tools):
    """Its masks are read, and held against truth of the same samples."""
    truth = out.parent / "truth"
    truth.mkdir()
    labels = label_map({1: (4, 20, 4, 20)}, 48, 64)
    fields = scene_fields(labels, ["a dog"], [1])
    for name in ("0", "1"):
        write_shard(truth / f"{name}.tar", {f"key{index:03d}": fields for index in range(3)})
    maps = maps_of_any_folder()
    tools.monkeypatch.setattr(evaluation, "load_explainer", lambda *_, **__: demo_explainer())
    tools.monkeypatch.setattr(evaluation, "evaluate_scenes", lambda *_, **__: maps)
    tools.monkeypatch.setattr(evaluation, "plot_evaluation", lambda _: b"")
    code, shown = run(tools.capfd, tools.monkeypatch, "evaluate", out, truth / "0.tar", truth / "1.tar")
    result = out / "evaluation.json"
    scored = json.loads(result.read_text())["written"]["rows_scored"] if result.is_file() else 0
    # without the rules and empty lines of its tables
    unfolded = re.sub(r"(?<=\S)\n(?=\S)", "", shown)
    lines = [line for line in unfolded.splitlines() if re.search(r"\w", line)]
    return "\n".join(lines), code, scored >= SECOND_SHARD_SAMPLES


@cache
def demo_explainer():
    return load_explainer(model_named("demo", None), "cpu")


@cache
def maps_of_any_folder():
    """What evaluation says of the model's maps: worked out once, as no folder changes it."""
    with tempfile.TemporaryDirectory() as folder:
        return evaluate_shards(demo_explainer(), [two_object_shard(Path(folder) / "0.tar")])


# a further command that reads output folders is one more line here, and a name in hostile_outputs.ALL
READERS = {
    "report": read_by_report,
    "export": read_by_export,
    "training": read_by_training,
    "status": read_by_status,
    "evaluate": read_by_evaluate,
}


# one in four with every change, all of them with the slow tests
SOME_FOLDERS = [
    pytest.param(name, marks=() if number % 4 == 0 else pytest.mark.slow)
    for number, name in enumerate(HOSTILE_OUTPUTS)
]


class Tools:
    def __init__(self, capfd, monkeypatch, caplog):
        self.capfd, self.monkeypatch, self.caplog = capfd, monkeypatch, caplog


@pytest.mark.parametrize("reader", READERS)
def test_a_sound_folder_is_read_without_a_word(good, tmp_path, reader, capfd, monkeypatch, caplog):
    shutil.copytree(good, tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        shown, code, goes_on = READERS[reader](tmp_path / "out", Tools(capfd, monkeypatch, caplog))
    assert goes_on
    # one of its shards was given up
    assert code == (3 if reader in ("status", "export") else 0)
    assert "damaged" not in shown.replace("0 damaged", "")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", SOME_FOLDERS)
def test_a_hostile_folder_costs_one_line_that_names_the_file(
    good, tmp_path, name, reader, capfd, monkeypatch, caplog
):
    hostile = HOSTILE_OUTPUTS[name]
    out = tmp_path / "out"
    shutil.copytree(good, out)
    path = target_of(out, hostile.place)
    hostile.spoil(path)
    with caplog.at_level(logging.WARNING):
        shown, code, goes_on = READERS[reader](out, Tools(capfd, monkeypatch, caplog))
    assert "Traceback" not in shown
    assert all(len(line) < 1000 for line in shown.splitlines())
    assert goes_on != hostile.is_refused_by(reader)
    if hostile.is_refused_by(reader):
        assert code in (1, 2)
    if hostile.is_told_by(reader):
        # evaluation skips a file with such a mask as a whole
        assert (path.name if reader == "evaluate" else hostile.message or path.name) in shown
        assert Counter(shown.splitlines()).most_common(1)[0][1] == 1


@pytest.mark.medium
@pytest.mark.parametrize("table", ["annotations", "errors"])
@pytest.mark.parametrize("made", [good_output, compacted_output], ids=["shards", "compacted"])
def test_no_byte_of_a_page_can_make_rows_disappear_silently(made, table, tmp_path):
    folder = OutputFolder(str(made(tmp_path)))
    (shard_id,) = sorted(folder.ids(table))[:1]
    path = target_of(folder.url, table)
    sound, refused = path.read_bytes(), 0
    for place in range(4, 400):
        for value in (0, sound[place] ^ 1):
            path.write_bytes(sound[:place] + bytes([value]) + sound[place + 1 :])
            try:
                with folder.open(table, shard_id) as file:
                    assert len(list(file.rows(["key", "shard"]))) == file.row_count, (place, value)
            except DamagedFileError:
                refused += 1
    assert refused > 0
