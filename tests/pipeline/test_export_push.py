"""Exports that are pushed to the Hugging Face Hub, here a local server: one commit, with a dataset card."""

import re

import huggingface_hub.constants
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.errors import OutputError, UserError
from pipeline.export.card import escaped
from pipeline.export.push import push, repository_of
from tests.helpers.dataset_hub import dataset_hub
from tests.helpers.report_jobs import row, write_job

TOKEN = "hf_not_a_real_token_0123456789"
TARGET = "hf://datasets/somebody/some-masks"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with dataset_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own retries
        yield server


@pytest.fixture
def job(tmp_path):
    rows = [row(0, prompt="<b>cat</b> | [x](y)", class_id=1), row(1, prompt="dog", class_id=2)]
    return write_job(tmp_path / "job", [rows], runs=False)


def export(job, dest, *options):
    arguments = ["export", str(job), str(dest), "--format", "coco", "--push", TARGET, *options]
    return CliRunner().invoke(app, arguments)


def test_a_finished_export_is_one_commit_with_a_card_and_without_records_of_this_machine(hub, job, tmp_path):
    ran = export(job, tmp_path / "to")
    assert ran.exit_code == 0, ran.output
    assert "pushed: http://127.0.0.1" in ran.output
    assert TOKEN not in ran.output
    files = hub.files["somebody/some-masks"]
    images = [path for path in files if path.startswith("images/")]
    assert len(images) == 2
    kept = {"README.md", "annotations.json", "classes.txt", *images}
    assert set(files) - kept == {path for path in files if path.startswith("annotations/")}
    assert files["annotations.json"] == (tmp_path / "to" / "annotations.json").read_bytes()
    assert len(hub.commits["somebody/some-masks"]) == 1
    assert hub.private == {"somebody/some-masks"}
    assert f"Bearer {TOKEN}" in hub.tokens


def test_the_card_has_counts_model_and_escaped_names_and_leaves_the_licence_open(hub, job, tmp_path):
    export(job, tmp_path / "to")
    card = hub.files["somebody/some-masks"]["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["pretty_name"] == "some-masks"
    assert "license" not in yaml.safe_load(header)
    assert "# license: to be chosen" in header
    assert "- 2 samples exported" in text
    assert "- Model: " in text
    assert r"- 1: \<b\>cat\<\/b\> \| \[x\]\(y\)" in text
    assert str(tmp_path) not in card


def test_a_card_that_the_repository_has_is_kept(hub, job, tmp_path):
    hub.files["somebody/some-masks"] = {"README.md": b"my own"}
    assert export(job, tmp_path / "to").exit_code == 0
    assert hub.files["somebody/some-masks"]["README.md"] == b"my own"
    assert "annotations.json" in hub.files["somebody/some-masks"]


def test_the_same_command_pushes_a_finished_export_after_a_failure(hub, job, tmp_path):
    hub.answers["/api/datasets/somebody/some-masks/commit"] = (403, "write access is not granted")
    with pytest.raises(
        UserError, match=r"refuses to write somebody/some-masks \(HTTP 403.*HF_TOKEN"
    ) as refused:
        raise export(job, tmp_path / "to").exception
    assert TOKEN not in str(refused.value)
    hub.answers.clear()
    ran = export(job, tmp_path / "to")
    assert ran.exit_code == 0, ran.output
    assert "0 shard(s) written, 1 done before" in ran.output
    assert "annotations.json" in hub.files["somebody/some-masks"]


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_environment(job, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "to").mkdir()
    with pytest.raises(OutputError, match=r"cannot reach 127\.0\.0\.1 \(Connect.*run the same command"):
        push(str(tmp_path / "to"), "somebody/some-masks", "card")


def test_an_incomplete_export_is_not_pushed(hub, tmp_path):
    rows = [[row(0, prompt="cat", class_id=1)], [row(0, prompt="cat", class_id=1)]]
    job = write_job(tmp_path / "job", rows, done=1, runs=False)
    ran = export(job, tmp_path / "to")
    assert ran.exit_code == 3
    assert "not pushed" in ran.output
    assert not hub.files


@pytest.mark.parametrize(
    ("target", "dest", "message"),
    [
        ("somebody/some-masks", "to", "expected hf://datasets/USER/NAME, got 'somebody/some-masks'"),
        ("hf://models/a/b", "to", "expected hf://datasets/USER/NAME"),
        ("hf://datasets/a", "to", "expected hf://datasets/USER/NAME"),
        ("hf://datasets/-a/b", "to", "--push: Repo id must use alphanumeric chars"),
        ("hf://datasets/a/..", "to", "--push: Repo id must use alphanumeric chars"),
        ("hf://datasets/a/b.git", "to", "--push: Repo_id cannot end by '.git'"),
        ("hf://datasets/a/b--c", "to", "--push: Cannot have -- or .."),
        (TARGET, "to", "--push: there is no token; set HF_TOKEN"),
        (TARGET, "s3://bucket/to", "expected DEST on this machine, got s3://bucket/to"),
    ],
)
def test_a_target_that_cannot_be_pushed_to_is_refused_before_the_export(monkeypatch, target, dest, message):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match=re.escape(message)):
        repository_of(target, dest)


def test_untrusted_text_stays_text_in_markdown():
    assert escaped("a\n# b <script> `x`") == r"a\\x0a\# b \<script\> \`x\`"
