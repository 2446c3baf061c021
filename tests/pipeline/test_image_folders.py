"""`legrad shards images`: every file becomes a sample or is counted with the reason, whatever its name."""

import csv
import gc
import io
import json
import os
import posixpath
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import storage
from pipeline.datasets.conversion import DEFAULT_LIMITS, ShardLimits, write_samples
from pipeline.datasets.image_folder import image_key, open_image_folder
from pipeline.errors import UserError
from tests.helpers.converted_shards import converted, record
from tests.helpers.dataset_trees import jpeg, write

IMAGE = jpeg()


def picture(file_format, **options):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, file_format, **options)
    return buffer.getvalue()


def folder(root, *names):
    """A folder with a different JPEG under each name."""
    for number, name in enumerate(names):
        write(root / name, jpeg(seed=number))
    return root


def convert(root, out, captions=None, limits=DEFAULT_LIMITS, resume=False, threads=2, **columns):
    source = open_image_folder(root, captions, **columns).samples
    write_samples(source, str(out), limits, resume=resume, threads=threads)
    return converted(out)


def skipped(out):
    """Reason and names of every skipped image."""
    return {reason: [name for name, _ in pairs] for reason, pairs in record(out)["skipped_names"].items()}


def check_counts(out):
    counts = record(out)
    assert counts["images"] == counts["images_read"] == counts["written"] + sum(counts["skipped"].values())
    assert counts["written"] == len(converted(out))


# ---------------------------------------------------------------- where captions come from


def test_a_table_of_hugging_face_gives_captions_and_further_columns(tmp_path):
    root = folder(tmp_path / "in", "0.jpg", "sub/1.jpg")
    write(root / "metadata.csv", "file_name,text,year\n0.jpg,a dog,1999\nsub/1.jpg,a cat,2000\n")
    samples = convert(root, tmp_path / "out")
    assert list(samples) == ["0", "sub/1"]
    assert samples["sub/1"] == {
        "jpg": jpeg(seed=1),
        "txt": "a cat",
        "json": {"file_name": "sub/1.jpg", "caption": "a cat", "captions": ["a cat"], "year": "2000"},
    }
    check_counts(tmp_path / "out")


def test_a_table_in_a_folder_below_names_images_from_there(tmp_path):
    root = folder(tmp_path / "in", "train/0.jpg", "test/0.jpg")
    for split in ("train", "test"):
        row = {"file_name": "0.jpg", "text": f"a {split} image"}
        write(root / split / "metadata.jsonl", json.dumps(row))
    samples = convert(root, tmp_path / "out")
    assert {key: fields["txt"] for key, fields in samples.items()} == {
        "test/0": "a test image",
        "train/0": "a train image",
    }


def test_a_table_may_be_anywhere_and_its_columns_may_have_any_name(tmp_path):
    root = folder(tmp_path / "in", "a/0.jpg", "1.jpg")
    write(tmp_path / "captions.txt", "image,comment\na/0.jpg,a dog\n1.jpg,a cat\n")
    samples = convert(
        root, tmp_path / "out", tmp_path / "captions.txt", image_column="image", caption_column="comment"
    )
    assert [(key, fields["txt"]) for key, fields in samples.items()] == [("a/0", "a dog"), ("1", "a cat")]


def test_parquet_tables_and_json_lines_keep_types_and_lists_of_captions(tmp_path):
    rows = [
        {"file_name": "0.jpg", "text": ["a dog", "a pet"], "score": 0.5, "n": 3, "good": True, "gone": None},
        {"file_name": "1.jpg", "text": "a cat", "score": float("nan"), "n": 4, "good": False, "gone": None},
    ]
    expected = {
        "file_name": "0.jpg",
        "caption": "a dog",
        "captions": ["a dog", "a pet"],
        "score": 0.5,
        "n": 3,
        "good": True,
        "gone": None,
    }
    root = folder(tmp_path / "lines", "0.jpg", "1.jpg")
    write(root / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    samples = convert(root, tmp_path / "out lines")
    assert samples["0"]["json"] == expected
    assert samples["1"]["json"]["score"] is None

    lists = [{**row, "text": [row["text"]] if isinstance(row["text"], str) else row["text"]} for row in rows]
    root = folder(tmp_path / "parquet", "0.jpg", "1.jpg")
    pq.write_table(pa.Table.from_pylist(lists), root / "metadata.parquet")
    samples = convert(root, tmp_path / "out parquet")
    assert samples["0"]["json"] == expected
    assert samples["1"]["txt"] == "a cat"


def test_adjacent_rows_of_an_image_are_its_captions_and_later_ones_are_counted(tmp_path):
    root = folder(tmp_path / "in", "0.jpg", "1.jpg")
    write(
        root / "metadata.csv",
        "file_name,caption\n0.jpg,a dog\n./0.jpg,again\n1.jpg,a cat\n1.jpg,\n1.jpg,a pet\n0.jpg,later\n",
    )
    samples = convert(root, tmp_path / "out")
    assert samples["1"]["txt"] == "a cat"
    assert samples["1"]["json"]["captions"] == ["a cat", "", "a pet"]
    assert samples["0"]["txt"] == "a dog"
    assert skipped(tmp_path / "out") == {"duplicate": ["0.jpg", "0.jpg"]}
    check_counts(tmp_path / "out")


def test_text_files_beside_images_are_captions(tmp_path):
    root = folder(tmp_path / "in", "0.jpg", "1.jpg", "a.v1.jpg", "2.jpg", "3.jpg")
    for name, text in {"0": "a dog\n", "a.v1": "\ufeffa cat", "2": " ", "lonely": "a bird"}.items():
        write(root / f"{name}.txt", text)
    write(root / "3.txt", b"\xff\xfe")
    samples = convert(root, tmp_path / "out")
    assert [fields["txt"] for fields in samples.values()] == ["a dog", "a cat"]
    assert skipped(tmp_path / "out") == {"no_caption": ["1.jpg", "2.jpg"], "caption_not_utf8": ["3.jpg"]}
    assert record(tmp_path / "out")["omitted_names"] == {"text_without_image": ["lonely.txt"]}


def test_without_any_caption_there_are_images_only(tmp_path, legrad):
    root = folder(tmp_path / "in", "0.jpg")
    code, out, _ = legrad("shards", "images", root, tmp_path / "out")
    assert code == 0
    assert "captions: none; annotate with prompts.source=classes" in out
    assert converted(tmp_path / "out") == {"0": {"jpg": jpeg(seed=0), "json": {"file_name": "0.jpg"}}}


@pytest.mark.parametrize(
    "text",
    [
        "\ufefffile_name,text\r\n0.jpg,a dog\r\n",
        "file_name;text\n0.jpg;a dog\n",
        "file_name\ttext\n0.jpg\ta dog",
        'file_name,text\n\n"0.jpg","a dog"\n\n',
        " file_name , text \n 0.jpg ,a dog\n",
        ",file_name,text\n0,0.jpg,a dog\n",
    ],
    ids=["BOM and CRLF", "semicolons", "tabs", "quotes and empty lines", "blanks", "a column without name"],
)
def test_tables_come_in_many_dialects(tmp_path, text):
    root = folder(tmp_path / "in", "0.jpg")
    write(root / "metadata.csv", text)
    assert convert(root, tmp_path / "out")["0"]["txt"] == "a dog"


def test_commas_quotes_and_line_feeds_in_a_caption_stay(tmp_path):
    root = folder(tmp_path / "in", "0.jpg", "1.jpg")
    write(root / "metadata.csv", 'file_name,text\n0.jpg,"a ""dog"", sitting\nthere"\n1.jpg,a cat\n')
    samples = convert(root, tmp_path / "out")
    assert [fields["txt"] for fields in samples.values()] == ['a "dog", sitting\nthere', "a cat"]


# ---------------------------------------------------------------- rows and files that do not fit


def test_a_bad_row_costs_its_image_alone(tmp_path):
    names = [f"{number}.jpg" for number in range(6)]
    root = folder(tmp_path / "in", *names)
    rows = [b"0.jpg,a dog", b"1.jpg,a dog, sitting", b"2.jpg", b"3.jpg,caf\xe9", b"4.jpg,", b"9.jpg,gone"]
    write(root / "metadata.csv", b"\n".join([b"file_name,text", *rows]))
    assert list(convert(root, tmp_path / "out")) == ["0"]
    assert skipped(tmp_path / "out") == {
        "bad_row": ["metadata.csv:3", "metadata.csv:4"],
        "row_not_utf8": ["metadata.csv:5"],
        "no_caption": ["4.jpg"],
        "missing_image": ["9.jpg"],
        "no_row": ["1.jpg", "2.jpg", "3.jpg", "5.jpg"],
    }
    check_counts(tmp_path / "out")


def test_a_bad_line_of_json_costs_its_image_alone(tmp_path):
    root = folder(tmp_path / "in", "0.jpg", "1.jpg", "2.jpg", "3.jpg")
    lines = [
        '{"file_name": "0.jpg", "text": "a dog"}',
        "{",
        "[1]",
        '{"text": "a dog"}',
        '{"file_name": "1.jpg", "text": "half \\ud83d"}',
        '{"file_name": "2.jpg", "text": 7}',
        '{"file_name": "3.jpg"}',
        "[" * 100_000,
        '{"file_name": ' + "9" * 5000 + "}",
    ]
    write(root / "metadata.jsonl", "\n".join(lines))
    assert list(convert(root, tmp_path / "out")) == ["0"]
    assert skipped(tmp_path / "out") == {
        "bad_row": [f"metadata.jsonl:{line}" for line in (2, 3, 4, 8, 9)],
        "row_not_utf8": ["metadata.jsonl:5"],
        "caption_wrong_type": ["2.jpg"],
        "no_caption": ["3.jpg"],
        "no_row": ["1.jpg"],
    }


def test_a_quotation_mark_that_is_never_closed_loses_no_image_in_silence(tmp_path):
    names = [f"{number:05d}.jpg" for number in range(40)]
    root = folder(tmp_path / "in", *names)
    rows = [f"{name},{'a dog ' * 1500}" for name in names]
    rows[3] = rows[3].replace(",", ',"', 1)
    write(root / "metadata.csv", "\n".join(["file_name,text", *rows]))
    samples = convert(root, tmp_path / "out")
    assert {"00000", "00002", "00039"} <= set(samples)
    assert "00003" not in samples
    assert len(samples) + len(skipped(tmp_path / "out")["no_row"]) == len(names)


HOSTILE = [
    "../secret.jpg",
    "/etc/passwd",
    "a/../../secret.jpg",
    "a/..",
    ".",
    "https://host/0.jpg",
    "a\0b.jpg",
]


def test_names_in_a_table_never_lead_out_of_the_folder(tmp_path):
    root = folder(tmp_path / "in", "0.jpg")
    write(tmp_path / "secret.jpg", IMAGE)
    rows = [{"file_name": name, "text": "a dog"} for name in [*HOSTILE, "0.jpg"]]
    write(root / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert list(convert(root, tmp_path / "out")) == ["0"]
    assert record(tmp_path / "out")["skipped"] == {"unsafe_name": 6, "image_is_url": 1}


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    root = folder(tmp_path / "in", "0.jpg", "pool/1.jpg")
    write(tmp_path / "secret" / "2.jpg", IMAGE)
    (root / "secret.jpg").symlink_to(tmp_path / "secret" / "2.jpg")
    (root / "linked").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root)
    (root / "inside.jpg").symlink_to("pool/1.jpg")
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    samples = convert(root, tmp_path / "out")
    assert list(samples) == ["0", "inside", "pool/1"]
    assert samples["inside"]["jpg"] == samples["pool/1"]["jpg"]
    assert skipped(tmp_path / "out") == {"missing_image": ["broken.jpg"], "link_outside": ["secret.jpg"]}
    assert record(tmp_path / "out")["omitted_names"] == {"linked_folder": ["linked", "loop"]}


def test_a_row_that_goes_through_a_link_out_of_the_folder_is_not_followed(tmp_path):
    root = folder(tmp_path / "in", "0.jpg")
    write(tmp_path / "secret" / "2.jpg", IMAGE)
    (root / "linked").symlink_to(tmp_path / "secret")
    write(root / "metadata.csv", "file_name,text\n0.jpg,a dog\nlinked/2.jpg,a cat\n")
    assert list(convert(root, tmp_path / "out")) == ["0"]
    assert skipped(tmp_path / "out") == {"link_outside": ["linked/2.jpg"]}


def test_the_folder_itself_may_be_a_link(tmp_path):
    folder(tmp_path / "real", "0.jpg")
    (tmp_path / "in").symlink_to("real")
    assert list(convert(tmp_path / "in", tmp_path / "out")) == ["0"]


def test_other_files_are_counted_by_kind(tmp_path):
    root = folder(tmp_path / "in", "0.jpg", ".hidden.jpg", ".git/1.jpg")
    for name in ("README.md", "._0.jpg", "0.txt"):
        write(root / name, "text")
    write(root / "metadata.csv", "file_name,text\n0.jpg,a dog\n")
    os.mkfifo(root / "pipe.jpg")
    convert(root, tmp_path / "out")
    assert record(tmp_path / "out")["omitted"] == {
        "hidden_folder": 1,
        "hidden_file": 2,
        "other_file": 1,
        "text_beside_image_not_read": 1,
    }
    assert skipped(tmp_path / "out") == {"no_row": ["pipe.jpg"]}


# ---------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("file_format", "field"),
    [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "png"), ("GIF", "png")],
)
def test_formats_are_known_by_content_and_bytes_stay_as_they_are(tmp_path, file_format, field):
    write(tmp_path / "in" / "0.jpeg", picture(file_format))
    assert convert(tmp_path / "in", tmp_path / "out")["0"][field] == picture(file_format)


def test_images_that_are_not_read_are_counted_by_reason(tmp_path):
    root = folder(tmp_path / "in", "0.jpg")
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    write(root / "moving.gif", picture("GIF"))
    frames[0].save(root / "moving.gif", save_all=True, append_images=frames[1:])
    write(root / "scan.tiff", picture("TIFF"))
    write(root / "empty.png", b"")
    write(root / "page.jpg", b"<!doctype html>")
    assert list(convert(root, tmp_path / "out")) == ["0"]
    assert skipped(tmp_path / "out") == {
        "empty": ["empty.png"],
        "animated": ["moving.gif"],
        "format_not_allowed": ["page.jpg", "scan.tiff"],
    }


# ---------------------------------------------------------------- keys


def test_every_image_has_a_key_of_its_own_whatever_it_is_called(tmp_path):
    names = [
        "a.jpg",
        "a.png",
        "A.jpg",
        "a.v1.jpg",
        "a.v2.jpg",
        "b c.jpg",
        "ü.jpg",
        "__x__/d.jpg",
        "v1.0/e.JPG",
    ]
    root = folder(tmp_path / "in", *names)
    write(root / os.fsdecode(b"\xff.jpg"), IMAGE)
    write(tmp_path / "in" / "a.png", picture("PNG"))
    samples = convert(root, tmp_path / "out")
    assert len(samples) == len(names) + 1
    assert {"A", "v1.0/e"} <= set(samples)
    files = {fields["json"]["file_name"] for fields in samples.values()}
    assert files == {*names, "\\xff.jpg"}
    assert sum(key.startswith("a-") for key in samples) == 2, "a.jpg and a.png share their stem"


SAFE = re.compile(r"[A-Za-z0-9._/-]+")
names = st.text(st.characters(exclude_characters="/\0", codec=None), min_size=1, max_size=200).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@settings(max_examples=300)
@given(st.lists(paths | paths.map(lambda path: f"{path}.jpg"), min_size=2, max_size=6, unique=True))
def test_keys_are_safe_short_and_differ(several):
    stems = [posixpath.splitext(path)[0] for path in several]
    shared = {stem for stem in stems if stems.count(stem) > 1}
    keys = [image_key(path, shared) for path in several]
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert SAFE.fullmatch(key)
        assert len(key) <= 160
        assert not key.startswith(("/", "__"))
        assert ".." not in key.split("/")
        assert "." not in key.rpartition("/")[2], "a key ends at the first dot"


captions = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=40)


@settings(max_examples=40)
@given(st.lists(captions, min_size=1, max_size=4), st.sampled_from([",", ";", "\t"]))
def test_a_caption_comes_back_as_it_was_written(tmp_path_factory, texts, delimiter):
    place = tmp_path_factory.mktemp("captions")
    root = folder(place / "in", *(f"{number}.jpg" for number in range(len(texts))), "last.jpg")
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["file_name", "text"])
        writer.writerows((f"{number}.jpg", text) for number, text in enumerate(texts))
        writer.writerow(["last.jpg", "a dog"])
    samples = convert(root, place / "out")
    found = {key: fields["txt"] for key, fields in samples.items()}
    expected = {str(number): text.strip() for number, text in enumerate(texts) if text.strip()}
    assert found == {**expected, "last": "a dog"}


# ---------------------------------------------------------------- order, resuming, errors


def contents(place):
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_the_bytes_do_not_depend_on_threads_or_on_the_run(tmp_path):
    root = folder(tmp_path / "in", *(f"{number}.jpg" for number in range(20)))
    for threads in (1, 4):
        convert(root, tmp_path / str(threads), limits=ShardLimits(max_samples=6), threads=threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "4")
    assert len(contents(tmp_path / "1")) == 4 + 1


@pytest.mark.parametrize("kind", ["table", "texts"])
def test_a_conversion_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch, kind):
    root = folder(tmp_path / "in", *(f"{number}.jpg" for number in range(9)))
    if kind == "table":
        rows = [f"{number}.jpg,text {number}" for number in (3, 1, 0, 1, 5, 99, 7, 8)]
        write(root / "metadata.csv", "\n".join(["file_name,text", *rows]))
    else:
        for number in range(0, 9, 2):
            write(root / f"{number}.txt", f"text {number}")
    limits, publish, calls = ShardLimits(max_samples=2), storage.publish, []
    convert(root, tmp_path / "whole", limits=limits)

    def publish_some(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        publish(*arguments)

    monkeypatch.setattr(storage, "publish", publish_some)
    with pytest.raises(KeyboardInterrupt):
        convert(root, tmp_path / "out", limits=limits)
    monkeypatch.undo()
    convert(root, tmp_path / "out", limits=limits, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_conversion_that_is_interrupted_says_how_to_resume_it(tmp_path, monkeypatch, legrad):
    root = folder(tmp_path / "in", "0.jpg")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.datasets.conversion.write_samples", interrupted)
    code, out, _ = legrad("shards", "images", root, tmp_path / "out")
    assert code == 130
    assert "interrupted; run the same command with --resume" in out


def test_captions_that_have_changed_are_not_resumed(tmp_path):
    root = folder(tmp_path / "in", "0.jpg")
    write(root / "metadata.csv", "file_name,text\n0.jpg,a dog\n")
    convert(root, tmp_path / "out")
    write(root / "metadata.csv", "file_name,text\n0.jpg,a cat\n")
    with pytest.raises(UserError, match="captions"):
        convert(root, tmp_path / "out", resume=True)


def test_a_folder_that_changes_meanwhile_is_named(tmp_path):
    root = folder(tmp_path / "in", "0.jpg", "1.jpg")
    source = open_image_folder(root).samples
    (root / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"2 images were listed .* 1 when they were read"):
        write_samples(source, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({}, {"captions": "none.csv"}, r"none\.csv: no such file"),
        ({"t.xlsx": "x"}, {"captions": "t.xlsx"}, r"ending \.csv"),
        ({"metadata.csv": "a,b\n1,2\n"}, {}, r"no column `file_name`; columns: a, b; .*--image-column"),
        ({"metadata.csv": "file_name,label\n"}, {}, r"`text` or `caption`.*--caption-column"),
        ({"metadata.csv": "file_name,text,text\n"}, {}, "2 columns `text`"),
        ({"metadata.csv": ""}, {}, "has no columns; expected a table"),
        ({"metadata.csv": "0.jpg,a dog\n"}, {}, "first line names an image, not the columns.*file_name,text"),
        ({"metadata.csv": "file_name,text\n".encode("utf-16")}, {}, "UTF-16; .*iconv -f UTF-16 -t UTF-8 "),
        ({"metadata.jsonl": ""}, {}, "no line is a JSON object: the file is empty"),
        ({"metadata.jsonl": "[]\n"}, {}, "no line is a JSON object: expected a JSON object, received list"),
        (
            {"metadata.jsonl": '\n[\n{"file_name": "0.jpg", "text": "x"\n}]'},
            {},
            r"one with: jq -c .* > .*metadata-lines\.jsonl",
        ),
        ({"a b.json": "[]"}, {"captions": "a b.json"}, r"jq -c '\.\[\]' '.*a b\.json' > '.*a b\.jsonl'"),
        ({"folder.csv/x": ""}, {"captions": "folder.csv"}, "is a folder; expected a table"),
        ({"metadata.parquet": "PAR1"}, {}, "is a damaged or cut Parquet file"),
        ({"metadata.csv": "x", "metadata.jsonl": "x"}, {}, "expected one table"),
        ({}, {"caption_column": "x"}, "no table of captions"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error_with_the_way_out(tmp_path, table, options, message):
    root = folder(tmp_path / "in", "0.jpg")
    for name, text in table.items():
        write(root / name, text)
    captions = root / options.pop("captions") if "captions" in options else None
    with pytest.raises(UserError, match=message):
        open_image_folder(root, captions, **options)


def test_an_empty_folder_and_a_missing_one_end_with_1(tmp_path, legrad):
    write(tmp_path / "in" / "README.md", "text")
    code, _, err = legrad("shards", "images", tmp_path / "in", tmp_path / "out")
    assert (code, "no image found, in 1 folder(s) with 1 other file(s)" in err) == (1, True), err
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards" / "0.tar", b"")
    code, _, err = legrad("shards", "images", tmp_path / "shards", tmp_path / "out")
    assert (code, "such as 0.tar; a tar is a shard already" in err) == (1, True), err
    assert f"legrad init {tmp_path}/shards" in err
    for name, problem in {"nowhere": "no such folder", "in/README.md": "is a file"}.items():
        code, _, err = legrad("shards", "images", tmp_path / name, tmp_path / "out")
        assert (code, f"{problem}; expected a folder of images" in err) == (1, True), err


def test_the_command_counts_and_names_what_comes_next(tmp_path, legrad):
    root = folder(tmp_path / "my photos", "0.jpg", "1.jpg")
    write(root / "metadata.csv", "file_name,text\n0.jpg,a dog\n2.jpg,a cat\n")
    code, out, err = legrad("shards", "images", root, tmp_path / "out")
    assert code == 0, err
    assert re.search(r"skipped: missing_image +.* 1 .*'2\.jpg'.*\n.*no file", out)
    assert re.search(r"skipped: no_row +.* 1 .*'1\.jpg'.*\n.*no row of the captions names the image", out)
    assert f"Next: legrad init '{tmp_path}/out/my_photos-*.tar' --to job.yaml" in out
    assert f"input.shards='{tmp_path}/out/my_photos-*.tar'\n" in out
    assert "metadata.csv (column text)" in out


def test_commands_in_the_output_can_be_pasted_whatever_folders_are_called(tmp_path, legrad):
    root, dest = folder(tmp_path / "in", "0.jpg"), tmp_path / "it's [x] {y} $HOME"
    write(root / "my captions.csv", "file_name,text\n0.jpg,a dog\n")
    write(root / "0.txt", "a dog")
    code, out, err = legrad("shards", "images", root, dest)
    assert code == 0, err
    (option,) = re.findall(r"names images, too; (.*) reads it instead", out)
    assert shlex.split(option) == ["--captions", str(root / "my captions.csv")]
    (command,) = re.findall(r"Next: legrad (.*)", out)
    pattern = f"{dest}/in-*.tar"
    assert shlex.split(command) == ["init", pattern, "--to", "job.yaml"]
    (override,) = re.findall(r"annotate them with (.*)", out)
    assert shlex.split(override) == [f"input.shards={pattern}"]
    assert [shard.canonical_url for shard in storage.list_shards(pattern)]


ROWS = "0.jpg,a dog\nsub/1.jpg,a cat\n"
TABLES = [
    # name of a table, its content, the options with which it is read
    ("captions.csv", "file_name,text\n" + ROWS, []),
    ("Metadata.CSV", "file_name,caption\n" + ROWS, []),
    (
        "my data.csv",
        "w;photo;note\n1;0.jpg;a dog\n2;sub/1.jpg;cats\n",
        ["--image-column", "photo", "--caption-column", "note"],
    ),
    ("captions.txt", "image,caption\n" + ROWS, ["--image-column", "image"]),
    (
        "lines.jsonl",
        '{"img": "0.jpg", "n": 1, "says": ["a dog"]}\n{"img": "sub/1.jpg", "says": ["a cat"]}',
        ["--image-column", "img", "--caption-column", "says"],
    ),
]


@pytest.mark.parametrize(("name", "content", "columns"), TABLES)
def test_a_table_that_names_images_must_be_named_or_refused_by_name(tmp_path, legrad, name, content, columns):
    root, dest = folder(tmp_path / "in", "0.jpg", "sub/1.jpg"), tmp_path / "out"
    write(root / name, content)
    code, _, err = legrad("shards", "images", root, dest)
    assert (code, dest.exists()) == (1, False)
    (options,) = re.findall(r"run the same command with (.*), or with --captions none", err)
    assert shlex.split(options) == ["--captions", str(root / name), *columns]
    assert legrad("shards", "images", root, dest, *shlex.split(options))[0] == 0
    assert record(dest)["written"] == 2
    assert all("txt" in fields for fields in converted(dest).values())
    without = legrad("shards", "images", root, dest, "--overwrite", "--captions", "none")
    assert without[0] == 0, without
    assert record(dest)["written"] == 2
    assert not any("txt" in fields for fields in converted(dest).values())


def test_captions_none_reads_neither_tables_nor_texts(tmp_path):
    root = folder(tmp_path / "in", "0.jpg", "1.jpg")
    write(root / "metadata.csv", "file_name,text\n0.jpg,a dog\n")
    write(root / "0.txt", "a dog")
    samples = convert(root, tmp_path / "out", Path("none"))
    assert [set(fields) for fields in samples.values()] == [{"jpg", "json"}] * 2
    check_counts(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sizes.csv", "a,b\n1,2\n"),
        ("urls.csv", "url,text\nhttps://host/0.jpg,a dog\n"),
        ("0.json", '[{"imagePath": "0.jpg"}]'),
        ("deep.json", "[" * 100_000),
        ("cut.json", '{"a": '),
        ("rows.parquet", "PAR1"),
        ("classes.txt", "dog\ncat\n"),
        ("empty.csv", ""),
    ],
)
def test_a_file_that_names_no_image_is_no_table_of_captions(tmp_path, name, content):
    root = folder(tmp_path / "in", "0.jpg")
    write(root / name, content)
    assert convert(root, tmp_path / "out").keys() == {"0"}
    check_counts(tmp_path / "out")


def test_a_table_beside_the_folder_that_its_rows_name_is_given_with_that_folder(tmp_path, legrad):
    folder(tmp_path / "in", "Images/0.jpg")
    write(tmp_path / "in" / "captions.txt", "image,caption\n0.jpg,a dog\n")
    code, _, err = legrad("shards", "images", tmp_path / "in", tmp_path / "out")
    assert code == 1
    (command,) = re.findall(r"convert that folder: legrad (.*); or with --captions none", err)
    arguments = [str(tmp_path / "out") if word == "DEST" else word for word in shlex.split(command)]
    assert legrad(*arguments)[0] == 0
    assert converted(tmp_path / "out")["0"]["txt"] == "a dog"


def test_rows_without_names_of_columns_get_a_line_to_begin_with(tmp_path):
    root = folder(tmp_path / "in", "0.jpg")
    write(root / "captions.tsv", "0.jpg\ta dog\n")
    with pytest.raises(
        UserError, match=r"captions none .*begin the table with a line such as file_name,text"
    ):
        open_image_folder(root)


@pytest.mark.parametrize("end", ["", '\n1.jpg,"a cat"', '\n1.jpg,a cat\n2.jpg,"a pet"\n'])
def test_a_quotation_mark_that_is_not_closed_gives_no_image_the_rows_after_it(tmp_path, end):
    root = folder(tmp_path / "in", "0.jpg", "1.jpg", "2.jpg", "ok.jpg")
    write(root / "metadata.csv", f'file_name,text\nok.jpg,a ""dog""\n0.jpg,"a dog{end}')
    samples = convert(root, tmp_path / "out")
    assert samples["ok"]["txt"] == 'a ""dog""'
    assert not any("jpg" in fields["txt"] for fields in samples.values())
    assert skipped(tmp_path / "out")["bad_row"] == ["metadata.csv:3"]
    check_counts(tmp_path / "out")


@pytest.mark.parametrize(
    ("row", "file", "hint"),
    [
        ("0", "0.jpg", "there is 0.jpg"),
        ("0", "0.PNG", "there is 0.PNG"),
        ("0.JPG", "0.jpg", "there is 0.jpg"),
        ("in/0.jpg", "0.jpg", "there is 0.jpg: rows name images by their path below ROOT"),
        ("sub\\0.jpg", "sub/0.jpg", "there is sub/0.jpg"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg", "another Unicode normal form, 'cafe\\\\u0301.jpg'"),
        ("0.jpg", "1.jpg", None),
    ],
)
def test_a_row_that_misses_its_image_by_little_is_told_which_file_is_there(tmp_path, row, file, hint):
    root = folder(tmp_path / "in", file, "ok.jpg")
    write(
        root / "metadata.jsonl", "\n".join(json.dumps({"file_name": x, "text": "x"}) for x in (row, "ok.jpg"))
    )
    convert(root, tmp_path / "out")
    ((_, message),) = record(tmp_path / "out")["skipped_names"]["missing_image"]
    assert "there is" not in message if hint is None else re.search(hint, message), message
    check_counts(tmp_path / "out")


@pytest.mark.parametrize("ending", [".txt", ".TXT"])
def test_a_text_beside_an_image_is_its_caption_in_upper_case_too(tmp_path, ending):
    root = folder(tmp_path / "in", "0.JPG")
    write(root / f"0{ending}", "a dog")
    assert convert(root, tmp_path / "out")["0"]["txt"] == "a dog"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_imagefolder_that_the_datasets_library_reads_gives_the_same_captions(tmp_path):
    datasets = pytest.importorskip("datasets")
    root = folder(tmp_path / "in", "train/0.jpg", "train/sub/1.jpg")
    write(root / "train" / "metadata.csv", "file_name,text\n0.jpg,a dog\nsub/1.jpg,a cat\n")
    rows = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    # the library leaves the table open until it is collected
    gc.collect()
    samples = convert(root, tmp_path / "out")
    assert sorted(row["text"] for row in rows) == sorted(fields["txt"] for fields in samples.values())
    assert {Path(key).name for key in samples} == {"0", "1"}
