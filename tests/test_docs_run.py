"""The commands and the Python of the documents are run, on small shards of the shipped scenes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile

import open_clip
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli import main as cli
from pipeline.demo import assets
from pipeline.output.counts import total_counts
from pipeline.run.outcome import JobResult, concluded, first_state
from pipeline.run.worker import build_annotator
from tests.helpers.documented_commands import (
    blocks_of,
    commands_of,
    documented_commands,
    once,
    parsed,
    runs_here,
)
from tests.helpers.documents import PAGES, ROOT, code_spans, section

README = PAGES[0]
SCENES_OF_A_SHARD = 2


def small_shard(source, target):
    """The first scenes of a shard."""
    with tarfile.open(source) as tar, tarfile.open(target, "w") as small:
        keys = []
        for member in tar:
            key = member.name.partition(".")[0]
            if key not in keys:
                keys.append(key)
            if len(keys) > SCENES_OF_A_SHARD:
                return
            small.addfile(member, tar.extractfile(member))


def annotate_here(job, progress, max_shards=None):
    """What `run_job` does, without ray."""
    annotator = build_annotator(job.config, {**job.metadata, "attempt": "a"}, cpus=1, device="cpu")
    counts = total_counts(annotator.annotate(shard).counts for shard in job.todo)
    annotator.close()
    state = dataclasses.replace(first_state(job), shards_done=len(job.todo), counts=counts)
    return concluded(job, JobResult(state))


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def run_legrad(patched, command):
    """Run a command line in this process; returns its exit code."""
    patched.setattr(sys, "argv", ["legrad", *command.words[1:]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, patched):
    """A folder like the root of a checkout after the demo, with few scenes; commands run here without ray."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "configs").symlink_to(ROOT / "configs")
    shards = root / "pipeline" / "demo" / "shards"
    shards.mkdir(parents=True)
    for path in (ROOT / "pipeline" / "demo").iterdir():
        if path.is_file():
            (shards.parent / path.name).symlink_to(path)
    for name in assets.SHARD_SETS:
        for path in assets.demo_shard_paths(name):
            small_shard(path, shards / path.name)
    (root / "out").mkdir()
    (root / "out" / "mine").symlink_to("demo")
    patched.chdir(root)
    patched.setattr(assets, "demo_shard_folder", lambda: shards)
    patched.setattr("pipeline.run.dispatcher.run_job", annotate_here)
    (command,) = commands_of("legrad annotate configs/demo.yaml", "")
    assert run_legrad(patched, command) == 0
    return root


def as_parameter(command):
    """The demo evaluates for long, and the list of models looks at every model that open_clip has."""
    takes_long = parsed(command)[0] in {"demo", "models"}
    return pytest.param(command, id=str(command), marks=[pytest.mark.slow] if takes_long else [])


@pytest.mark.parametrize(
    "command", [as_parameter(command) for command in once(documented_commands()) if runs_here(command)]
)
def test_a_command_that_needs_no_more_than_a_checkout_runs(command, checkout, patched, capsys):
    assert run_legrad(patched, command) == 0
    assert capsys.readouterr().out


def python_pages():
    """Pages with Python, and their blocks; queries have a test of their own."""
    queries = section(README, "Query the masks")
    found = {}
    for block in blocks_of("python"):
        if block.page != README or block.text not in queries:
            found.setdefault(block.page, []).append(block)
    return [pytest.param(found[page], id=str(page.relative_to(ROOT))) for page in found]


@pytest.mark.parametrize("page_blocks", python_pages())
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_python_in_the_documents_runs_and_gives_the_shapes_in_its_comments(page_blocks, checkout):
    namespace = {}
    for block in page_blocks:
        text, sizes = _on_the_demo_model(block.text)
        for name in re.findall(r'"(\w+\.jpg)"', text):
            _write_picture(checkout, name)
        exec(compile(text, block.where, "exec"), namespace)
        for variable, told in re.findall(r"^(\w+) = .*#.*?\[([\d, ]+)\]", text, re.MULTILINE):
            shape = [sizes.get(number, int(number)) for number in told.split(", ")]
            assert list(namespace[variable].shape) == shape, f"{block.where}: {variable}"
    _write_picture(checkout, "image.jpg")
    with Image.open("image.jpg") as image:
        for span in code_spans(page_blocks[0].page):
            if re.match(r"legrad(\.\w+)+\(", span):
                assert eval(span, namespace | {"assets": assets, "image": image}), span


def _on_the_demo_model(text):
    """The code with the shipped model for one of the hub, and which of its sizes stand for which."""
    named = re.search(r'from_open_clip\("([\w-]+)", "(\w+)"', text)
    if not named:
        return text, {}
    model, ours = (
        open_clip.get_model_config(named[1]),
        json.loads(assets.demo_model_config_path().read_text()),
    )
    assert named[2] in open_clip.list_pretrained_tags_by_model(named[1])
    assets.register_demo_model()
    call = f'from_open_clip("{assets.DEMO_MODEL_NAME}", {str(assets.demo_weights_path())!r}'
    sizes = {
        str(model["vision_cfg"]["image_size"]): ours["vision_cfg"]["image_size"],
        str(model["embed_dim"]): ours["embed_dim"],
    }
    return text.replace(named[0], call), sizes


def _write_picture(folder, name):
    with tarfile.open(next((folder / "pipeline" / "demo" / "shards").iterdir())) as tar:
        (first, *_) = (member for member in tar if member.name.endswith(".jpg"))
        (folder / name).write_bytes(tar.extractfile(first).read())


def _run_for_real(command, folder):
    """As a person runs it, with Ray; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(  # noqa: PLW1510 - told with its output
        [sys.executable, "-m", "pipeline", *command.words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "command",
    [
        command
        for command in once(documented_commands())
        if runs_here(command) and parsed(command)[0] in {"demo", "annotate"}
    ],
    ids=str,
)
def test_a_job_in_the_documents_runs_on_ray_and_tells_what_the_readme_shows(command, tmp_path):
    for name in ("configs", "pipeline"):
        (tmp_path / name).symlink_to(ROOT / name)
    told = _run_for_real(command, tmp_path)
    for block in blocks_of("output"):
        if parsed(command)[0] == "demo" and "`make demo`" in block.before:
            for line in block.lines:
                parts = [re.escape(part.strip()) for part in line.split("...")]
                words = ".*".join(parts).replace("out/demo", r"\S*out/demo")
                assert re.search(words, told), f"{block.where}: {line}"
    annotations = sorted((tmp_path / "out" / "demo" / "annotations").iterdir())
    assert sum(pq.read_metadata(path).num_rows for path in annotations) > 0
    assert {path.name for path in (tmp_path / "out" / "demo").iterdir()} >= {"job.json", "_SUCCESS", "runs"}
