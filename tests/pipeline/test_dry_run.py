"""`legrad annotate --dry-run`: jobs that would annotate nothing, and what to change."""

import gzip
import io
import json
import re
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipeline.demo.assets import DEMO_MODEL_NAME
from tests.helpers.corpus import image_bytes, sample, write_corpus, write_shard

CAPTION = "a dog on a red sofa"


def as_json(**document):
    return json.dumps(document).encode()


def tiff():
    sink = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sink, "TIFF")
    return sink.getvalue()


def one_shard(folder, **members):
    """A shard of four samples with these members; `{n}` in a text is the sample's number."""
    samples = [sample(f"{number:04d}", seed=number, **members) for number in range(4)]
    return write_shard(folder / "0.tar", samples)


@pytest.fixture
def dry_run(legrad, tmp_path):
    """Runs a dry run of a minimal job with overrides; returns exit code, standard output and error."""

    def run(*overrides, shards=None, **document):
        job = {
            "input": {"shards": str(shards or tmp_path / "*.tar")},
            "model": {"name": DEMO_MODEL_NAME, "pretrained": "demo"},
            "output": {"dir": str(tmp_path / "out")},
            **document,
        }
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        code, out, err = legrad("annotate", tmp_path / "job.yaml", *overrides, "--dry-run")
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()
        assert "dry run: nothing was started or written" in out or code == 1
        return code, out, err

    return run


FIELDS = [
    # members of each sample, overrides, what the error says
    (
        {"txt": None, "json": as_json(caption=CAPTION, key="0001", url="https://host/a.jpg")},
        [],
        ["field txt is in 0 of 4 samples", "jpg (4), json (4)", "try input.caption=json:caption "],
    ),
    (
        {"txt": None, "metadata_json": as_json(text=CAPTION), "image_jpg": image_bytes(1), "jpg": None},
        [],
        ["try input.image=image.jpg", "try input.caption=metadata.json:text "],
    ),
    ({}, ["input.caption=json:caption"], ["field json is in 0 of 4 samples", "try input.caption=txt "]),
    (
        {"json": as_json(text=CAPTION, width=64), "txt": None},
        ["input.caption=json:caption"],
        ["key caption is in the field json of 0 of 4 samples", "try input.caption=json:text "],
    ),
    (
        {"json": as_json(captions=[CAPTION, "a sofa"]), "txt": None},
        [],
        ["try prompts.source=captions input.caption=json:captions "],
    ),
    ({"txt": b"  "}, [], ["0 of 4 samples have a usable caption: the caption is empty (4 of 4)"]),
    ({"txt": None}, [], ["no field of 4 samples holds a text", "prompts.source=classes"]),
    ({"txt": None, "cls": b"3"}, [], ["field cls holds classes, such as '3'", "prompts.mentioned_in=cls"]),
    ({"txt": None, "json": as_json(file_name="a cat.jpg")}, [], ["no field of 4 samples holds a text"]),
    ({}, ["input.image=png"], ["field png is in 0 of 4 samples", "try input.image=jpg"]),
    ({"jpg": None}, [], ["no field of 4 samples holds an image"]),
    (
        {"jpg": None, "tif": tiff()},
        [],
        ["field tif holds a TIFF image, which is not read; convert the images to JPEG or PNG"],
    ),
    ({"jpg": tiff()}, [], ["0 of 4 images decode: expected a JPEG, PNG, WebP, BMP or GIF"]),
    ({"jpg": image_bytes(1)[:400]}, [], ["0 of 4 images decode: "]),
    ({}, ["input.max_image_pixels=100"], ["0 of 4 images decode: the image has 64 x 48 pixels; the limit"]),
    ({}, ["input.max_member_bytes=10"], ["0 of 4 samples can be read: 0000.jpg has"]),
]


@pytest.mark.parametrize(("members", "overrides", "messages"), FIELDS)
def test_a_job_whose_fields_hold_nothing_is_refused_with_what_to_try(
    dry_run, tmp_path, members, overrides, messages
):
    one_shard(tmp_path, **members)
    code, _, err = dry_run(*overrides)
    assert code == 1, err
    assert err.startswith("legrad: the job would annotate nothing: ")
    for message in messages:
        assert message in err
    # the suggestion is what makes the job pass
    tries = [word for line in err.splitlines() for word in _suggested(line)]
    if tries and "FILE" not in err:
        code, out, err = dry_run(*overrides, *tries)
        assert (code, err) == (0, "")
        assert "samples: about 4, prompts: about" in out


def test_the_first_prompt_is_shown_and_a_whole_document_as_prompt_is_noted(dry_run, tmp_path):
    one_shard(tmp_path, txt=b"a red sofa", json=as_json(caption=CAPTION))
    code, out, _ = dry_run()
    assert (code, "first prompt: 'a red sofa'" in out, "JSON" in out) == (0, True, False)
    code, out, _ = dry_run("input.caption=json")
    assert code == 0
    assert "4 of 4 samples (100 %) have JSON as their prompt" in out
    assert "such as input.caption=json:caption" in out


def _suggested(line):
    after = line.partition("; try ")[2].partition(" (it holds")[0]
    return after.split()


def test_classes_that_no_caption_mentions_are_refused_and_named(dry_run, tmp_path):
    one_shard(tmp_path, txt=CAPTION.encode())
    (tmp_path / "classes.txt").write_text("cat\nbicycle\n")
    classes = ["prompts.source=classes", f"prompts.classes={tmp_path}/classes.txt"]
    code, _, err = dry_run(*classes, "prompts.mentioned_in=txt")
    assert code == 1
    assert f"none of 4 texts in txt, such as '{CAPTION}', mentions one of the 2 classes (cat, bicycle)" in err
    assert dry_run(*classes, "prompts.mentioned_in=null")[0] == 0
    (tmp_path / "classes.txt").write_text("cat\nsofa\n")
    assert dry_run(*classes, "prompts.mentioned_in=txt")[0] == 0


def test_a_class_number_selects_the_class_that_has_it_as_synonym(dry_run, tmp_path):
    one_shard(tmp_path, txt=None, cls=b"3")
    (tmp_path / "classes.yaml").write_text("- {name: dog, synonyms: ['3']}\n- {name: cat, synonyms: ['4']}\n")
    classes = ["prompts.source=classes", f"prompts.classes={tmp_path}/classes.yaml"]
    code, out, _ = dry_run(*classes, "prompts.mentioned_in=cls")
    assert code == 0
    assert "samples: about 4, prompts: about 4" in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=ViT-B-61", "model.pretrained=openai"], "nearest: ViT-B-16"),
        (["model.name=ViT-B-16", "model.pretrained=laion2b"], "for ViT-B-16 one of openai, "),
        (["model.name=RN50", "model.pretrained=openai"], "RN50"),
        (["model.name=ViT-B-16", "model.pretrained=no/such.pt"], "there is no file no/such.pt"),
        (["model.name=local-dir:/no/such", "model.pretrained=null"], "/no/such is no folder"),
    ],
)
def test_a_model_that_does_not_exist_is_refused_beside_other_problems(dry_run, tmp_path, overrides, message):
    one_shard(tmp_path, txt=None)
    code, _, err = dry_run(*overrides)
    assert code == 1
    assert message in err
    assert "2 problem(s)" in err
    assert "field txt is in 0 of 4 samples" in err


def test_an_open_clip_tag_is_known_by_name_without_a_download(dry_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one_shard(tmp_path)
    assert dry_run("model.name=ViT-B-16", "model.pretrained=laion2b_s34b_b88k")[0] == 0


def parquet_bytes():
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x"], "caption": ["a dog"]}), sink)
    return sink.getvalue()


def zip_bytes():
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as packed:
        packed.writestr("0.jpg", b"x" * 1000)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (parquet_bytes(), "it is a Parquet file; `legrad shards parquet FILES DEST --image IMAGE"),
        (zip_bytes(), "it is a zip file; extract it, then `legrad shards images ROOT DEST`"),
        (image_bytes(1), "it is a JPEG image; `legrad shards images ROOT DEST`"),
        (
            b"<!DOCTYPE html><title>Sign in</title>" + b" " * 600,
            "it is an HTML page; the server sent an answer",
        ),
        (
            b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>" + b" " * 600,
            "error page of a store",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer; fetch"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "it is an HDF5 file"),
        (b'{"a": 1}' + b" " * 600, "it is a JSON file"),
        (b"", "the tar has 0 bytes"),
        (b"neither this nor that " * 40, "does not begin with a tar header"),
    ],
)
def test_a_file_of_another_kind_is_named_with_the_way_out(dry_run, tmp_path, content, message):
    (tmp_path / "0.tar").write_bytes(content)
    code, _, err = dry_run()
    assert code == 1
    assert message in err


def test_a_folder_as_shard_is_refused_with_what_it_holds(dry_run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(image_bytes(1))
    code, _, err = dry_run(shards=folder)
    assert code == 1
    assert f"legrad shards images {folder} DEST" in err
    write_shard(folder / "0.tar", [sample("a")])
    code, _, err = dry_run(shards=folder)
    assert code == 1
    assert f"is a folder, and a shard is a tar; name its tars: '{folder}/*.tar'" in err


def test_a_missing_shard_is_refused_and_one_among_others_is_not(dry_run, tmp_path):
    gone = tmp_path / "gone.tar"
    code, _, err = dry_run(shards=gone)
    assert code == 1
    assert "cannot be opened" in err
    assert "No such file" in err
    one_shard(tmp_path)
    code, out, _ = dry_run(shards=tmp_path / "{0,gone}.tar")
    assert code == 0
    assert f"1 shard(s) of unknown size, perhaps missing: file://{tmp_path}" in out


def test_an_empty_tar_has_no_sample(dry_run, tmp_path):
    write_shard(tmp_path / "0.tar", [])
    code, _, err = dry_run()
    assert code == 1
    assert "the 1 shard(s) looked at have no sample" in err


def test_what_fails_in_part_is_a_note_with_its_share(dry_run, tmp_path):
    samples = [sample(str(number), seed=number) for number in range(6)]
    samples += [sample("6", txt=None), sample("7", jpg=b"not an image"), sample("8", txt=b" ")]
    write_shard(tmp_path / "0.tar", samples)
    code, out, err = dry_run()
    assert (code, err) == (0, "")
    assert "note: 1 of 9 images that were tried do not decode: expected a JPEG" in out
    assert "note: 2 of 9 samples (22 %) have no usable caption: " in out
    assert "note: 3 of 9 samples (33 %) would fail, which is more than run.error_budget (20 %)" in out
    code, out, _ = dry_run("run.error_budget=0.5")
    assert code == 0
    assert "run.error_budget" not in out


def packed(tar):
    return gzip.compress(tar, mtime=0)


DAMAGED = [
    # what becomes of the bytes of a tar, what is said of it
    (lambda tar: tar[:-12_000], "the archive ends "),
    (lambda tar: tar + b"garbage" * 100, "data follows the end of the archive"),
    (lambda tar: packed(tar)[:-20], "the gzip data end too early"),
    (lambda tar: packed(tar) + b"garbage" * 100, "the gzip data are damaged, or other data follow them"),
    (lambda tar: packed(tar) * 2, "data follows the end of the archive"),
    (lambda tar: packed(tar[: -10 << 10] + bytes(200 << 20)), "expand to"),
]


@pytest.mark.parametrize(("damaged", "message"), DAMAGED)
def test_a_damaged_archive_is_a_note_with_what_becomes_of_the_job(dry_run, tmp_path, damaged, message):
    tar = one_shard(tmp_path)
    tar.write_bytes(damaged(tar.read_bytes()))
    code, out, err = dry_run()
    assert (code, err) == (0, "")
    assert f"note: damaged: file://{tar}: " in out
    assert message in out
    assert "a job is not complete (exit code 3) unless run.accept_damaged=true" in out
    assert "samples in 1 shard(s)" in out
    assert "exit code 3" not in dry_run("run.accept_damaged=true", "run.error_budget=1")[1]


def test_the_first_a_middle_and_the_last_shard_are_looked_at(dry_run, tmp_path):
    write_corpus(tmp_path, shards=5, samples_per_shard=1)
    for number in (0, 2, 4):
        (tmp_path / f"{number:04d}.tar").write_bytes(parquet_bytes())
    code, _, err = dry_run()
    assert code == 1
    assert [f"{number:04d}.tar" in err for number in range(5)] == [True, False, True, False, True]


def test_listed_files_that_are_no_tars_by_name_are_noted(dry_run, tmp_path):
    folder = tmp_path / "in"
    write_corpus(folder, shards=3, samples_per_shard=1)
    (folder / "0001.parquet").write_bytes(parquet_bytes())
    (folder / "0002_stats.json").write_bytes(b"{}")
    code, out, _ = dry_run(shards=folder / "*")
    assert code == 0
    assert "note: 2 of 5 listed files are no tars by their names (1 .parquet, 1 .json)" in out


def test_marks_of_other_samples_are_no_problem_and_those_of_another_corpus_are(dry_run, tmp_path):
    shard = one_shard(tmp_path, txt=CAPTION.encode())
    mark = {"shard": shard.as_uri(), "key": "later", "prompt_index": 0, "mark": "good"}
    code, out, _ = dry_run(prompts={"marks": [mark], "keep_marked": "good"})
    assert code == 0
    assert "4 of 4 samples (100 %) have no prompt that prompts.marks keeps" in " ".join(out.split())
    elsewhere = {**mark, "shard": "s3://bucket/0.tar"}
    code, _, err = dry_run(prompts={"marks": [elsewhere], "keep_marked": "good"})
    assert code == 1
    assert "none of the 1 mark(s) is about a shard of this job" in " ".join(err.split())


def test_an_output_folder_that_cannot_be_made_is_refused(dry_run, tmp_path):
    one_shard(tmp_path)
    (tmp_path / "file").write_text("in the way")
    code, _, err = dry_run(f"output.dir={tmp_path}/file/out")
    assert code == 1
    assert f"{tmp_path}/file is a file, and a folder is expected" in err


def test_an_output_folder_with_other_files_is_noted(dry_run, tmp_path):
    one_shard(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("0.jpg", "1.jpg"):
        (photos / name).write_bytes(image_bytes(1))
    code, out, _ = dry_run(f"output.dir={photos}")
    assert code == 0
    assert f"note: output.dir: {photos} holds 2 other file(s) and folder(s), 0.jpg, 1.jpg;" in out
    assert "holds" not in dry_run()[1]


def test_a_full_disk_is_refused(dry_run, tmp_path, monkeypatch):
    one_shard(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("pipeline.run.destination.shutil.disk_usage", lambda path: usage)
    code, _, err = dry_run()
    assert code == 1
    assert "has 1.0 kB left" in err


def test_a_command_is_not_run_and_nothing_is_said_about_its_samples(dry_run, tmp_path):
    trace = tmp_path / "trace"
    code, out, err = dry_run("input.allow_commands=true", shards=f"pipe:touch {trace} 0.tar")
    assert (code, err) == (0, "")
    assert not trace.exists()
    assert "samples: about" not in out


def test_no_more_of_a_shard_is_read_than_the_limit_and_its_end_is_no_damage(dry_run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.corpus.first_items.MOST_BYTES", 20_000)
    samples = [sample(f"{number:04d}", seed=number, bin=bytes(4000)) for number in range(40)]
    write_shard(tmp_path / "0.tar", samples)
    code, out, err = dry_run()
    assert (code, err) == (0, "")
    assert "note:" not in out
    looked_at, estimated = (
        int(re.search(pattern, out)[1]) for pattern in (r"from (\d+) samples", r"about (\d+)")
    )
    assert looked_at < 10
    assert 20 < estimated < 80
    (tmp_path / "0.tar").write_bytes(parquet_bytes() + bytes(100_000))
    assert "it is a Parquet file" in dry_run()[2]
