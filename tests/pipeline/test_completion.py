"""Tab completion: commands, options and the keys of a configuration, without loading a model library."""

import os
import subprocess
import sys

import pytest


def completed(line):
    """The words that zsh would offer at the end of a line, and the packages imported for it."""
    environment = {**os.environ, "_LEGRAD_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line}
    program = "import sys; sys.argv = ['legrad']; from pipeline.__main__ import run; run()"
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [text for text in process.stderr.splitlines() if text.startswith("import time:")]
    return process.stdout, {text.rpartition("|")[2].strip().partition(".")[0] for text in lines}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("legrad an", "annotate"),
        ("legrad annotate --dr", "--dry-run"),
        ("legrad annotate job.yaml masks.val", "masks.value="),
        ("legrad annotate job.yaml run.workers=2 model.na", "model.name="),
        ("legrad shards ", "voc"),
    ],
)
def test_commands_options_and_keys_are_completed_without_a_model_library(line, offered):
    out, packages = completed(line)
    assert offered in out
    assert not packages & {"torch", "ray", "open_clip", "scipy", "matplotlib"}


def test_values_are_not_completed():
    assert "masks" not in completed("legrad annotate job.yaml masks.value=0")[0]


def test_completion_is_installed_by_an_option(legrad):
    code, out, _ = legrad("--help")
    assert code == 0
    assert "--install-completion" in out
