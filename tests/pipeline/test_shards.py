"""Tar streams, well-formed and broken in every way we know, against what was put into them."""

import bz2
import io
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import MAX_FIELDS_PER_SAMPLE, RawSample, read_samples

BLOCK = 512
END = bytes(2 * BLOCK)
LIMIT = 1000


def header(name: str, size: int, **attributes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def member(name: str, content: bytes = b"x", **attributes) -> bytes:
    return header(name, len(content), **attributes) + content + bytes(-len(content) % BLOCK)


def body_of(name: str) -> bytes:
    return f"content of {name}".encode("utf-8", "surrogateescape")


def members(*names: str) -> bytes:
    return b"".join(member(name, body_of(name)) for name in names)


def read(data: bytes, **options) -> list[RawSample | SampleError]:
    return list(
        read_samples(io.BytesIO(data), max_member_bytes=options.pop("max_member_bytes", LIMIT), **options)
    )


def summary(items: Iterable[RawSample | SampleError]) -> list[tuple]:
    """(index, key, fields) of samples, (index, key, kind) of errors."""
    return [
        (item.index, item.key, sorted(item.fields))
        if isinstance(item, RawSample)
        else (item.sample_index, item.key, item.kind)
        for item in items
    ]


# ---------------------------------------------------------------- well-formed archives


def test_members_with_one_key_form_a_sample_with_its_ordinal():
    items = read(members("a.jpg", "a.txt", "b.jpg", "b.json", "b.txt") + END)
    assert items == [
        RawSample(0, "a", {"jpg": body_of("a.jpg"), "txt": body_of("a.txt")}),
        RawSample(1, "b", {extension: body_of(f"b.{extension}") for extension in ("jpg", "json", "txt")}),
    ]


def test_only_wanted_fields_are_kept_whatever_their_case():
    items = read(members("a.JPG", "a.pkl", "a.Txt") + END, wanted_fields=["jpg", "TXT"])
    assert items == [RawSample(0, "a", {"jpg": body_of("a.JPG"), "txt": body_of("a.Txt")})]


def test_a_sample_without_any_wanted_field_still_counts():
    assert summary(read(members("a.pth", "b.jpg") + END, wanted_fields=["jpg"])) == [
        (0, "a", []),
        (1, "b", ["jpg"]),
    ]


def test_the_key_ends_at_the_first_dot_of_the_base_name():
    names = ("a.v1.jpg", "a.v2.jpg", "v1.5/a.jpg", "./c.seg.png")
    assert summary(read(members(*names) + END)) == [
        (0, "a", ["v1.jpg", "v2.jpg"]),
        (1, "v1.5/a", ["jpg"]),
        (2, "./c", ["seg.png"]),
    ]


def test_the_same_base_name_in_two_folders_makes_two_samples():
    items = read(member("x", type=tarfile.DIRTYPE, content=b"") + members("x/a.jpg", "y/a.jpg") + END)
    assert summary(items) == [(0, "x/a", ["jpg"]), (1, "y/a", ["jpg"])]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_what_the_standard_library_writes_is_read_with_long_and_accented_names(tar_format, tmp_path):
    names = [f"{'folder/' * 20}image.jpg", "é/ünï.jpg", "plain.jpg", "empty.txt"]
    if tar_format != tarfile.USTAR_FORMAT:
        names.append(f"{'n' * 300}.jpg")
    with tarfile.open(tmp_path / "s.tar", "w", format=tar_format, encoding="utf-8") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            content = b"" if name == "empty.txt" else body_of(name)
            info.size, info.mtime = len(content), 1.5
            tar.addfile(info, io.BytesIO(content))
    items = read((tmp_path / "s.tar").read_bytes())
    assert [(f"{item.key}.{field}", content) for item in items for field, content in item.fields.items()] == [
        (name, b"" if name == "empty.txt" else body_of(name)) for name in names
    ]


def test_a_size_in_a_pax_header_takes_the_place_of_the_plain_one():
    content = b"seven b"
    extended = member("pax", b"10 size=7\n", type=tarfile.XHDTYPE)
    data = extended + header("a.txt", 0) + content + bytes(-len(content) % BLOCK) + members("b.txt") + END
    assert read(data) == [RawSample(0, "a", {"txt": content}), RawSample(1, "b", {"txt": body_of("b.txt")})]


def test_a_global_pax_header_is_passed_over():
    data = member("g", b"17 comment=abcde\n", type=tarfile.XGLTYPE) + members("a.txt") + END
    assert summary(read(data)) == [(0, "a", ["txt"])]


def test_an_archive_without_members_has_no_samples_and_no_errors():
    assert read(END) == []
    assert read(bytes(20 * BLOCK)) == []


def test_members_about_the_archive_itself_are_no_samples_and_are_reported():
    items = read(members("__index__/a.json", "a.txt", "__index__/b.json", "__c__.txt") + END)
    strays = [(None, "__index__/a.json", "no_key"), (None, "__index__/b.json", "no_key")]
    assert summary(items) == [strays[0], strays[1], (0, "a", ["txt"]), (1, "__c__", ["txt"])]


def test_a_stream_that_gives_few_bytes_at_a_time_reads_the_same():
    class Trickle(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    data = members("a.jpg", "a.txt", "b.jpg") + END
    assert list(read_samples(Trickle(data), max_member_bytes=LIMIT)) == read(data)


# ---------------------------------------------------------------- faults of single samples


def test_a_key_that_comes_back_with_a_field_again_is_an_error_of_its_own():
    items = read(members("a.jpg", "a.txt", "b.jpg", "a.JPG", "c.txt", "b.jpg", "b.txt") + END)
    assert summary(items) == [
        (0, "a", ["jpg", "txt"]),
        (1, "b", ["jpg"]),
        (2, "a", "duplicate_key"),
        (3, "c", ["txt"]),
        (4, "b", "duplicate_key"),
    ]


def test_members_that_are_apart_from_their_sample_are_never_joined_and_count_once():
    items = read(members("a.jpg", "b.jpg", "a.txt", "b.txt", "c.txt", "a.json", "c.jpg") + END)
    assert summary(items) == [
        (0, "a", ["jpg"]),
        (1, "b", ["jpg"]),
        (2, "c", ["txt"]),
        (None, "a", "members_apart"),
    ]
    assert "4 time(s)" in items[-1].message
    assert "tar --sort=name" in items[-1].message
    assert not items[-1].damages_shard


def test_members_apart_that_nobody_wants_are_no_error():
    data = members("a.jpg", "a.txt", "b.jpg", "b.txt", "a.json", "b.json") + END
    assert summary(read(data, wanted_fields=["jpg", "txt"])) == [
        (0, "a", ["jpg", "txt"]),
        (1, "b", ["jpg", "txt"]),
    ]


def test_members_apart_are_reported_once_before_what_damages_the_archive():
    kinds = [item.kind for item in read(members("a.jpg", "b.jpg", "a.txt")) if isinstance(item, SampleError)]
    assert kinds == ["members_apart", "truncated"]


@settings(deadline=None, max_examples=100)
@given(
    st.permutations([f"{key}.{field}" for key in "abc" for field in ("jpg", "txt", "json", "cls")]),
    st.lists(st.sampled_from(["a.jpg", "b.txt"]), max_size=2),
    st.lists(st.sampled_from(["jpg", "txt", "json", "cls"]), unique=True),
    st.booleans(),
)
def test_ordinals_and_outcomes_of_keys_do_not_depend_on_what_is_wanted(names, again, wanted, whole):
    data = members(*names, *again) + (END if whole else b"")

    def outcomes(items):
        return [item for item in summary(items) if item[0] is not None]

    of_all = outcomes(read(data))
    of_some = outcomes(read(data, wanted_fields=wanted))
    assert [(index, key) for index, key, _ in of_some] == [(index, key) for index, key, _ in of_all]
    assert [index for index, _, _ in of_all] == list(range(len(of_all)))
    keys = [key for _, key, what in of_all if what != "duplicate_key"]
    assert sorted(keys) == ["a", "b", "c"]


def test_combinations_of_fields_are_remembered_in_bounded_memory():
    class Endless(io.RawIOBase):
        """Pairs of samples whose fields no other sample has."""

        def __init__(self):
            self.headers = (header(f"{number}.{'f' * 60}{number}", 0) for number in range(3000))

        def read(self, size=-1):
            return next(self.headers, b"")

    tracemalloc.start()
    count = sum(1 for _ in read_samples(Endless(), max_member_bytes=LIMIT))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3001
    assert peak_bytes < 3000 * 500


def test_fields_that_nobody_wants_are_known_by_a_bounded_number_of_names():
    names = ["a.jpg", *(f"a.{'x' * 500}{number}" for number in range(50))]
    (found, *_) = read(members(*names) + END, wanted_fields=["jpg"])
    assert list(found.fields) == ["jpg"]
    assert 0 < len(found.fields.skipped) < 50
    assert all(len(name) <= 64 for name in found.fields.skipped)


@pytest.mark.parametrize("names", [("a.jpg", "a.jpg"), ("a.jpg", "a.JPG")])
def test_the_same_field_twice_fails_the_sample_and_no_other(names):
    items = read(members(*names, "b.txt") + END)
    assert summary(items) == [(0, "a", "duplicate_field"), (1, "b", ["txt"])]


@pytest.mark.parametrize(
    ("member_type", "kind"),
    [
        (tarfile.SYMTYPE, "link"),
        (tarfile.LNKTYPE, "link"),
        (tarfile.FIFOTYPE, "special_file"),
        (tarfile.CHRTYPE, "special_file"),
        (tarfile.BLKTYPE, "special_file"),
        (b"Z", "special_file"),
    ],
)
def test_links_devices_and_pipes_fail_their_sample_and_are_passed_over(member_type, kind):
    special = header("a.jpg", 0, type=member_type, linkname="/etc/passwd")
    items = read(special + members("a.txt", "b.txt") + END)
    assert summary(items) == [(0, "a", kind), (1, "b", ["txt"])]


def test_a_link_that_claims_a_size_has_no_body_to_skip():
    link = header("a.jpg", 4 * BLOCK, type=tarfile.SYMTYPE, linkname="b.jpg")
    assert summary(read(link + members("b.jpg") + END)) == [(0, "a", "link"), (1, "b", ["jpg"])]


def test_a_member_of_a_type_that_nobody_knows_is_skipped_with_its_body():
    unknown = member("a.jpg", b"y" * 700, type=b"Z")
    assert summary(read(unknown + members("b.jpg") + END)) == [(0, "a", "special_file"), (1, "b", ["jpg"])]


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "x/../a.jpg"])
def test_absolute_names_and_names_that_leave_their_folder_are_errors(name):
    items = read(members(name, "b.txt") + END)
    assert summary(items) == [(0, name[:-4], "unsafe_name"), (1, "b", ["txt"])]


def test_a_name_that_is_not_utf8_is_an_error_that_can_be_written():
    items = read(members("caf\udce9.jpg", "b.txt") + END)
    assert summary(items) == [(0, "caf\\xe9", "name_not_utf8"), (1, "b", ["txt"])]
    assert items[0].message.encode()


@pytest.mark.parametrize("name", ["README", ".hidden", "x/.DS_Store", "._a.jpg", "x/._a.jpg"])
def test_a_member_without_a_key_is_an_error_without_a_sample_and_splits_none(name):
    items = read(members("a.jpg", name, "a.txt") + END)
    assert summary(items) == [(None, name, "no_key"), (0, "a", ["jpg", "txt"])]


def test_a_link_without_a_key_is_named_as_a_link():
    items = read(header("latest", 0, type=tarfile.SYMTYPE, linkname="/etc") + END)
    assert summary(items) == [(None, "latest", "link"), (None, None, "no_samples")]


def test_a_member_over_the_limit_fails_its_sample_and_one_at_the_limit_does_not():
    data = member("a.jpg", bytes(LIMIT)) + member("b.jpg", bytes(LIMIT + 1)) + members("b.txt", "c.txt") + END
    assert summary(read(data)) == [(0, "a", ["jpg"]), (1, "b", "member_too_large"), (2, "c", ["txt"])]


def test_an_unwanted_member_may_be_of_any_size():
    data = members("a.jpg") + member("a.pkl", bytes(5 * LIMIT)) + END
    assert summary(read(data, wanted_fields=["jpg"])) == [(0, "a", ["jpg"])]


def test_a_sample_of_too_many_members_fails():
    names = [f"a.{number}" for number in range(MAX_FIELDS_PER_SAMPLE + 1)]
    assert summary(read(members(*names, "b.txt") + END)) == [(0, "a", "too_many_members"), (1, "b", ["txt"])]


@pytest.mark.timeout(240)
def test_a_name_of_extreme_length_is_an_error_and_costs_no_time():
    path = b"/" * 900_000
    record = b"%d path=%s\n" % (len(path) + 13, path)
    items = read(member("p", record, type=tarfile.XHDTYPE) + members("a.txt", "b.txt") + END)
    assert [(item[0], item[2]) for item in summary(items)] == [(None, "name_too_long"), (0, ["txt"])]


@pytest.mark.timeout(240)
def test_names_of_many_folders_cost_no_time():
    path = b"/" * 4080 + b"a"
    record = b"%d path=%s\n" % (len(path) + 11, path)
    hostile = (member("p", record, type=tarfile.XHDTYPE) + member("x", b"")) * 3000
    items = read(hostile + members("a.txt") + END)
    assert [item.kind for item in items[:-1]] == ["no_key"] * 3000
    assert items[-1] == RawSample(0, "a", {"txt": body_of("a.txt")})


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("a\x1b[2Jb.jpg", "a\\x1b[2Jb"),
        ("a\nb.jpg", "a\\x0ab"),
        ("a\0b.jpg", "a\\x00b"),
        ("a\u202egpj.jpg", "a\\u202egpj"),
        ("a\x7f\x9b.jpg", "a\\x7f\\x9b"),
        ("a\u2028b.jpg", "a\\u2028b"),
    ],
)
def test_a_name_with_control_characters_is_an_error_and_reaches_nobody_unescaped(name, escaped):
    value = name.encode()
    record = b" path=" + value + b"\n"
    record = str(len(record) + 2).encode() + record
    data = member("p", record, type=tarfile.XHDTYPE) + members("x") + members("b.txt") + END
    items = read(data)
    assert summary(items) == [(0, escaped, "unsafe_name"), (1, "b", ["txt"])]
    stray = read(member("p", record.replace(b".", b"_"), type=tarfile.XHDTYPE) + members("x") + END)[0]
    row = stray.as_row("shard")
    for text in (row["key"], row["message"]):
        assert text.isprintable()
        assert text.encode()


@pytest.mark.parametrize(
    "name", ["\u72ac/\u3000.jpg", "\U0001f469\u200d\U0001f680.jpg", "a b.jpg", "a\u00a0b.jpg"]
)
def test_names_of_any_script_are_kept_as_they_are(name):
    assert summary(read(members(name) + END)) == [(0, name[:-4], ["jpg"])]


def test_no_more_samples_are_read_than_their_keys_may_be_remembered():
    items = read(members("a.jpg", "b.jpg", "b.txt", "c.jpg", "d.jpg") + END, max_samples=2)
    assert summary(items) == [(0, "a", ["jpg"]), (1, "b", ["jpg", "txt"]), (None, None, "too_many_samples")]


def test_empty_members_cost_a_small_number_of_bytes_each():
    class Endless(io.RawIOBase):
        """3000 samples without any content, made as they are read."""

        def __init__(self):
            self.headers = (header(f"{number}.txt", 0) for number in range(3000))

        def read(self, size=-1):
            assert size >= BLOCK
            return next(self.headers, b"")

    tracemalloc.start()
    count = sum(1 for _ in read_samples(Endless(), max_member_bytes=LIMIT))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3001
    assert peak_bytes < 3000 * 300


# ---------------------------------------------------------------- faults of the archive

WHOLE = members("a.jpg", "a.txt", "b.jpg", "b.txt")


def test_an_archive_cut_at_a_member_boundary_is_distinguished_from_a_whole_one():
    assert summary(read(WHOLE)) == [
        (0, "a", ["jpg", "txt"]),
        (1, "b", ["jpg", "txt"]),
        (None, None, "truncated"),
    ]


def test_one_zero_block_is_not_the_end_of_an_archive():
    assert summary(read(WHOLE + bytes(BLOCK)))[-1] == (None, None, "truncated")
    assert summary(read(WHOLE + bytes(BLOCK + 100)))[-1] == (None, None, "truncated")


def test_an_archive_cut_in_a_header_keeps_what_came_before():
    cut = len(members("a.jpg", "a.txt", "b.jpg")) + 100
    assert summary(read(WHOLE[:cut])) == [
        (0, "a", ["jpg", "txt"]),
        (1, "b", ["jpg"]),
        (None, None, "truncated"),
    ]


@pytest.mark.parametrize("into", [BLOCK, BLOCK + 5])
def test_an_archive_cut_in_a_body_fails_the_sample_it_cuts(into):
    cut = len(members("a.jpg", "a.txt", "b.jpg")) + into
    assert summary(read(WHOLE[:cut])) == [
        (0, "a", ["jpg", "txt"]),
        (1, "b", "truncated"),
        (None, None, "truncated"),
    ]


def test_an_archive_cut_in_a_body_that_nobody_wants_keeps_the_sample():
    cut = len(members("a.jpg", "a.txt", "b.jpg")) + BLOCK + 5
    items = read(WHOLE[:cut], wanted_fields=["jpg"])
    assert summary(items) == [(0, "a", ["jpg"]), (1, "b", ["jpg"]), (None, None, "truncated")]


def test_nothing_after_a_corrupt_header_is_trusted():
    start = len(members("a.jpg", "a.txt"))
    corrupt = WHOLE[:start] + b"?" + WHOLE[start + 1 :] + END
    items = read(corrupt)
    assert summary(items) == [(0, "a", ["jpg", "txt"]), (None, None, "corrupt_header")]
    assert f"byte {start}" in items[-1].message


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "zero_bytes"),
        (b"<!doctype html><html></html>", "not_a_tar"),
        (b"\xff\xd8\xff" + bytes(range(256)) * 20, "not_a_tar"),
        (bz2.compress(WHOLE + END), "compressed"),
        (b"\xfd7zXZ\x00" + bytes(range(256)) * 20, "compressed"),
    ],
)
def test_what_is_no_tar_is_one_error_of_the_shard(data, kind):
    items = read(data)
    assert summary(items) == [(None, None, kind)]
    assert items[0].stage == "open"


SOUND = members("a.jpg", "b.jpg")
UNSOUND = {
    "truncated": SOUND,
    "corrupt_header": SOUND + b"?" * BLOCK + END,
    "compressed": bz2.compress(SOUND + END),
    "not_a_tar": b"<!doctype html>" + bytes(2 * BLOCK),
    "zero_bytes": b"",
    "data_after_end": SOUND + END + members("c.jpg") + END,
    "too_many_samples": SOUND + members("c.jpg") + END,
    "zeros_at_end": SOUND + END + bytes(2**17),
    "no_samples": members("README", "folder/LICENSE", "._a.jpg") + END,
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_an_archive_without_a_sound_end_damages_the_shard_and_says_so_last_and_once(kind):
    *before, last = read(UNSOUND[kind], max_samples=2)
    assert (last.kind, last.sample_index, last.damages_shard) == (kind, None, True)
    assert not any(item.damages_shard for item in before if isinstance(item, SampleError))


def test_a_sample_that_the_end_cuts_off_fails_and_the_shard_is_damaged_besides():
    sample, shard = read(WHOLE[: BLOCK + 3])
    assert [(sample.key, sample.damages_shard), (shard.key, shard.damages_shard)] == [
        ("a", False),
        (None, True),
    ]


def test_faults_of_samples_and_strays_do_not_damage_a_shard():
    too_large = member("d.jpg", bytes(LIMIT + 1))
    link = header("latest", 0, type=tarfile.SYMTYPE, linkname="/etc")
    names = ("a.jpg", "README", "b.jpg", "a.txt", "../c.jpg", "x/._a.jpg", "e.jpg", "e.JPG")
    items = read(members(*names) + too_large + link + END)
    assert len([item for item in items if isinstance(item, SampleError)]) > 5
    assert not any(item.damages_shard for item in items if isinstance(item, SampleError))


def test_a_file_of_zeros_is_no_empty_archive():
    (item,) = read(bytes(2**20))
    assert (item.kind, item.damages_shard) == ("zeros_at_end", True)


@pytest.mark.parametrize("blocks", [0, 18, 126])
def test_an_archive_without_members_or_padded_to_a_record_is_sound(blocks):
    assert read(END + bytes(blocks * BLOCK)) == []
    assert summary(read(members("a.txt") + END + bytes(blocks * BLOCK))) == [(0, "a", ["txt"])]


def test_data_after_the_end_of_the_archive_is_not_passed_over_in_silence():
    second = members("c.txt") + END
    assert summary(read(members("a.txt") + END + bytes(20 * BLOCK) + second)) == [
        (0, "a", ["txt"]),
        (None, None, "data_after_end"),
    ]


@pytest.mark.parametrize(
    "records",
    [b"no length\n", b"0 path=a\n", b"99 path=a.txt\n", b"12 pathatxt\n", b"12 size=1e9\n", b"9999999"],
)
def test_a_pax_header_that_makes_no_sense_ends_the_archive(records):
    data = members("a.txt") + member("p", records, type=tarfile.XHDTYPE) + members("b.txt") + END
    assert summary(read(data)) == [(0, "a", ["txt"]), (None, None, "corrupt_header")]


@pytest.mark.parametrize(
    ("extension_type", "name"), [(tarfile.XHDTYPE, b"14 path=%s\n"), (tarfile.GNUTYPE_LONGNAME, b"%s\0")]
)
def test_two_names_for_one_member_are_an_error_since_what_stood_between_them_is_lost(extension_type, name):
    names = [member("p", name % own, type=extension_type) for own in (b"b.txt", b"c.txt")]
    data = members("a.txt") + b"".join(names) + members("b.txt") + END
    assert summary(read(data)) == [(0, "a", ["txt"]), (None, None, "corrupt_header")]


@pytest.mark.parametrize("extension_type", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_without_a_member_is_an_error(extension_type):
    data = members("a.txt") + member("p", b"13 path=b.txt\n"[1:], type=extension_type) + END
    assert summary(read(data)) == [(0, "a", ["txt"]), (None, None, "corrupt_header")]


def has_gnu_tar() -> bool:
    tar = shutil.which("tar")
    return tar is not None and b"GNU tar" in subprocess.check_output([tar, "--version"])


@pytest.mark.skipif(not has_gnu_tar(), reason="writes sparse members as only GNU tar does")
@pytest.mark.parametrize(
    "options", [["gnu"], *(["posix", "--sparse-version", v] for v in ("0.0", "0.1", "1.0"))]
)
def test_a_sparse_file_fails_its_sample_and_is_skipped_with_its_map(options, tmp_path):
    with (tmp_path / "b.jpg").open("wb") as sparse:
        for extent in range(40):
            sparse.seek(extent * 100_000)
            sparse.write(b"data" * 300)
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_bytes(body_of(name))
    command = ["tar", "--sparse", "--hole-detection=raw", "--format", *options, "-cf", "-"]
    files = ["a.txt", "b.jpg", "b.txt", "c.txt"]
    archive = subprocess.run([*command, *files], cwd=tmp_path, capture_output=True, check=True).stdout
    assert len(archive) < 40 * 100_000
    assert summary(read(archive, max_member_bytes=2**30)) == [
        (0, "a", ["txt"]),
        (1, "b", "sparse"),
        (2, "c", ["txt"]),
    ]


def test_a_sparse_file_that_claims_terabytes_costs_nothing():
    record = b"33 GNU.sparse.size=9999999999999\n"
    sparse = member("p", record, type=tarfile.XHDTYPE) + members("a.jpg")
    assert summary(read(sparse + members("b.txt") + END)) == [(0, "a", "sparse"), (1, "b", ["txt"])]


def test_a_sparse_map_that_is_cut_or_never_ends_is_a_truncated_archive():
    goes_on = bytearray(header("a.jpg", 0, type=tarfile.GNUTYPE_SPARSE))
    goes_on[482] = 1
    checksum = sum(goes_on[:148]) + 8 * 32 + sum(goes_on[156:])
    goes_on[148:156] = b"%06o\0 " % checksum
    endless = b"\1" * BLOCK * 50
    for rest in (b"", b"\1" * 100, endless):
        assert summary(read(bytes(goes_on) + rest))[-1] == (None, None, "truncated")


@pytest.mark.parametrize("kind", ["member", "extension"])
def test_a_header_that_claims_gigabytes_costs_no_memory(kind):
    attributes = {"type": tarfile.XHDTYPE} if kind == "extension" else {}
    data = header("a.jpg", 7 * 2**30, **attributes) + b"little"
    tracemalloc.start()
    items = read(data, max_member_bytes=2**40)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert items
    assert all(isinstance(item, SampleError) for item in items)
    assert peak_bytes < 5 * 2**20


def test_samples_are_held_one_at_a_time():
    class Endless(io.RawIOBase):
        """2000 samples of 100 kB, made as they are read."""

        def __init__(self):
            self.pieces = (member(f"{number}.jpg", bytes(100_000)) for number in range(2000))
            self.buffer = b""

        def read(self, size=-1):
            if not self.buffer:
                self.buffer = next(self.pieces, b"")
            piece, self.buffer = self.buffer[:size], self.buffer[size:]
            return piece

    tracemalloc.start()
    count = sum(1 for _ in read_samples(Endless(), max_member_bytes=2**20))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 2001
    assert peak_bytes < 5 * 2**20


def test_a_broken_connection_is_raised_and_not_blamed_on_the_data():
    class Cut(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 2 * BLOCK:
                raise ConnectionResetError("connection reset by peer")
            return super().read(size)

    items = read_samples(Cut(members("a.jpg", "b.jpg", "c.jpg") + END), max_member_bytes=LIMIT)
    assert next(items) == RawSample(0, "a", {"jpg": body_of("a.jpg")})
    with pytest.raises(ConnectionResetError):
        list(items)


# ---------------------------------------------------------------- properties

names_in_shards = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "", "x/", "y/"]),
    st.sampled_from("abcdef"),
    st.sampled_from(["jpg", "JPG", "txt", "json", "seg.png"]),
)
members_of_shards = st.one_of(
    st.builds(lambda name: member(name, body_of(name)), names_in_shards),
    st.builds(lambda name: header(name, 0, type=tarfile.SYMTYPE, linkname="a.jpg"), names_in_shards),
    st.sampled_from([members("README"), members("../a.jpg"), member("x", b"", type=tarfile.DIRTYPE)]),
    st.builds(lambda name: member(name, bytes(LIMIT + 1)), names_in_shards),
)


def check_invariants(items: list[RawSample | SampleError]) -> None:
    outcomes = [item for item in items if isinstance(item, RawSample) or item.sample_index is not None]
    ordinals = [item.index if isinstance(item, RawSample) else item.sample_index for item in outcomes]
    assert ordinals == list(range(len(outcomes)))
    samples = [item for item in items if isinstance(item, RawSample)]
    assert len({item.key for item in samples}) == len(samples)
    for sample in samples:
        for field, content in sample.fields.items():
            assert content.decode().lower() == f"content of {sample.key}.{field}"


@settings(deadline=None, max_examples=300)
@given(st.text("ab./_\u00e9", min_size=1, max_size=12))
def test_members_are_grouped_by_the_rule_of_webdataset(name):
    key, extension = base_plus_ext(name)
    # where that rule takes a hidden file for an extension of its folder, there is no sample
    expected = [] if not key or key.endswith("/") else [(key, extension.lower())]
    items = read(members(name) + END)
    if expected and items and getattr(items[0], "kind", None) == "unsafe_name":
        assert items[0].key == key
    elif not name.startswith("__"):
        found = [(item.key, field) for item in items if isinstance(item, RawSample) for field in item.fields]
        assert found == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "x/", "y/"]), st.integers(0, 999)), unique=True), st.data())
def test_every_well_formed_shard_gives_back_what_was_put_in(folders_and_numbers, data):
    extensions = st.sets(st.sampled_from(["jpg", "txt", "json", "seg.png"]), min_size=1)
    keys = {f"{folder}{number}": sorted(data.draw(extensions)) for folder, number in folders_and_numbers}
    shard = members(*(f"{key}.{extension}" for key, chosen in keys.items() for extension in chosen)) + END
    assert read(shard) == [
        RawSample(index, key, {extension: body_of(f"{key}.{extension}") for extension in chosen})
        for index, (key, chosen) in enumerate(keys.items())
    ]


@settings(deadline=None, max_examples=300)
@given(st.lists(members_of_shards, max_size=12), st.data())
def test_whatever_is_wrong_every_sample_has_one_outcome_and_its_own_bytes(parts, data):
    shard = b"".join(parts) + END
    cut = data.draw(st.none() | st.integers(0, len(shard)))
    items = read(shard[:cut])
    check_invariants(items)
    is_damaged = any(
        item.kind in ("truncated", "zero_bytes", "not_a_tar")
        for item in items
        if isinstance(item, SampleError)
    )
    assert is_damaged == (cut is not None and cut < len(shard))
    if cut is None:
        assert len(items) >= len({part for part in parts if b"README" in part[:100]})


@settings(deadline=None, max_examples=200)
@given(st.lists(members_of_shards, min_size=1, max_size=12), st.data())
def test_a_changed_byte_in_a_header_is_found_or_harmless(parts, data):
    damaged_part = data.draw(st.integers(0, len(parts) - 1))
    position = sum(map(len, parts[:damaged_part])) + data.draw(st.integers(0, BLOCK - 1))
    shard = bytearray(b"".join(parts) + END)
    whole = read(bytes(shard))
    shard[position] = (shard[position] + data.draw(st.integers(1, 255))) % 256
    items = read(bytes(shard))
    check_invariants(items)
    if items != whole:
        assert items[-1].kind in ("corrupt_header", "not_a_tar", "compressed")


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=3000))
def test_arbitrary_bytes_never_raise(data):
    check_invariants(read(data))
    check_invariants(read(members("a.jpg") + data))
