"""`legrad shards parquet`: every row becomes a sample or is counted with the reason; a file is streamed."""

import datetime
import decimal
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.datasets.conversion import DEFAULT_LIMITS, ShardLimits, write_samples
from pipeline.datasets.parquet_images import open_parquet_images
from pipeline.errors import UserError
from tests.helpers.converted_shards import converted, record
from tests.helpers.dataset_trees import jpeg

IMAGES = [jpeg(seed=seed) for seed in range(12)]


def parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path, **options)
    return str(path)


def convert(files, out, image="image", caption="caption", limits=DEFAULT_LIMITS, **options):
    several = [files] if isinstance(files, str) else files
    write_samples(open_parquet_images(several, image, caption), str(out), limits, threads=2, **options)
    return converted(out)


def skipped(out):
    return {reason: [name for name, _ in pairs] for reason, pairs in record(out)["skipped_names"].items()}


@pytest.mark.parametrize(
    "column", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
)
def test_a_column_of_bytes_is_an_image_and_other_columns_are_in_the_json(tmp_path, column):
    table = pa.table(
        {"jpg": pa.array(IMAGES[:2], column), "caption": ["a dog", "a cat"], "width": [20, None]}
    )
    samples = convert(parquet(tmp_path / "00000.parquet", table), tmp_path / "out", image="jpg")
    assert samples == {
        "00000-00000000": {
            "jpg": IMAGES[0],
            "txt": "a dog",
            "json": {"caption": "a dog", "captions": ["a dog"], "width": 20},
        },
        "00000-00000001": {
            "jpg": IMAGES[1],
            "txt": "a cat",
            "json": {"caption": "a cat", "captions": ["a cat"], "width": None},
        },
    }


def test_a_time_in_a_time_zone_that_is_not_known_here_is_written_in_utc(tmp_path):
    times = pa.array([0], pa.timestamp("ms", tz="Nowhere/Zone"))
    table = pa.table({"image": pa.array(IMAGES[:1]), "caption": ["a dog"], "when": times})
    (sample,) = convert(parquet(tmp_path / "a.parquet", table), tmp_path / "out").values()
    assert sample["json"]["when"] == "1970-01-01 00:00:00.000Z"


def test_what_the_datasets_library_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    from datasets.table import embed_table_storage

    for number, image in enumerate(IMAGES[:3]):
        (tmp_path / f"{number}.jpg").write_bytes(image)
    columns = {
        "image": [str(tmp_path / f"{number}.jpg") for number in range(3)],
        "caption": [["a dog", "a pet"], ["a cat"], ["a bird"]],
        "label": [0, 1, 0],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["x", "y"]),
        }
    )
    path = tmp_path / "train-00000-of-00001.parquet"
    dataset = datasets.Dataset.from_dict(columns, features=features).with_format("arrow")
    dataset.map(embed_table_storage, batched=True).to_parquet(str(path))
    samples = convert(str(path), tmp_path / "out")
    assert [fields["jpg"] for fields in samples.values()] == IMAGES[:3]
    assert samples["train-00000-of-00001-00000000"]["json"] == {
        "file_name": "0.jpg",
        "caption": "a dog",
        "captions": ["a dog", "a pet"],
        "label": 0,
    }
    assert samples["train-00000-of-00001-00000001"]["txt"] == "a cat"
    # a job whose prompts are all captions of an image needs the list where there is one caption, too
    lists = [fields["json"]["captions"] for fields in samples.values()]
    assert lists == [["a dog", "a pet"], ["a cat"], ["a bird"]]


def test_without_a_column_of_captions_there_are_images_only(tmp_path, legrad):
    path = parquet(tmp_path / "a.parquet", [{"image": IMAGES[0], "caption": "a dog"}])
    code, out, _ = legrad("shards", "parquet", path, tmp_path / "out", "--image", "image")
    assert code == 0
    assert "captions: none; annotate with prompts.source=classes" in out
    assert converted(tmp_path / "out") == {"a-00000000": {"jpg": IMAGES[0], "json": {"caption_": "a dog"}}}


def test_a_row_that_cannot_be_used_is_counted_by_reason(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [
        {"bytes": IMAGES[0], "path": "0.jpg"},
        {"bytes": None, "path": "1.jpg"},
        None,
        {"bytes": None, "path": None},
        {"bytes": b"<!doctype html>", "path": None},
        {"bytes": b"", "path": None},
        {"bytes": IMAGES[1], "path": None},
        {"bytes": IMAGES[2], "path": None},
        {"bytes": IMAGES[3], "path": "../x"},
    ]
    captions = ["a dog", "b", "c", "d", "e", "f", None, "  ", "a cat"]
    table = pa.table({"image": pa.array(images, struct), "caption": captions})
    path = parquet(tmp_path / "a.parquet", table)
    samples = convert(path, tmp_path / "out")
    assert {key: fields["json"] for key, fields in samples.items()} == {
        "a-00000000": {"file_name": "0.jpg", "caption": "a dog", "captions": ["a dog"]},
        "a-00000008": {"file_name": "../x", "caption": "a cat", "captions": ["a cat"]},
    }
    assert skipped(tmp_path / "out") == {
        "image_not_in_file": [f"{path}:2"],
        "missing_image": [f"{path}:3", f"{path}:4"],
        "format_not_allowed": [f"{path}:5"],
        "empty": [f"{path}:6"],
        "no_caption": [f"{path}:7", f"{path}:8"],
    }


def test_values_that_json_does_not_have_become_texts_and_other_columns_are_counted(tmp_path):
    table = pa.table(
        {
            "image": [IMAGES[0]],
            "caption": ["a dog"],
            "when": pa.array([1_000_000_000_000_000_001], pa.timestamp("ns")),
            "day": [datetime.date(2020, 1, 2)],
            "price": [decimal.Decimal("1.50")],
            "infinite": [float("inf")],
            "kind": pa.array(["x"]).dictionary_encode(),
            "file_name": ["mine"],
            "boxes": [[1, 2]],
            "nested": [{"a": 1}],
            "embedding": [b"\0"],
        }
    )
    samples = convert(parquet(tmp_path / "a.parquet", table), tmp_path / "out")
    assert samples["a-00000000"]["json"] == {
        "caption": "a dog",
        "captions": ["a dog"],
        "when": "2001-09-09 01:46:40.000000001",
        "day": "2020-01-02",
        "price": "1.50",
        "infinite": None,
        "kind": "x",
        "file_name_": "mine",
    }
    assert record(tmp_path / "out")["omitted"] == {"columns_not_copied": 3}
    assert any(
        name.startswith("a: nested (struct")
        for name in record(tmp_path / "out")["omitted_names"]["columns_not_copied"]
    )


def test_a_text_that_is_not_utf8_costs_its_row(tmp_path):
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"a dog"], pa.binary()).buffers())
    path = parquet(tmp_path / "a.parquet", pa.table({"image": IMAGES[:2], "caption": texts}))
    assert list(convert(path, tmp_path / "out")) == ["a-00000001"]
    assert skipped(tmp_path / "out") == {"row_not_utf8": [f"{path}:1"]}


def test_several_files_keep_their_order_and_keys_differ_where_stems_do_not(tmp_path):
    for split, rows in (("b", 2), ("a", 3), ("c", 0)):
        schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
        values = [{"image": IMAGES[row], "caption": split} for row in range(rows)]
        parquet(tmp_path / split / "x.parquet", pa.Table.from_pylist(values, schema))
    samples = convert(f"{tmp_path}/*/x.parquet", tmp_path / "out")
    assert [(key, fields["txt"]) for key, fields in samples.items()] == [
        ("00000-x-00000000", "a"),
        ("00000-x-00000001", "a"),
        ("00000-x-00000002", "a"),
        ("00001-x-00000000", "b"),
        ("00001-x-00000001", "b"),
    ]


def contents(place):
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.mark.parametrize("row_group_size", [3, 1000])
def test_a_conversion_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch, row_group_size):
    rows = [{"image": image, "caption": f"text {number}"} for number, image in enumerate(IMAGES)]
    files = [
        parquet(tmp_path / f"{number}.parquet", part, row_group_size=row_group_size)
        for number, part in enumerate((rows[:7], rows[7:]))
    ]
    limits, publish, calls = ShardLimits(max_samples=2), storage.publish, []
    convert(files, tmp_path / "whole", limits=limits)

    def publish_some(*arguments):
        calls.append(arguments)
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        publish(*arguments)

    for stop_after in (3, 6, 9):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(storage, "publish", publish_some)
            convert(files, tmp_path / f"out{stop_after}", limits=limits)
        convert(files, tmp_path / f"out{stop_after}", limits=limits, resume=True)
        assert contents(tmp_path / f"out{stop_after}") == contents(tmp_path / "whole")


def test_damage_costs_the_rest_of_its_row_group_and_nothing_else(tmp_path):
    rows = [{"image": image, "caption": "a dog"} for image in IMAGES]
    files = [
        parquet(tmp_path / f"{name}.parquet", rows, row_group_size=4, compression="snappy") for name in "ab"
    ]
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    column = pq.read_metadata(files[0]).row_group(1).column(0)
    first = column.dictionary_page_offset or column.data_page_offset
    data[first : first + 200] = b"\xff" * 200
    (tmp_path / "a.parquet").write_bytes(data)
    samples = convert(files, tmp_path / "out")
    assert [key for key in samples if key.startswith("a-")] == [
        f"a-{row:08d}" for row in (*range(4), *range(8, 12))
    ]
    assert sum(key.startswith("b-") for key in samples) == 12
    assert record(tmp_path / "out")["skipped"] == {"damaged_file": 4}
    assert record(tmp_path / "out")["images"] == 24


def test_a_large_row_group_is_not_held_in_memory(tmp_path):
    # 24 MiB in one row group, in pages of about 1 MiB
    rows = {"image": [IMAGES[0] + bytes(40_000)] * 600, "caption": ["a dog"] * 600}
    path = parquet(
        tmp_path / "a.parquet",
        pa.table(rows),
        use_dictionary=False,
        compression="none",
        write_batch_size=16,
        data_page_size=1 << 20,
    )
    source = open_parquet_images([path], "image", "caption")
    before, most = pa.total_allocated_bytes(), 0
    for item in source.items(0):
        item.read()
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 8 << 20


@settings(max_examples=30)
@given(st.lists(st.none() | st.text(max_size=30), min_size=1, max_size=5))
def test_captions_come_back_as_they_were_written(tmp_path_factory, texts):
    place = tmp_path_factory.mktemp("captions")
    table = pa.table(
        {"image": [IMAGES[0]] * (len(texts) + 1), "caption": pa.array([*texts, "last"], pa.string())}
    )
    samples = convert(parquet(place / "a.parquet", table), place / "out")
    expected = [text.strip() for text in texts if text and text.strip()]
    assert [fields["txt"] for fields in samples.values()] == [*expected, "last"]
    assert [fields["json"]["caption"] for fields in samples.values()] == [*expected, "last"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": ["http://host/0.jpg"]}, "paths or URLs.*img2dataset.*legrad shards images"),
        ({"image": [{"path": "0.jpg"}]}, "struct<path: string>; expected bytes"),
        ({"image": [7]}, "is int64; expected bytes"),
        (
            {"picture": [b""], "n": [1]},
            r"no column `image`; columns: picture \(binary\), n \(int64\).*--image, such as --image picture",
        ),
        ({"image": [b""], "text": ["x"]}, "no column `caption`.*--caption, such as --caption text"),
        ({"image": [b""], "caption": [1]}, "expected texts, or lists of texts"),
        ({"image": pa.nulls(100_000, pa.binary())}, "its footer claims 100000 rows"),
    ],
)
def test_a_column_that_cannot_be_used_is_an_error_with_the_way_out(tmp_path, table, message):
    path = parquet(tmp_path / "a.parquet", pa.table(table))
    with pytest.raises(UserError, match=message):
        open_parquet_images([path], "image", "caption")


def test_what_is_no_parquet_is_an_error_with_the_way_out(tmp_path, legrad):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.parquet").write_text("text")
    whole = parquet(tmp_path / "rows.parquet", pa.table({"image": pa.array([], pa.binary())}))
    (tmp_path / "cut.parquet").write_bytes(Path(whole).read_bytes()[:-9])
    (tmp_path / "image.parquet").write_bytes(jpeg())
    (tmp_path / "empty.parquet").touch()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    for name, message in {
        "folder": r"is a folder; name its files, such as '.*folder/\*\.parquet'",
        "text.parquet": "is not a Parquet file",
        "cut.parquet": "is a damaged or cut Parquet file; copy it again",
        "image.parquet": "is a JPEG image, and a Parquet file is expected; `legrad shards images",
        "empty.parquet": "is an empty file, and a Parquet file is expected",
        "0.tar": "is a tar, and a Parquet file is expected; .* input.shards",
        "rows.parquet": "rows.parquet: no row in 1 file",
        "nowhere.parquet": "nowhere.parquet: no such file",
        "*.nothing": "FILES: nothing matches",
    }.items():
        code, _, err = legrad("shards", "parquet", tmp_path / name, tmp_path / "out", "--image", "image")
        assert code == 1
        assert re.search(message, err), err
        assert "Traceback" not in err
    code, _, err = legrad("shards", "parquet", whole, whole)
    assert (code, "is a file; expected a folder" in err) == (1, True), err
    code, _, err = legrad("shards", "parquet", "https://host/a.parquet", tmp_path / "out", "--image", "image")
    assert (code, "download it first" in err) == (1, True)


def test_a_file_without_a_usable_row_ends_with_1_and_the_reason(tmp_path, legrad):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": None, "path": "0.jpg"}], struct)})
    path = parquet(tmp_path / "a.parquet", table)
    code, _, err = legrad("shards", "parquet", path, tmp_path / "out", "--image", "image")
    assert code == 1
    assert "1 image_not_in_file" in err
    assert not (tmp_path / "out").exists()


def test_the_command_takes_several_files(tmp_path, legrad):
    files = [parquet(tmp_path / f"{name}.parquet", [{"image": IMAGES[0], "caption": name}]) for name in "ab"]
    options = ["--image", "image", "--caption", "caption", "--shard-size", 1]
    code, out, err = legrad("shards", "parquet", *files, tmp_path / "out", *options)
    assert code == 0, err
    assert [fields["txt"] for fields in converted(tmp_path / "out").values()] == ["a", "b"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "parquet-000000.tar",
        "parquet-000001.tar",
        "conversion.json",
    }
    assert f"input.shards='{tmp_path}/out/parquet-*.tar'" in out


@pytest.mark.usefixtures("only_loopback")
def test_files_are_read_from_a_store_and_shards_written_there(tmp_path, store):
    rows = [{"image": image, "caption": "a dog"} for image in IMAGES]
    data = (tmp_path / "a.parquet").read_bytes() if parquet(tmp_path / "a.parquet", rows) else b""
    store.ask("PUT", "parquet-in")
    store.put("parquet-in/a.parquet", data)
    options = f"scheme=http&endpoint_override={store.endpoint.removeprefix('http://')}"
    source = open_parquet_images([f"s3://parquet-in/*.parquet?{options}"], "image", "caption")
    write_samples(source, f"s3://parquet-in/out?{options}", threads=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.tar").write_bytes(store.get("parquet-in/out/parquet-000000.tar"))
    assert [fields["jpg"] for fields in converted(tmp_path / "out").values()] == IMAGES
