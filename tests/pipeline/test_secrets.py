"""A secret in every input there is: no output, log, metric or file of any command ever holds it."""

import functools
import logging
import re
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import legrad
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.config.load import load_config
from pipeline.demo import assets
from pipeline.output.runs import RunState, recorded_run
from pipeline.run import job as jobs
from pipeline.run.prometheus import RunMetrics
from pipeline.storage import shown_url
from tests.helpers.command_line import run_legrad
from tests.helpers.corpus import demo_job, image_bytes, write_corpus
from tests.helpers.object_servers import SECRET, FolderHandler, serving

pytestmark = pytest.mark.usefixtures("only_loopback")

QUERY = f"token={SECRET}&X-Amz-Signature={SECRET}&key={SECRET}"


@pytest.fixture(scope="module")
def explainer():
    name = assets.register_demo_model()
    return legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=1)


class Signed(FolderHandler):
    """Serves files to those who sign; leads `/moved/` elsewhere, signed, as stores do."""

    def send_head(self):
        if "/away/" in self.path:
            self.send_response(302)
            self.send_header("Location", f"ftp://u:{SECRET}@127.0.0.1/x?{QUERY}")
            self.end_headers()
            return None
        if "/odd/" in self.path:
            self.send_response(302)
            self.send_header("Location", f"http://u:{SECRET}@127.0.0.1:port{SECRET}/x y?{QUERY}")
            self.end_headers()
            return None
        if "/moved/" in self.path:
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved/", "/"))
            self.end_headers()
            return None
        if SECRET not in self.path:
            self.send_error(403)
            return None
        return super().send_head()


@pytest.fixture
def site(tmp_path):
    """A folder that is served, and its address with all that is secret before and after a name."""
    folder = tmp_path / "served"
    folder.mkdir()
    with serving(functools.partial(Signed, directory=folder)) as port:
        yield folder, lambda name, scheme="http": f"{scheme}://u:{SECRET}@127.0.0.1:{port}/{name}?{QUERY}"


@pytest.fixture
def output_so_far(capfd, caplog):
    """All that was printed and logged so far."""
    caplog.set_level(logging.DEBUG)

    def text():
        printed = capfd.readouterr()
        return printed.out + printed.err + caplog.text

    return text


def clean(folder, *texts):
    """Check that neither texts nor files hold the secret, in whatever form."""
    for text in texts:
        assert SECRET not in text
    for path in folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def annotate(config, explainer):
    job = jobs.prepare_job(config)
    annotator = ShardAnnotator(job.config, explainer, decode_threads=1, metadata=job.metadata)
    for shard in job.todo:
        annotator.annotate(shard)
    annotator.close()
    with recorded_run(job.folder) as recorder:
        recorder.update(RunState(shards_total=1, shards_skipped=0, shards_done=1))
        recorder.close("complete")
    return job


def test_a_job_whose_every_input_is_signed_leaves_no_secret(
    site, explainer, tmp_path, monkeypatch, output_so_far
):
    folder, url = site
    write_corpus(folder, 2, 2)
    (folder / "list.txt").write_text(f"{url('moved/0000.tar')}\n{url('{0001,0001}.tar')}\n")
    (folder / "classes.txt").write_text("dog\n")
    (folder / "a.jpg").write_bytes(image_bytes(1))
    out = tmp_path / "written" / "out"
    config = demo_job(
        [f"@{url('list.txt', 'HTTP')}", url("0001.tar").replace("http:", "{http,http}:")],
        out,
        model={"layers": 1},
        prompts={"source": "classes", "classes": url("classes.txt")},
    )
    (folder / "job.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"views"})))
    job = annotate(load_config(url("job.yaml")), explainer)
    assert len(job.shards) == 2
    given = url("{moved/0000,0001}.tar")
    written = tmp_path / "written"
    commands = [
        ["annotate", url("job.yaml"), "--dry-run"],
        ["status", out],
        ["report", out, given, "--classes", url("classes.txt")],
        ["report", out, f"http://127.0.0.1=http://u:{SECRET}@127.0.0.1:1/x?{QUERY}"],
        ["export", out, written / "coco", "--format", "coco", "--shards", given],
        ["export", out, written / "w", "--format", "webdataset", "--shards", given],
        ["evaluate", out, given],
        ["explain", url("a.jpg"), "a dog", "--model", "demo", "--out", written / "explain"],
    ]
    codes = [run_legrad(monkeypatch, *command) for command in commands]
    text = output_so_far()
    assert codes[:3] == [0, 3, 0] or codes[:3] == [0, 0, 0], text
    assert codes[4:6] == [0, 0], text
    assert codes[7] == 0, text
    clean(written, text)


@pytest.mark.parametrize(
    "fault",
    [
        "gone/{}",
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("away/{}", "odd/{}", "unsigned")),
    ],
)
def test_inputs_that_cannot_be_read_are_reported_without_their_secrets(
    fault, site, tmp_path, monkeypatch, output_so_far
):
    folder, url = site
    written = tmp_path / "written"
    written.mkdir()
    (shard,) = write_corpus(folder / "in", 1, 1)

    def bad(name):
        if fault == "unsigned":
            return re.sub(r"\?.*", f"?code={SECRET[:-1]}", url(name))
        return url(fault.format(name))

    job_file = written / "job.yaml"
    job_file.write_text(
        yaml.safe_dump(
            {
                "input": {"shards": str(shard)},
                "model": {"name": "legrad_demo_clip", "pretrained": "demo"},
                "output": {"dir": str(written / "out")},
            }
        )
    )
    jobs.prepare_job(load_config(job_file))
    commands = [
        ["annotate", bad("job.yaml")],
        ["annotate", job_file, f"input.shards=@{bad('list.txt')}", "--dry-run"],
        ["annotate", job_file, f"input.shards={bad('0.tar')}", "--dry-run"],
        [
            "annotate",
            job_file,
            "prompts.source=classes",
            f"prompts.classes={bad('classes.txt')}",
            "--dry-run",
        ],
        ["annotate", job_file, f"input.shards=http:/u:{SECRET}@host/0.tar?{QUERY}", "--dry-run"],
        ["annotate", job_file, f"input.shards=http://u:{SECRET}@[::1/x?{QUERY}", "--dry-run"],
        ["annotate", job_file, f"input.shards={bad('{0..9.tar')}", "--dry-run"],
        ["annotate", job_file, f"input.shards=pipe:curl -H {SECRET} {bad('x')}", "--dry-run"],
        ["annotate", job_file, f"input.shards=pipe:{bad('x')}", "input.allow_commands=true", "--dry-run"],
        ["annotate", job_file, f"output.dir={bad('out')}", "--dry-run"],
        ["annotate", job_file, f"output.dir=s3://u:{SECRET}@bucket/out", "--dry-run"],
        ["status", bad("out")],
        ["report", bad("out")],
        ["report", written / "out", "--classes", bad("classes.txt")],
        ["report", written / "out", bad("0.tar")],
        ["export", bad("out"), bad("dest"), "--format", "coco"],
        ["export", written / "out", bad("dest"), "--format", "coco"],
        ["export", written / "out", written / "dest", "--format", "coco", "--classes", bad("classes.txt")],
        ["explain", bad("a.jpg"), "dog", "--model", "demo"],
        # a secret key with a slash in it, and what the command line itself refuses
        ["annotate", job_file, f"input.shards=s3://AKIA:{SECRET}/x@bucket/0.tar", "--dry-run"],
        ["annotate", job_file, f"input.shards=http://u:{SECRET}/x@127.0.0.1:1/0.tar", "--dry-run"],
        ["models", "--fetch", f"local-dir:{bad('model')}", "null"],
        [bad("x")],
        ["status", written / "out", bad("x")],
        ["export", written / "out", written / "dest", "--format", bad("x")],
        ["annotate", job_file, "--limit", bad("x")],
    ]
    for command in commands:
        code = run_legrad(monkeypatch, *command)
        text = output_so_far()
        assert "Traceback" not in text, command
        assert SECRET[:-1] not in text, command
        assert code in (0, 1, 2), command
    clean(written)


def test_keys_in_the_urls_of_stores_are_neither_shown_nor_stored(
    store, explainer, tmp_path, monkeypatch, output_so_far
):
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    store.put(bucket, b"")
    (path,) = write_corpus(tmp_path / "in", 1, 2)
    store.put(f"{bucket}/in/0.tar", path.read_bytes())
    options = f"region=us-east-1&scheme=http&endpoint_override={store.endpoint.removeprefix('http://')}"

    def url(name):
        return f"S3://testing:{SECRET}@{bucket}/{name}?{options}"

    annotate(demo_job([url("in/*.tar")], f"s3://{bucket}/out?{options}", model={"layers": 1}), explainer)
    commands = [
        ["status", url("out")],
        ["report", url("out"), url("in/*.tar"), "--to", url("page.html")],
        ["export", url("out"), url("dest"), "--format", "coco", "--no-images", "--shards", url("in/*.tar")],
        ["export", url("out"), url("in"), "--format", "coco", "--no-images", "--shards", url("in/*.tar")],
        ["export", url("out"), url("dest"), "--format", "voc", "--shards", url("in/*.tar")],
    ]
    codes = [run_legrad(monkeypatch, *command) for command in commands]
    text = output_so_far()
    assert codes[0] in (0, 3), text
    assert codes[1:] == [0, 0, 1, 1], text
    assert SECRET not in text
    for key in re.findall(r"<Key>(.*?)</Key>", store.ask("GET", f"{bucket}?list-type=2").decode()):
        assert SECRET.encode() not in store.get(f"{bucket}/{key}"), key


def test_a_commands_arguments_are_not_stored(tmp_path, explainer, output_so_far):
    (path,) = write_corpus(tmp_path / "in", 1, 1)
    out = tmp_path / "written" / "out"
    for number, command in enumerate(
        (f"pipe:env T={SECRET} cat {path}", f"pip{{e:,e:}}env T={SECRET} cat {path}")
    ):
        annotate(
            demo_job([command], f"{out}{number}", model={"layers": 1}, input={"allow_commands": True}),
            explainer,
        )
    clean(tmp_path / "written", output_so_far())


def test_a_secret_in_the_records_of_a_foreign_folder_is_not_repeated(tmp_path, explainer):
    (path,) = write_corpus(tmp_path / "in", 1, 1)
    config = demo_job([str(path)], tmp_path / "out", model={"layers": 1})
    annotate(config, explainer)
    listed = pq.read_table(tmp_path / "out" / "shards.parquet")
    rows = [{**row, "shard": f"http://u:{SECRET}@host/0.tar?{QUERY}"} for row in listed.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=listed.schema), tmp_path / "out" / "shards.parquet")
    (warning,) = jobs.prepare_job(config).warnings
    assert "http://host/0.tar" in warning
    assert SECRET not in warning


def test_no_metric_holds_a_secret():
    tags = []

    class Recording:
        def __init__(self, *_args):
            pass

        def inc(self, _value, tags):
            all_tags.append(str(tags))

        set = inc

    all_tags = tags
    state = RunState(shards_total=1, shards_skipped=0, workers_ready=1)
    RunMetrics(shown_url(f"s3://u:{SECRET}@b/out?key={SECRET}"), Recording, Recording).update(state)
    assert tags
    assert SECRET not in "".join(tags)
