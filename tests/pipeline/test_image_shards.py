"""Where the images of a job are looked for."""

import os
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.output.image_shards import locate_shards
from pipeline.storage import list_shards, shard_id, shard_name


def listed(*urls):
    return [
        {"shard_id": shard_id(url), "shard": shard_name(str(url)), "size_bytes": 7} for url in map(str, urls)
    ]


def test_a_job_knows_where_its_own_shards_are(tmp_path):
    rows = listed(tmp_path / "a b.tar", tmp_path / "c.tar")
    sources = locate_shards(rows).sources
    assert [source.canonical_url for source in sources.values()] == [row["shard"] for row in rows]
    assert list(sources) == [row["shard_id"] for row in rows]


@pytest.mark.parametrize("url", ["s3://bucket/in/0.tar", "https://host/0.tar", "gs://bucket/0.tar"])
def test_what_a_folder_names_on_a_server_is_read_only_where_it_is_named_again(url):
    rows = listed(url)
    located = locate_shards(rows)
    assert not located.sources
    assert "read only if you name it" in located.missing[rows[0]["shard_id"]]
    there = url.rpartition("/")[0]
    assert [source.url for source in locate_shards(rows, [f"{there}={there}"]).sources.values()] == [url]


def test_a_shard_written_by_a_command_is_missing_and_says_why():
    rows = listed("pipe:cat /data/0.tar")
    located = locate_shards(rows)
    assert not located.sources
    assert "command" in located.missing[rows[0]["shard_id"]]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_may_block_or_never_end_is_no_shard(tmp_path, make):
    path = tmp_path / "0.tar"
    make(path)
    row = {"shard_id": "0", "shard": path.as_uri(), "size_bytes": 7}
    assert locate_shards([row]).missing == {"0": "is no regular file"}


def test_what_no_path_can_hold_is_no_shard():
    row = {"shard_id": "0", "shard": "file:///tmp/a%00b", "size_bytes": 7}
    assert locate_shards([row]).missing == {"0": "is no regular file"}


@pytest.mark.parametrize("name", ["x" * 5000, "nobody/0.tar"])
def test_a_shard_that_is_not_there_is_reported_when_it_is_opened(name):
    row = {"shard_id": "0", "shard": f"file:///tmp/{name}", "size_bytes": 7}
    assert not locate_shards([row]).missing


def test_given_shards_are_joined_by_url_and_else_by_stem(tmp_path):
    for name in ("0.tar", "1.tar", "2.tar"):
        (tmp_path / name).write_bytes(b"x")
    rows = listed(tmp_path / "0.tar", "s3://bucket/1.tar", "s3://bucket/5.tar")
    located = locate_shards(rows, [str(tmp_path / "*.tar")])
    assert {key: source.url for key, source in located.sources.items()} == {
        rows[0]["shard_id"]: str(tmp_path / "0.tar"),
        rows[1]["shard_id"]: str(tmp_path / "1.tar"),
    }
    assert list(located.missing) == [rows[2]["shard_id"]]


@pytest.mark.parametrize(
    ("shard", "mapping", "opened"),
    [
        ("/data/in/a b.tar", "/data/in=s3://bucket/new", "s3://bucket/new/a b.tar"),
        ("/data/in/a b.tar", "/data/=/mnt", "/mnt/in/a b.tar"),
        ("s3://bucket/in/a%20b.tar", "s3://bucket/in=/mnt/in/", "/mnt/in/a%20b.tar"),
        (
            "s3://bucket/in/0.tar",
            "s3://bucket=s3://other/x?region=eu-west-1",
            "s3://other/x/in/0.tar?region=eu-west-1",
        ),
        ("s3://bucket/in/0.tar", "s3://bucket/in/0.tar=/mnt/first.tar", "/mnt/first.tar"),
        ("pipe:cat s3://b/0.tar", "pipe:cat s3://b/0.tar=/mnt/0.tar", "/mnt/0.tar"),
    ],
)
def test_what_lay_in_old_is_looked_for_in_new(shard, mapping, opened):
    rows = listed(shard)
    (source,) = locate_shards(rows, [mapping]).sources.values()
    assert (source.shard_id, source.url) == (rows[0]["shard_id"], opened)


def test_a_mapping_moves_whole_folders_and_leaves_other_shards_where_they_are():
    rows = listed("s3://bucket/in/0.tar", "/data/in2/0.tar")
    sources = locate_shards(rows, ["s3://bucket/in=/mnt"]).sources
    assert [source.url for source in sources.values()] == ["/mnt/0.tar", "file:///data/in2/0.tar"]


def test_an_old_in_which_no_shard_lies_is_an_input_error():
    with pytest.raises(UserError, match=r"expected as OLD of OLD=NEW .*s3://bucket/in/0\.tar"):
        locate_shards(listed("s3://bucket/in/0.tar"), ["s3://elsewhere=/mnt"])


def test_shards_and_mappings_together_are_refused(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    rows = listed("s3://bucket/in/0.tar")
    with pytest.raises(UserError, match="either"):
        locate_shards(rows, ["s3://bucket=/mnt", str(tmp_path / "0.tar")])


def test_a_path_with_an_equals_sign_that_is_there_is_a_path(tmp_path):
    path = tmp_path / "part=1" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(b"")
    (shard,) = list_shards(str(path))
    located = locate_shards(listed(path), [str(path)])
    assert located.sources == {shard.shard_id: shard}
