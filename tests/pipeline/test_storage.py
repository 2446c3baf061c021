"""Files wherever they live: names, lists, whole reads and whole writes."""

import errno
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.fs as pafs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import OutputError, ShardError, ShortReadError, UserError
from pipeline.storage import ShardSource


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("s3://user:secret@bucket/a/0.tar?X-Amz-Signature=abc", "s3://bucket/a/0.tar"),
        ("https://host/x.tar?token=t#part", "https://host/x.tar"),
        ("file:///data/a%20b.tar", "file:///data/a%20b.tar"),
        ("/data/a b.tar", "file:///data/a%20b.tar"),
        ("/data/odd?name#1.tar", "file:///data/odd%3Fname%231.tar"),
    ],
)
def test_a_shards_name_is_absolute_and_carries_no_secret(url, canonical):
    assert storage.shard_name(url) == canonical


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.shard_name("x.tar") == (tmp_path / "x.tar").as_uri()


@given(
    st.text(min_size=1).filter(lambda name: "/" not in name and "\0" not in name and name not in (".", ".."))
)
def test_a_shard_id_is_always_a_safe_file_name(name):
    identifier = storage.shard_id(f"/data/{name}")
    assert set(identifier) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    assert len(identifier) <= 89


def test_shards_of_one_name_in_two_folders_have_different_ids():
    assert storage.shard_id("/a/0.tar") != storage.shard_id("/b/0.tar")


def test_a_shard_id_keeps_the_whole_stem():
    assert storage.shard_id("/a/train.0001.tar").startswith("train.0001-")


def test_a_signature_does_not_change_a_shard_id():
    assert storage.shard_id("s3://b/0.tar?sig=1") == storage.shard_id("s3://b/0.tar?sig=2")


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x" * 10)


def names_of(shards):
    return [shard.canonical_url.rsplit("/", 1)[1] for shard in shards]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("*.tar", ["0.tar", "1.tar", "2.tar", "ten.tar"]),
        ("[01].tar", ["0.tar", "1.tar"]),
        ("[!0].tar", ["1.tar", "2.tar"]),
        ("?.tar", ["0.tar", "1.tar", "2.tar"]),
        ("**/*.tar", ["0.tar", "1.tar", "2.tar", "deep.tar", "ten.tar"]),
        ("{0,ten}.tar", ["0.tar", "ten.tar"]),
    ],
)
def test_patterns_are_spelled_out(tmp_path, pattern, found):
    touch(tmp_path, "0.tar", "1.tar", "2.tar", "ten.tar", "note.txt")
    touch(tmp_path / "sub", "deep.tar")
    assert sorted(names_of(storage.list_shards(f"{tmp_path}/{pattern}"))) == found


def test_a_list_file_may_hold_patterns_and_comments(tmp_path):
    touch(tmp_path, "0.tar", "1.tar", "2.tar")
    (tmp_path / "list.txt").write_text(f"# two of them\n{tmp_path}/{{0,2}}.tar\n\n")
    assert names_of(storage.list_shards(f"@{tmp_path}/list.txt")) == ["0.tar", "2.tar"]


def test_a_shard_named_twice_is_worked_on_once(tmp_path):
    touch(tmp_path, "0.tar")
    assert (
        len(storage.list_shards([f"{tmp_path}/0.tar", f"{tmp_path}/*.tar", f"file://{tmp_path}/0.tar"])) == 1
    )


def test_a_glob_that_matches_nothing_is_reported(tmp_path):
    with pytest.raises(UserError, match="nothing matches"):
        storage.list_shards(f"{tmp_path}/*.tar")


@pytest.mark.parametrize("pattern", ["pipe:cat 0.tar", "ftp://host/0.tar"])
def test_commands_and_unknown_schemes_are_refused(pattern):
    with pytest.raises(UserError):
        for shard in storage.list_shards(pattern):
            with storage.open_shard(shard):
                pass


def source(path, size_bytes):
    return ShardSource("s", str(path), path.as_uri(), size_bytes)


def test_a_shard_is_read_to_its_last_byte(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(os.urandom(9_000_000))
    with storage.open_shard(source(path, 9_000_000)) as stream:
        assert stream.read() == path.read_bytes()


def test_fewer_bytes_than_the_object_holds_are_no_end_of_the_object(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(b"x" * 1000)
    with (
        pytest.raises(ShortReadError, match="received 1000 of 5000 bytes"),
        storage.open_shard(source(path, 5000)) as stream,
    ):
        stream.read()


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"]
)
def test_a_shard_that_may_block_or_never_ends_is_not_opened(tmp_path, make):
    make(tmp_path / "0.tar")
    (shard,) = storage.list_shards(str(tmp_path / "0.tar"))
    with pytest.raises(ShardError, match="cannot be opened: is no regular file"), storage.open_shard(shard):
        pass


def test_a_missing_shard_is_named(tmp_path):
    with (
        pytest.raises(ShardError, match=r"gone\.tar"),
        storage.open_shard(source(tmp_path / "gone.tar", None)),
    ):
        pass


def test_a_published_file_replaces_an_earlier_one_and_leaves_nothing_beside_it(tmp_path):
    storage.publish(str(tmp_path / "a"), "x.bin", b"one")
    storage.publish(str(tmp_path / "a"), "x.bin", b"two")
    assert (tmp_path / "a" / "x.bin").read_bytes() == b"two"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.bin"]


class BreaksHalfway:
    """A stream that ends as a full disk does."""

    def __init__(self):
        self.blocks = [b"half", OSError(errno.ENOSPC, "No space left on device")]

    def seek(self, position):
        return position

    def read(self, size):
        block = self.blocks.pop(0)
        if isinstance(block, OSError):
            raise block
        return block


def test_a_disk_that_fills_up_leaves_the_earlier_file_and_no_part_of_the_new_one(tmp_path):
    storage.publish(str(tmp_path), "x.bin", b"before")
    with pytest.raises(OutputError, match=r"x\.bin.*No space left"):
        storage.publish(str(tmp_path), "x.bin", BreaksHalfway())
    assert (tmp_path / "x.bin").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_a_folder_that_cannot_be_made_is_reported_with_its_path(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file/annotations"):
        storage.publish(str(tmp_path / "file" / "annotations"), "x.bin", b"1")


def test_temporary_files_are_neither_listed_nor_kept_for_ever(tmp_path):
    touch(tmp_path, "x.parquet", f".abc-y.parquet{storage.TEMPORARY_SUFFIX}")
    assert storage.list_names(str(tmp_path)) == {"x.parquet"}


def test_staging_folders_are_swept_once_no_run_has_written_there_for_long(tmp_path):
    for run in ("old", "new", "old-with-other-files"):
        (tmp_path / run).mkdir()
        touch(tmp_path / run, f"1-annotations-x.parquet{storage.TEMPORARY_SUFFIX}")
    touch(tmp_path / "old-with-other-files", "photo.jpg")
    for path in [*tmp_path.glob("old*/*"), *tmp_path.glob("old*")]:
        os.utime(path, (0, 0))
    assert storage.sweep_staging(str(tmp_path), idle_for_s=60) == 1
    assert not (tmp_path / "old").exists()
    assert len(list((tmp_path / "new").iterdir())) == 1
    assert (tmp_path / "old-with-other-files" / "photo.jpg").exists()


def test_a_file_that_is_written_in_a_staging_folder_appears_in_one_step_and_leaves_nothing_there(tmp_path):
    storage.publish(str(tmp_path / "a"), "x.bin", b"one", staging_url=str(tmp_path / "staging"))
    assert (tmp_path / "a" / "x.bin").read_bytes() == b"one"
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system at /dev/shm")
def test_a_staging_folder_on_another_file_system_does_not_keep_a_file_from_being_published():
    with (
        TemporaryDirectory(dir="/dev/shm") as staging,
        TemporaryDirectory(dir=Path(__file__).parent) as folder,
    ):
        storage.publish(folder, "x.bin", b"one", staging_url=staging)
        assert [path.name for path in Path(folder).iterdir()] == ["x.bin"]
        assert list(Path(staging).iterdir()) == []


def test_a_file_is_moved_whole_and_what_is_not_there_is_not_moved(tmp_path):
    touch(tmp_path, "x.parquet")
    assert storage.move(str(tmp_path), "x.parquet", str(tmp_path / "unlisted"), "x.parquet.moved")
    assert not storage.move(str(tmp_path), "x.parquet", str(tmp_path / "unlisted"), "y")
    assert [path.name for path in (tmp_path / "unlisted").iterdir()] == ["x.parquet.moved"]


def test_removing_and_asking_for_what_is_not_there_is_no_error(tmp_path):
    storage.remove(str(tmp_path), "nothing")
    assert not storage.exists(str(tmp_path), "nothing")
    assert storage.list_names(str(tmp_path / "no-folder")) == set()


def test_an_s3_url_keeps_its_endpoint_and_loses_its_credentials_in_the_path():
    filesystem, path = storage.resolve(
        "s3://key:secret@bucket/a/b.tar?region=eu-west-1&endpoint_override=127.0.0.1:1"
    )
    assert isinstance(filesystem, pafs.S3FileSystem)
    assert path == "bucket/a/b.tar"


def test_a_folder_with_names_that_are_not_utf8_and_links_to_nowhere_is_listed(tmp_path):
    odd = os.fsdecode(b"caf\xe9.jpg")
    for name in (odd, "0.jpg", "0.part"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "itself").symlink_to("itself")
    assert storage.list_names(str(tmp_path)) == {odd, "0.jpg"}
    with pytest.raises(OutputError, match=r"caf\\xe9\.jpg: a name that is not UTF-8; rename the file"):
        storage.list_paths(str(tmp_path))
