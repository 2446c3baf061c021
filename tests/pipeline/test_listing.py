"""Patterns to shards: braces, globs and lists; one file once, and the version of it that is there."""

import functools
import os
import time

import pytest

from pipeline import storage
from pipeline.errors import UserError
from pipeline.storage import braces, patterns, urls
from pipeline.storage.globs import fits
from tests.helpers.object_servers import FolderHandler, Handler, serving


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x" * 10)


def names_of(listing):
    return [shard.canonical_url.rsplit("/", 1)[1] for shard in listing.shards]


def find(*patterns):
    return storage.find_shards([str(pattern) for pattern in patterns])


def refusal(*patterns):
    with pytest.raises(UserError) as caught:
        find(*patterns)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


# --- refusals


@pytest.mark.parametrize(
    "line",
    ["{}\0", "{}/*.tar", "{}{{", "gopher://{}", "s3:///{}", "http://[{}", "file:/{}", "@{}", "pipe:{}"],
)
def test_a_name_of_any_length_is_refused_in_one_line(tmp_path, line):
    (tmp_path / "list.txt").write_text(line.format("x" * 100_000))
    refusal(f"@{tmp_path / 'list.txt'}")


# --- one file once


@pytest.mark.parametrize("name", ["a" * 10**5, "[" * 10**5 + "*", "http://host/" + "a" * 10**5])
def test_a_name_longer_than_any_file_has_is_refused_before_it_is_looked_for(name):
    with pytest.raises(UserError, match="the limit is 8,192") as told:
        storage.list_shards([name])
    assert len(str(told.value)) < 200


def test_a_link_and_the_file_it_leads_to_are_one_shard_and_that_is_said(tmp_path):
    touch(tmp_path / "data", "0.tar")
    (tmp_path / "data" / "link.tar").symlink_to("0.tar")
    (tmp_path / "also").symlink_to("data")
    listing = find(tmp_path / "data" / "*.tar", tmp_path / "also" / "0.tar")
    assert [shard.url for shard in listing.shards] == [str((tmp_path / "data" / "0.tar").resolve())]
    (warning,) = listing.warnings
    assert "2 name(s) refer to files that are listed already" in warning


def test_a_name_given_twice_is_said_to_be_listed_twice(tmp_path):
    touch(tmp_path, "0.tar")
    assert "is listed twice" in find(tmp_path / "0.tar", tmp_path / "0.tar").warnings[0]
    assert find(tmp_path / "0.tar").warnings == ()


@pytest.mark.parametrize("target", [".", "..", "/"])
def test_a_loop_of_links_is_walked_once(tmp_path, target):
    touch(tmp_path / "data" / "sub", "0.tar")
    (tmp_path / "data" / "sub" / "loop").symlink_to(str(tmp_path) if target == "/" else target)
    listing = find(tmp_path / "data" / "**" / "*.tar")
    assert names_of(listing) == ["0.tar"]
    assert "links lead to 1 folder(s)" in listing.warnings[0]


def test_folders_full_of_links_to_each_other_are_walked_in_no_time(tmp_path):
    for number in range(25):
        touch(tmp_path / str(number), f"{number}.tar")
        for name in "ab":
            (tmp_path / str(number) / name).symlink_to(f"../{(number + 1) % 25}")
    assert len(find(tmp_path / "0" / "**" / "*.tar").shards) == 25


def test_an_alias_counts_under_whichever_name_the_glob_asks_for(tmp_path):
    touch(tmp_path / "store", "0.tar")
    (tmp_path / "a").symlink_to("store")
    (tmp_path / "b").symlink_to("store")
    assert names_of(find(tmp_path / "**" / "b" / "*.tar")) == ["0.tar"]


def test_links_to_nothing_and_to_themselves_are_shards_that_cannot_be_read(tmp_path):
    (tmp_path / "0.tar").symlink_to("gone")
    (tmp_path / "1.tar").symlink_to("1.tar")
    touch(tmp_path, "2.tar")
    assert [shard.size_bytes for shard in find(tmp_path / "*.tar").shards].count(None) == 2


def test_two_shards_of_one_short_id_get_longer_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(urls.hashlib, "sha256", clashing_digests(urls.hashlib.sha256))
    for name in ("a", "b", "c"):
        touch(tmp_path / name, "0.tar")
    ids = [shard.shard_id for shard in find(tmp_path / "*" / "0.tar").shards]
    assert len(set(ids)) == 3
    assert {len(shard_id) for shard_id in ids} == {len("0-") + 16}


def clashing_digests(sha256):
    """SHA-256 whose first 8 digits are always the same."""

    class Clashing:
        def __init__(self, data):
            self._real = sha256(data)

        def hexdigest(self):
            return "0" * 8 + self._real.hexdigest()

    return Clashing


# --- a path that is there is that file


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "100%",
        "%41",
        "a#b",
        "a?b",
        "[01]",
        "{0..9}",
        "a{b",
        "a}b",
        "c*",
        "a\\b",
        "~x",
        "é漢字",
        "data:v1",
        "-n",
        "pipe",
        "a\u2028b",
        "a=b",
        "'\"",
        "$HOME",
        "a,b",
        "...",
    ],
)
@pytest.mark.parametrize("form", ["{}/0.tar", "{}/*.tar", "{}/[0].tar", "./{}/0.tar", "**/*.tar"])
def test_a_folder_may_have_any_name(tmp_path, monkeypatch, name, form):
    touch(tmp_path / name, "0.tar")
    touch(tmp_path / "other", "note.txt")
    monkeypatch.chdir(tmp_path)
    (shard,) = find(form.replace("{}", name)).shards
    assert shard.url == str(tmp_path / name / "0.tar")
    with storage.open_shard(shard) as stream:
        assert len(stream.read()) == 10
    assert find(f"{tmp_path}/{form.replace('{}', name)}").shards == [shard]


def test_a_file_url_may_escape_what_a_pattern_would_read_as_a_glob(tmp_path):
    touch(tmp_path / "[1] a?b", "0.tar")
    assert len(find((tmp_path / "[1] a?b").as_uri() + "/0.tar").shards) == 1
    assert len(find((tmp_path / "[1] a?b").as_uri() + "/*.tar").shards) == 1
    assert len(find(f"FILE://{tmp_path}/[[]1*/*.tar").shards) == 1


def test_a_name_that_is_not_utf_8_can_be_read(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.tar")).write_bytes(b"x" * 10)
    (shard,) = find(tmp_path / "*.tar").shards
    with storage.open_shard(shard) as stream:
        assert len(stream.read()) == 10


def test_a_tilde_is_the_home_folder_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "home", "0.tar")
    assert find("~/0.tar").shards[0].size_bytes == 10
    assert storage.absolute("~/out") == str(tmp_path / "home" / "out")
    touch(tmp_path / "~", "0.tar", "1.tar")
    assert find("~/1.tar").shards[0].url == str(tmp_path / "~" / "1.tar")


# --- what is refused, in one line


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("s3:/bucket/0.tar", r"did you mean s3://bucket/0.tar?"),
        ("S3:bucket/0.tar", r"did you mean s3://bucket/0.tar?"),
        ("gs:/bucket/*.tar", r"did you mean gs://bucket/*.tar?"),
        ("https:/host/0.tar?token=hunter2", r"did you mean https://host/0.tar?"),
        ("file:/data/0.tar", r"did you mean file:///data/0.tar?"),
        ("file://data/0.tar", r"did you mean file:///data/0.tar?"),
        ("s3:///0.tar", "expected a bucket or a host"),
        ("http:///0.tar", "expected a bucket or a host"),
        ("https://[::1/0.tar?token=hunter2", "not a valid web address"),
        ("", "expected a path"),
        ("a\0b.tar", "NUL"),
        ("{0..9.tar", "not balanced"),
        ("0..9}.tar", "not balanced"),
        ("{1..3000000000}.tar", "stand for 3,000,000,000 names; the limit is"),
        ("{1..99999}{1..99999}.tar", "names; the limit is"),
        ("{a,{b,{1..2000000}}}.tar", "names; the limit is"),
        ("{1.." + "9" * 5000 + "}.tar", "too many digits"),
        ("{" * 20_000 + "}" * 20_000, "nested deeper"),
        ("{a," * 20_000 + "}" * 20_000, "nested deeper"),
        ("{a,b}" * 40, "names; the limit is"),
        ("{1..1000000}" + "x" * 60_000, "names; the limit is"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused_in_one_line(pattern, what):
    text = refusal(pattern)
    assert text.startswith("input.shards: ")
    assert what in text
    assert "hunter2" not in text


def test_many_patterns_may_not_stand_for_too_many_names_together(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_NAMES", 10_000)
    assert "more than 10,000 names in all" in refusal(*(f"{n}{{1..3000}}.tar" for n in range(4)))


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n", "\ufeff", " \r\n"])
def test_a_list_that_names_nothing_is_an_input_error(tmp_path, content):
    (tmp_path / "list.txt").write_text(content, encoding="utf-8")
    assert "list.txt names no shard" in refusal(f"@{tmp_path}/list.txt")
    assert "the list of patterns is empty" in refusal()


def test_a_list_may_have_a_byte_order_mark_and_any_line_ends(tmp_path):
    touch(tmp_path, "0.tar", "1\x85.tar", "2\u2028.tar")
    lines = f"\ufeff{tmp_path}/0.tar\r\n  # a comment\r{tmp_path}/1\x85.tar\n\n{tmp_path}/2\u2028.tar"
    (tmp_path / "list.txt").write_bytes(lines.encode())
    assert len(find(f"@{tmp_path}/list.txt").shards) == 3


def test_lists_that_name_themselves_or_nest_without_end_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(f"@{tmp_path}/b.txt\n")
    (tmp_path / "b.txt").write_text(f"@{tmp_path}/./a.txt\n")
    assert "includes itself" in refusal(f"@{tmp_path}/a.txt")
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"@{tmp_path}/{number + 1}.txt\n")
    assert "lists within lists" in refusal(f"@{tmp_path}/0.txt")


def test_a_list_named_again_is_read_once_and_that_is_said(tmp_path):
    touch(tmp_path, "0.tar")
    (tmp_path / "a.txt").write_text(f"{tmp_path}/0.tar\n")
    listing = find(f"@{tmp_path}/a.txt", f"@{tmp_path}/a.txt")
    assert len(listing.shards) == 1
    assert "each is read once" in listing.warnings[0]


def test_a_list_that_is_no_text_or_never_ends_is_reported(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe0\0.\0t\0")
    assert "list.txt: is not text in UTF-8" in refusal(f"@{tmp_path}/list.txt")
    monkeypatch.setattr(patterns, "read_text", functools.partial(patterns.read_text, max_bytes=1 << 20))
    assert "more than 1048576 bytes" in refusal("@/dev/zero")


def test_a_home_folder_that_nobody_knows_is_reported(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert "set HOME" in refusal("~/0.tar")


# --- sizes and versions


def test_a_local_shard_reports_its_size_and_when_it_was_changed(tmp_path):
    touch(tmp_path, "0.tar")
    (tmp_path / "1.tar").mkdir()
    named, folder, gone = find(tmp_path / "{0,1,2}.tar").shards
    assert (named.size_bytes, named.mtime_ns, named.etag) == (
        10,
        (tmp_path / "0.tar").stat().st_mtime_ns,
        None,
    )
    assert [named] == find(tmp_path / "*.tar").shards
    assert folder.size_bytes is gone.size_bytes is gone.mtime_ns is None


def answering(**headers):
    """A server that answers every HEAD with such headers, and counts."""

    class Answering(Handler):
        asked = 0

        def do_HEAD(self):
            type(self).asked += 1
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

    return Answering


def test_web_shards_are_asked_once_for_size_and_version_or_not_at_all(only_loopback):
    handler = answering(Content_Length="7", ETag='"v1"', Last_Modified="Thu, 01 Jan 1970 00:00:10 GMT")
    with serving(handler) as port:
        patterns = [f"http://127.0.0.1:{port}/dl?id={{0..9}}", f"http://127.0.0.1:{port}/dl?id=1&sig=x"]
        shards = storage.list_shards(patterns)
        assert handler.asked == len(shards) == 10
        assert {(shard.size_bytes, shard.mtime_ns, shard.etag) for shard in shards} == {(7, 10**10, '"v1"')}
        unasked = storage.find_shards(patterns, check_inputs=False).shards
        assert handler.asked == 10
        assert {(shard.size_bytes, shard.etag) for shard in unasked} == {(None, None)}
        assert [shard.shard_id for shard in unasked] == [shard.shard_id for shard in shards]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Length": value}
        for value in ("-5", "+5", "1_000", "²", "٣", "5.0", "0x10", "1e3", "", "9" * 30, "5, 5", "nan")
    ]
    + [
        {"Last_Modified": value}
        for value in ("yesterday", "Thu, 01 Jan 9999 00:00:10 GMT", "-1", "Thu, 99 Foo", "²")
    ]
    + [{"ETag": ""}],
)
def test_headers_without_sense_are_as_good_as_none(only_loopback, headers):
    headers = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    with serving(answering(**headers)) as port:
        (shard,) = storage.list_shards(f"http://127.0.0.1:{port}/0.tar")
    assert (shard.size_bytes, shard.mtime_ns, shard.etag) == (None, None, None)


def test_an_etag_is_stored_printable_and_bounded(only_loopback):
    with serving(answering(ETag='"' + "x" * 5000 + '"')) as port:
        assert storage.list_shards(f"http://127.0.0.1:{port}/0.tar")[0].etag.startswith("sha256:")
    with serving(answering(ETag='"\x1b[2J"')) as port:
        assert storage.list_shards(f"http://127.0.0.1:{port}/0.tar")[0].etag == r'"\x1b[2J"'


def test_two_urls_that_differ_in_their_query_are_read_as_two(only_loopback, tmp_path):
    class ById(FolderHandler):
        def translate_path(self, path):
            return str(tmp_path / path.partition("id=")[2])

    touch(tmp_path, "1", "2")
    (tmp_path / "2").write_bytes(b"two")
    with serving(functools.partial(ById, directory=tmp_path)) as port:
        first, second = storage.list_shards(f"http://127.0.0.1:{port}/dl?id={{1,2}}")
        assert first.shard_id != second.shard_id
        assert {shard.size_bytes for shard in (first, second)} == {10, 3}


# --- the parts


@pytest.mark.parametrize(
    ("path", "glob", "meant"),
    [
        ("b/a/0.tar", "b/**/*.tar", True),
        ("b/0.tar", "b/**/*.tar", True),
        ("b/a/c/0.tar", "b/**/**/0.tar", True),
        ("b/a/0.tar", "b/*.tar", False),
        ("b/a/0.tar", "b/*/[!1].tar", True),
        ("b/x^y/0.tar", "b/x[z-a^]y/0.tar", True),
        ("b/a.tar", "b/[a.tar", False),
        ("c/a/b/c/0", "**/a/**/c/*", True),
    ],
)
def test_a_glob_means_whole_paths(path, glob, meant):
    assert fits(path, glob) == meant


@pytest.mark.parametrize(
    "pattern",
    [
        "a",
        "{a,b}",
        "{0..9}",
        "{07..10}",
        "{9..0..3}",
        "{a..f}",
        "x{1{a,b},2}{c,}",
        "{a}",
        "{{1..3}}",
        r"\{a,b\}{c,d}",
    ],
)
def test_the_count_is_at_least_what_is_expanded_to(pattern):
    names = list(braces.expand_braces(pattern))
    assert len(names) <= braces.count_names(pattern) <= max(52, len(names))


@pytest.mark.slow
def test_a_hundred_thousand_shards_are_listed_without_a_request_each(tmp_path):
    for number in range(100_000):
        (tmp_path / f"{number:06d}.tar").touch()
    started_s = time.process_time()
    listed = find(tmp_path / "{000000..099999}.tar").shards
    assert listed == find(tmp_path / "*.tar").shards
    print(f"listed twice in {time.process_time() - started_s:.1f} s")
    assert len(listed) == 100_000
