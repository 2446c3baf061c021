"""Untrusted text is escaped before it reaches a terminal, whichever call writes it."""

import io
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.console import PrintableConsole
from pipeline.text import PrintableFormatter, on_screen, printable, printable_streams

# clear the screen, set its title, eight-bit controls, backspaces, directions, separators, half a character
HOSTILE = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\x9d0;title\x9c",
    "safe\b\b\b\bevil",
    "\rover the line",
    "\x7f",
    "\u202egpj.exe",
    "\u2066isolated\u2069",
    "\u200eleft",
    "\u200fright",
    "\u061carabic",
    "\u2028line",
    "\ud800",
    "\udc9b2J",
    "\0",
]
MARKUP = ["[bold]bold[/bold]", "[link=https://host]text[/link]", "[/]", ":warning:", "[on red blink]"]
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SOURCE = Path(__file__).parents[2]


def roads(console):
    """Each way in which a command shows text."""

    def table(text):
        shown = Table("name", text, title=text, caption=text)
        shown.add_row(text, Text(text, style="dim"))
        shown.add_row(Text(text, no_wrap=True), Group(text))
        console.print(shown)

    def live(text):
        with Live(Text(text), console=console, refresh_per_second=4, transient=True) as display:
            display.console.print(text)
            display.update(Group(Text(text), text))

    return {
        "print": console.print,
        "print in one piece": lambda text: console.print(text, soft_wrap=True),
        "rule": console.rule,
        "text": lambda text: console.print(Text(text, style="bold")),
        "group": lambda text: console.print(Group(text, Text(text))),
        "table": table,
        "live": live,
    }


@pytest.mark.parametrize("road", list(roads(PrintableConsole())))
@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_no_method_of_a_console_lets_untrusted_text_through(road, hostile):
    log = io.StringIO()
    roads(PrintableConsole(file=log, width=200))[road](hostile)
    assert not RAW.search(log.getvalue())
    # of a Text, rich has dropped backspaces and their like before
    assert "\\" in log.getvalue() or "\b" in hostile or "\r" in hostile


@pytest.mark.parametrize("road", list(roads(PrintableConsole())))
@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_on_a_terminal_there_are_no_sequences_but_those_of_the_display_itself(road, hostile):
    """The same text with all of it replaced by letters of the same width shows which those are."""

    def sequences(text):
        screen = io.StringIO()
        console = PrintableConsole(file=screen, width=200, force_terminal=True, color_system="standard")
        roads(console)[road](text)
        return set(re.findall("\x1b\\[[0-9;?]*[A-Za-z]", screen.getvalue())), screen.getvalue()

    found, shown = sequences(hostile)
    expected, _ = sequences("x" * len(on_screen(hostile)))
    assert found <= expected
    assert not RAW.search(re.sub("\x1b\\[[0-9;?]*[A-Za-z]|\r", "", shown))
    # the display goes back to its line's start, the text does not
    assert "\rover" not in shown


@pytest.mark.parametrize("road", list(roads(PrintableConsole())))
@pytest.mark.parametrize("text", MARKUP)
def test_markup_in_text_is_text(road, text):
    log = io.StringIO()
    roads(PrintableConsole(file=log, width=200))[road](text)
    assert text in log.getvalue()


def test_columns_are_as_wide_as_the_escaped_text():
    log = io.StringIO()
    table = Table("key", "count")
    table.add_row(Text("\x1b[2J" * 3), "1")
    table.add_row("plain", "2")
    PrintableConsole(file=log, width=80).print(table)
    assert len({len(line) for line in log.getvalue().splitlines()}) == 1


@given(st.text(st.characters()))
def test_printable_text_is_unchanged_and_the_rest_is_escaped(text):
    assert not RAW.search(on_screen(text))
    assert not re.search("[\n\t]", printable(text))
    if not RAW.search(text):
        assert on_screen(text) == text
    printable(text).encode()


def streams_of(write):
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        with printable_streams():
            write()
    finally:
        sys.stdout, sys.stderr = before
    return out.getvalue() + err.getvalue()


def log_line(text):
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    try:
        raise ValueError(text)
    except ValueError:
        record = logging.LogRecord("x", logging.WARNING, "", 0, "message: %s", (text,), sys.exc_info())
        handler.handle(record)


def warning(text):
    sys.stderr.write(warnings.formatwarning(text, UserWarning, "file.py", 1))


def trace(text):
    sys.excepthook(ValueError, ValueError(text), None)


@pytest.mark.parametrize("write", [print, log_line, warning, trace], ids=lambda write: write.__name__)
@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_no_other_way_of_writing_lets_untrusted_text_through(write, hostile):
    # pytest replaces the hooks of the interpreter, which write where sys.stderr is
    shown = streams_of(lambda: write(hostile))
    assert not RAW.search(shown)


def test_a_log_message_cannot_imitate_another_line():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "key %s", ("a\nERROR x: b",), None)
    assert PrintableFormatter("%(message)s").format(record) == "key a\\x0aERROR x: b"


def test_the_streams_are_restored_after_the_block():
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit), printable_streams():
        sys.exit(3)
    assert (sys.stdout, sys.stderr) == before


def test_modules_write_only_through_the_escaping_console():
    """Neither print nor another console is used, except to generate the project's own pages."""
    allowed = {"console.py", "reference.py"}
    for path in (SOURCE / "pipeline").rglob("*.py"):
        if path.name not in allowed and "demo" not in path.parts:
            found = re.findall(r"(?<![\w.])(?:print|Console|typer\.secho)\(", path.read_text())
            assert not found, path


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["status", "{}"],
        ["status", "--{}"],
        ["{}"],
        ["report", "{}"],
        ["report", "out", "--samples", "{}"],
        ["export", "{}", "dest", "--format", "coco"],
        ["export", "out", "dest", "--format", "{}"],
        ["evaluate", "{}", "{}"],
        ["annotate", "{}"],
        ["annotate", "{}.yaml", "a=[{}"],
        ["explain", "{}", "{}"],
        ["shards", "coco", "{}", "dest"],
        ["shards", "voc", "{}", "dest", "--split", "{}"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("through", ["pipe", "pty"])
def test_no_command_echoes_its_arguments_raw(tmp_path, words, through):
    hostile = "\x1b[2J\x9b2J\u202e\r\x07[bold]x[/bold]"
    command = [sys.executable, "-m", "pipeline", *(word.format(hostile) for word in words)]
    shown = run_through(through, command, tmp_path)
    assert shown
    assert not re.search("\x1b\\[2J|[\x07\x9b\u202e]|\r(?!\n)", shown)


def run_through(through, command, folder):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    if through == "pipe":
        finished = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return finished.stdout.decode()
    near, far = os.openpty()
    running = subprocess.Popen(command, cwd=folder, env=environment, stdout=far, stderr=far, stdin=far)
    os.close(far)
    shown = b""
    try:
        while piece := os.read(near, 65536):
            shown += piece
    except OSError:
        # the other end is closed
        pass
    finally:
        running.wait(timeout=120)
        os.close(near)
    return shown.decode()
