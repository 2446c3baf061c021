"""A letter in a path ends nothing: whole jobs, status, report and export in folders of any name."""

import os
import re

import pyarrow.dataset as ds
import pytest
import yaml

import legrad
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.config.load import load_config
from pipeline.demo import assets
from pipeline.errors import UserError
from pipeline.run import job as jobs
from tests.helpers.command_line import run_legrad
from tests.helpers.corpus import demo_job, write_corpus

NAMES = [
    *(
        "é",
        "漢字かな",
        "a b",
        " a ",
        "100%",
        "%41%",
        "a#b",
        "a?b",
        "[01]",
        "{0..9}",
        "{a,b}",
        "a{b",
        "a}b",
        "c*d",
    ),
    *(
        "a\\b",
        "~x",
        "~",
        "data:v1",
        "-n",
        "a=b",
        "it's",
        '"',
        "$HOME",
        "a,b",
        "...",
        "@x",
        "null",
    ),
    *("x" * 200, "🦙", "e\u0301", "&", "?id=1", "a;b", "!x", "|x", "1e3"),
]
# the others with the slow tests
SOON = {"é", "漢字かな", "a b", "%41%", "a?b", "[01]", "{0..9}", "a\\b"}


@pytest.fixture(scope="module")
def explainer():
    name = assets.register_demo_model()
    return legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=1)


def annotate(config, explainer):
    job = jobs.prepare_job(config)
    annotator = ShardAnnotator(job.config, explainer, decode_threads=1, metadata=job.metadata)
    for shard in job.todo:
        annotator.annotate(shard)
    annotator.close()
    jobs.prepare_job(config)
    return job


@pytest.mark.parametrize(
    "name", [name if name in SOON else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_job_runs_and_is_read_in_a_folder_of_any_name(name, explainer, tmp_path, monkeypatch, capsys):
    home = tmp_path / name
    (path,) = write_corpus(home / "in", 1, 2)
    job = annotate(demo_job([path], home / "out", model={"layers": 1}), explainer)
    assert job.shards[0].url == str(path)
    out = str(home / "out")
    assert run_legrad(monkeypatch, "status", out) in (0, 3)
    assert run_legrad(monkeypatch, "report", out, "--to", home / "page.html") == 0
    assert "2 with pictures" in capsys.readouterr().out
    assert run_legrad(monkeypatch, "export", out, home / "dest", "--format", "coco", "--no-images") == 0
    assert {found.name for found in home.iterdir()} == {"in", "out", "dest", "page.html"}
    assert {found.name for found in tmp_path.iterdir()} == {name}
    assert ds.dataset(sorted(map(str, (home / "out" / "annotations").iterdir()))).count_rows() == 2


@pytest.mark.parametrize("name", [name for name in NAMES if len(name) < 100 and "/" not in name])
def test_a_folder_of_any_name_may_be_named_in_a_configuration_from_where_it_lies(name, tmp_path, monkeypatch):
    (path,) = write_corpus(tmp_path / name / "in", 1, 1)
    document = demo_job([f"{name}/in/0000.tar"], f"{name}/out").model_dump(mode="json", exclude={"views"})
    (tmp_path / name / "job.yaml").write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    if name in ("@x", "~"):
        # a list of shards, and the home folder
        document["input"]["shards"] = [f"./{name}/in/0000.tar"]
        document["output"]["dir"] = f"./{name}/out"
        (tmp_path / name / "job.yaml").write_text(
            yaml.safe_dump(document, allow_unicode=True), encoding="utf-8"
        )
    config = load_config(f"./{name}/job.yaml")
    job = jobs.prepare_job(config)
    assert job.shards[0].url == str(path.resolve())
    assert (tmp_path / name / "out" / "job.json").exists()


def test_a_tilde_is_the_home_folder_wherever_a_path_is_named(explainer, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    write_corpus(home / "in", 1, 1)
    (home / "weights.safetensors").write_bytes(assets.demo_weights_path().read_bytes())
    (home / "classes.txt").write_text("dog\n")
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = demo_job(
        ["~/in/*.tar"],
        "~/out",
        model={"layers": 1, "pretrained": "~/weights.safetensors"},
        prompts={"source": "classes", "classes": "~/classes.txt"},
    )
    (home / "job.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"views"})))
    job = annotate(load_config("~/job.yaml"), explainer)
    assert (job.config.output.dir, job.shards[0].url) == (str(home / "out"), str(home / "in" / "0000.tar"))
    assert run_legrad(monkeypatch, "status", "~/out") in (0, 3)
    assert (
        run_legrad(monkeypatch, "report", "~/out", "--to", "~/page.html", "--classes", "~/classes.txt") == 0
    )
    assert run_legrad(monkeypatch, "export", "~/out", "~/dest", "--format", "coco", "--no-images") == 0
    assert {path.name for path in home.iterdir()} >= {"out", "page.html", "dest"}
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("out", "what"),
    [
        ("s3:/bucket/out", "did you mean s3://bucket/out?"),
        ("gs:bucket/out", "did you mean gs://bucket/out?"),
        ("file:/tmp/out", "did you mean file:///tmp/out?"),
        ("s3://", "expected a bucket"),
        ("s3:///out", "expected a bucket"),
        ("https://host/out?token=hunter2", "expected a local path, s3:// or gs://"),
        ("https://[::1/out?token=hunter2", "not a valid web address"),
        ("", "expected a path"),
        (os.fsdecode(b"/tmp/caf\xe9"), "UTF-8"),
    ],
)
def test_an_output_that_cannot_be_meant_is_one_line(out, what, tmp_path, monkeypatch, capsys):
    (path,) = write_corpus(tmp_path / "in", 1, 1)
    for command in (
        ["status", out],
        ["report", out],
        ["export", out, str(tmp_path / "d"), "--format", "coco"],
    ):
        assert run_legrad(monkeypatch, *command) == 1
        printed = capsys.readouterr().err
        assert what in printed
        assert printed.count("\n") == 1
        assert "hunter2" not in printed
    with pytest.raises(UserError) as caught:
        jobs.prepare_job(demo_job([path], out))
    # the configuration's own check may come first
    assert what in str(caught.value) or re.match(
        r"config: 1 problem\(s\)\n  output\.dir: ", str(caught.value)
    )
    assert "hunter2" not in str(caught.value)


def test_a_path_that_the_locale_cannot_write_is_reported(monkeypatch):
    def in_ascii(path):
        return path.encode("ascii")

    monkeypatch.setattr(os, "fsencode", in_ascii)
    with pytest.raises(UserError, match="PYTHONUTF8=1"):
        storage.absolute("漢字/out")
