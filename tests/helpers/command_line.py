"""The command line, run in the process of the test."""

import sys

from pipeline.cli import main as cli


def run_legrad(monkeypatch, *arguments):
    """Run `legrad` with these arguments, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["legrad", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code or 0
    return 0
