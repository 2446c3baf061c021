"""`legrad init`: a configuration for a corpus, with comments, that a dry run accepts."""

import json
import re
import shlex

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.cli.explain import model_named
from pipeline.config.load import parse_config
from pipeline.corpus.first_config import first_config
from pipeline.demo import assets
from pipeline.storage.urls import local_path
from tests.helpers.corpus import image_bytes, sample, write_shard

CAPTION = "a dog on a red sofa"


def as_json(**document):
    return json.dumps(document).encode()


CORPORA = {
    "txt": ({"txt": CAPTION.encode()}, {"image": "jpg", "caption": "txt"}, "caption"),
    "img2dataset": (
        {
            "txt": None,
            "json": as_json(
                caption=CAPTION,
                url="https://h/a.jpg",
                key="0001",
                status="success",
                sha256="0f" * 32,
                width=9,
            ),
        },
        {"image": "jpg", "caption": "json:caption"},
        "caption",
    ),
    "hugging face": (
        {
            "jpg": None,
            "txt": None,
            "image_png": image_bytes(1, file_format="PNG"),
            "metadata_json": as_json(text=CAPTION),
        },
        {"image": "image.png", "caption": "metadata.json:text"},
        "caption",
    ),
    "several captions": (
        {"txt": None, "json": as_json(captions=[CAPTION, "a sofa"])},
        {"image": "jpg", "caption": "json:captions"},
        "captions",
    ),
    "a label map beside the image": (
        {"seg_png": image_bytes(2, file_format="PNG")},
        {"image": "jpg", "caption": "txt"},
        "caption",
    ),
    "a key that YAML would misread": (
        {"txt": None, "json": as_json(**{'alt text: "x"': CAPTION})},
        {"image": "jpg", "caption": 'json:alt text: "x"'},
        "caption",
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_the_written_file_names_the_fields_and_passes_a_dry_run(legrad, tmp_path, monkeypatch, name):
    members, fields, source = CORPORA[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data").mkdir()
    write_shard(tmp_path / "my data" / "0.tar", [sample(f"{n}", seed=n, **members) for n in range(3)])
    code, out, err = legrad("init", "my data", "--to", "job.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == ["  legrad annotate job.yaml --dry-run", "  legrad annotate job.yaml"]
    written = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert written["input"] == {"shards": "my data/*.tar", **fields}
    assert written["prompts"]["source"] == source
    assert written["output"]["dir"] == "out/my-data"
    code, out, err = legrad("annotate", "job.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert "note:" not in out


def test_the_file_for_the_demo_passes_a_dry_run(legrad, tmp_path):
    pattern = assets.demo_shard_folder() / "*.tar"
    assert legrad("init", pattern, "--to", tmp_path / "job.yaml", "--model", "demo")[0] == 0
    text = (tmp_path / "job.yaml").read_text()
    assert "# In 48 of 48 samples, such as" in text
    assert legrad("annotate", tmp_path / "job.yaml", f"output.dir={tmp_path}/out", "--dry-run")[0] == 0


@pytest.mark.parametrize("value", ["7", "goldfish"])
def test_a_classification_corpus_gets_a_list_of_classes_to_write(legrad, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "0.tar", [sample(f"{n}", seed=n, txt=None, cls=value.encode()) for n in range(3)])
    code, out, _ = legrad("init", tmp_path, "--to", "job.yaml")
    assert code == 0
    assert "write classes.yaml" in out
    (tmp_path / "classes.yaml").write_text("- {name: goldfish, synonyms: ['7']}\n")
    code, out, err = legrad("annotate", "job.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert "prompts: about 3" in out


def test_without_a_file_the_configuration_alone_goes_to_standard_output(legrad, tmp_path):
    write_shard(tmp_path / "0.tar", [sample("a"), sample("b", seed=1)])
    code, out, err = legrad("init", tmp_path)
    assert code == 0
    assert yaml.safe_load(out)["input"]["shards"] == f"{tmp_path}/*.tar"
    assert "legrad annotate job.yaml --dry-run" in err


def test_an_existing_file_is_overwritten_only_with_force(legrad, tmp_path):
    write_shard(tmp_path / "0.tar", [sample("a")])
    job = tmp_path / "job.yaml"
    job.write_text("mine")
    code, _, err = legrad("init", tmp_path, "--to", job)
    assert (code, job.read_text()) == (1, "mine")
    assert "--force overwrites it" in err
    assert legrad("init", tmp_path, "--to", job, "--force")[0] == 0
    assert "input:" in job.read_text()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.jpg", "sub/b.JFIF"],
            "it holds 2 image(s) and no tar; write shards first: legrad shards images {0} DEST",
        ),
        (["a.jpg", "metadata.csv"], "DEST --captions {0}/metadata.csv; then: legrad init DEST"),
        (["train-0.parquet"], "legrad shards parquet '{0}/*.parquet' DEST --image IMAGE --caption CAPTION"),
        (["data/0.parquet"], "legrad shards parquet '{0}/**/*.parquet' DEST --image IMAGE"),
        (["notes.md"], "it holds no tar; files: 1 .md"),
        ([], "it holds no tar; it is empty"),
    ],
)
def test_a_folder_without_tars_is_answered_by_the_command_that_makes_them(legrad, tmp_path, names, message):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    code, _, err = legrad("init", folder)
    assert code == 1
    assert message.format(folder) in err
    assert ("then: legrad init" in err) == ("legrad shards" in err)


def test_a_command_that_names_a_folder_can_be_pasted(legrad, tmp_path):
    folder = tmp_path / "it's [x] {y} $HOME"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"x")
    (folder / "captions.csv").touch()
    code, _, err = legrad("init", folder)
    assert code == 1
    (command,) = re.findall("write shards first: (.*); then", err)
    words = ["legrad", "shards", "images", str(folder), "DEST", "--captions", f"{folder}/captions.csv"]
    assert shlex.split(command) == words


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("{0}/no*.tar", "nothing matches"),
        ("{0}/none.tar", "none of the shards looked at has a sample"),
        ("{0}/0.jpg", "is a JPEG image, and a shard is a tar; `legrad shards images ROOT DEST`"),
        ("{0}/text.tar", "no field of 1 samples is a JPEG"),
        ("https://user:pw@host/0.tar", "has credentials"),
    ],
)
def test_what_is_no_corpus_is_refused(legrad, tmp_path, corpus, message):
    (tmp_path / "0.jpg").write_bytes(image_bytes(1))
    write_shard(tmp_path / "text.tar", [sample("a", jpg=None)])
    code, _, err = legrad("init", corpus.format(tmp_path))
    assert code == 1
    assert message in err
    assert "pw" not in err


@pytest.mark.parametrize(
    "names", [["0.TAR", "1.TAR"], ["0.tar", "1.TAR"], ["0.tar", "sub/1.tar.gz"], ["0.tgz", "1.tgz"]]
)
def test_tars_of_any_ending_are_found_and_no_other_file(legrad, tmp_path, names):
    corpus = tmp_path / "{a} [b]"
    for name in [*names, "notes.txt", "table.tsv", "0.tar.idx"]:
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        write_shard(corpus / name, [sample("a")])
    file = tmp_path / "job.yaml"
    code, _, err = legrad("init", corpus, "--to", file)
    assert code == 0, err
    shards = storage.list_shards(yaml.safe_load(file.read_text())["input"]["shards"])
    assert {local_path(shard.url) for shard in shards} == {corpus / name for name in names}


def test_images_in_hidden_folders_do_not_count(legrad, tmp_path):
    for name in ("0.jpg", "a/1.jpg", ".cache/2.jpg", ".3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert "it holds 2 image(s) and no tar" in legrad("init", tmp_path)[2]


def test_a_look_goes_to_shards_that_are_there(legrad, tmp_path):
    write_shard(tmp_path / "1.tar", [sample("a")])
    code, out, err = legrad("init", f"{tmp_path}/{{0..4}}.tar")
    assert (code, "5 shard(s)" in out, "1 samples of 1 shard(s)" in out) == (0, True, True), err


@pytest.mark.parametrize(
    "document", [{"file_name": "my cat"}, {"name": "my cat.JPG"}, {"url": "a nice page"}]
)
def test_what_names_an_image_is_no_caption(legrad, tmp_path, document):
    write_shard(tmp_path / "0.tar", [sample("a", txt=None, json=as_json(**document))])
    code, out, err = legrad("init", tmp_path)
    assert code == 0, err
    assert yaml.safe_load(out)["prompts"]["source"] == "classes"
    assert "caption" not in yaml.safe_load(out)["input"]


def test_a_shard_that_is_cut_counts_with_what_precedes_the_cut(legrad, tmp_path):
    write_shard(tmp_path / "0.tar", [sample(key) for key in "abc"])
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 2])
    code, out, err = legrad("init", tmp_path)
    assert code == 0, err
    assert "samples of 1 shard(s) were looked at" in out


def test_a_folder_in_place_of_a_configuration_is_answered_by_the_command_that_writes_one(legrad, tmp_path):
    code, _, err = legrad("annotate", tmp_path)
    assert (code, f"legrad init {tmp_path} --to job.yaml" in err) == (1, True), err


@pytest.mark.parametrize(
    ("text", "is_caption"),
    [
        ("a cat 998", True),
        ("2 dogs, 1 cat", True),
        ("日本の猫", True),
        ("IMG_0001234", False),
        ("12345678", False),
        ("https://host/a", False),
    ],
)
def test_a_short_caption_may_count_and_a_number_is_none(legrad, tmp_path, text, is_caption):
    write_shard(tmp_path / "0.tar", [sample("a", txt=text.encode())])
    code, out, err = legrad("init", tmp_path)
    assert code == 0, err
    assert yaml.safe_load(out)["prompts"]["source"] == ("caption" if is_caption else "classes")


def test_a_missing_shard_is_named_once(legrad, tmp_path):
    code, _, err = legrad("init", tmp_path / "none.tar")
    assert code == 1
    assert "cannot be opened: No such file or directory" in err
    assert err.count(f"{tmp_path}/none.tar") == 2, err


def test_shards_in_folders_below_are_found(legrad, tmp_path):
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train" / "0.tar", [sample("a")])
    code, out, _ = legrad("init", tmp_path)
    assert code == 0
    assert yaml.safe_load(out)["input"]["shards"] == f"{tmp_path}/**/*.tar"


def test_a_hostile_caption_cannot_leave_its_comment(legrad, tmp_path):
    hostile = 'a dog\nmodel: {name: evil}\x1b[31m\u2028run: "'
    write_shard(tmp_path / "0.tar", [sample("a", txt=hostile.encode())])
    assert legrad("init", tmp_path, "--to", tmp_path / "job.yaml")[0] == 0
    text = (tmp_path / "job.yaml").read_text()
    assert "\x1b" not in text
    assert "\u2028" not in text
    assert yaml.safe_load(text)["model"]["name"] == "ViT-B-16"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80), document=JSON_VALUES)
def test_any_caption_and_any_json_give_a_file_that_is_read_back(tmp_path, text, document):
    fields = {
        "txt": text.encode("utf-8", "surrogatepass"),
        "json": json.dumps(document).encode(),
        "jpg": image_bytes(1),
    }
    write_shard(tmp_path / "0.tar", [[(f"a.{name}", content) for name, content in fields.items()]])
    found = first_config(str(tmp_path), model_named("demo", None))
    written = yaml.safe_load(found.text)
    assert list(written) == ["input", "model", "prompts", "output"]
    assert written["input"]["image"] == "jpg"
    parse_config(written)
