"""Readers of an output folder that was damaged or made up: one line that names the file, the rest goes on."""

import logging
import re
import shutil
import signal
from collections import Counter

import pytest

from pipeline.cli import main as cli
from pipeline.errors import PipelineError
from pipeline.training import MaskDataset
from tests.helpers.hostile_outputs import HOSTILE_OUTPUTS, good_output, target_of

GUARD_S = 120
SECOND_SHARD_SAMPLES = 3


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


# a further command that reads output folders is one more line here, and a name in hostile_outputs.ALL
READERS = {
    "report": read_by_report,
    "export": read_by_export,
    "training": read_by_training,
    "status": read_by_status,
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
        told, code, goes_on = READERS[reader](tmp_path / "out", Tools(capfd, monkeypatch, caplog))
    assert goes_on
    assert code == (3 if reader == "status" else 0)  # one of its shards is left
    assert "damaged" not in told.replace("0 damaged", "")


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
        told, code, goes_on = READERS[reader](out, Tools(capfd, monkeypatch, caplog))
    assert "Traceback" not in told
    assert all(len(line) < 1000 for line in told.splitlines())
    assert goes_on != hostile.is_refused_by(reader)
    if hostile.is_refused_by(reader):
        assert code in (1, 2)
    if reader in hostile.told_by:
        assert (hostile.told or path.name) in told
        assert Counter(told.splitlines()).most_common(1)[0][1] == 1
