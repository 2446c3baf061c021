"""Tars compressed with gzip and zstd are read as they are; one that is cut or hostile is a damaged shard."""

import bz2
import gzip
import io
import lzma
import random
import shutil
import subprocess
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import ShardError
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import read_samples
from tests.pipeline.test_shards import END, member, members, read, summary

PLAIN = members("a.jpg", "a.txt", "b.jpg", "b.txt", "c.jpg", "c.txt") + END
# bytes that nothing compresses, so that a cut of the compressed file is a cut in the middle of the tar
NOISE = b"".join(member(f"{key}.jpg", random.Random(key).randbytes(900)) for key in "abcdefgh") + END
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


COMPRESS = {"gzip": gzip.compress, "zstd": zstd}
needs_zstd = pytest.mark.skipif(shutil.which("zstd") is None, reason="the program zstd is not installed")
compressions = pytest.mark.parametrize("name", COMPRESS)


def last_kind(data: bytes) -> str:
    last = read(data)[-1]
    assert isinstance(last, SampleError)
    assert last.damages_shard
    return last.kind


@compressions
def test_a_compressed_tar_gives_the_samples_of_the_plain_one(name):
    assert read(COMPRESS[name](PLAIN)) == read(PLAIN)


@compressions
def test_parts_compressed_one_by_one_are_one_tar(name):
    compress = COMPRESS[name]
    assert read(
        b"".join(compress(PLAIN[start : start + 700]) for start in range(0, len(PLAIN), 700))
    ) == read(PLAIN)


def test_frames_of_zstd_that_decoders_skip_are_skipped():
    assert read(SKIPPABLE_FRAME + zstd(PLAIN)) == read(PLAIN)
    assert read(zstd(PLAIN) + SKIPPABLE_FRAME) == read(PLAIN)


@pytest.mark.parametrize("command", ["gzip -9", pytest.param("zstd -19", marks=needs_zstd)])
def test_what_the_usual_programs_write_is_read(command):
    done = subprocess.run(command.split(), input=PLAIN, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read(done.stdout) == read(PLAIN)


@compressions
def test_a_source_that_gives_single_bytes_is_read(name):
    class Slow(io.BytesIO):
        def read(self, size=-1, /):
            return super().read(min(size, 1))

    assert list(read_samples(Slow(COMPRESS[name](PLAIN)), max_member_bytes=1000)) == read(PLAIN)


def test_a_tar_whose_first_name_looks_like_a_compression_is_a_plain_tar():
    plain = members("BZh.jpg", "PAR1.jpg") + END
    assert summary(read(plain)) == [(0, "BZh", ["jpg"]), (1, "PAR1", ["jpg"])]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(COMPRESS)), st.floats(0, 1, exclude_max=True))
def test_a_cut_keeps_the_samples_before_it_and_damages_the_shard(name, share):
    whole = COMPRESS[name](NOISE)
    *samples, last = read(whole[: int(share * len(whole))])
    assert last.damages_shard
    assert last.kind in ("truncated", "zero_bytes", "not_a_tar")
    for index, sample in enumerate(item for item in samples if not isinstance(item, SampleError)):
        assert sample == read(NOISE)[index]


def test_samples_before_a_cut_are_kept():
    whole = gzip.compress(NOISE)
    kept = [item for item in read(whole[: len(whole) // 2]) if not isinstance(item, SampleError)]
    assert len(kept) >= 3


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(COMPRESS)), st.data())
def test_changed_bytes_never_raise_and_never_change_a_sample_in_silence(name, data):
    packed = bytearray(COMPRESS[name](NOISE))
    packed[data.draw(st.integers(4, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    items = read(bytes(packed))
    # zstd as pyarrow writes it has no checksum, as a plain tar has none
    if name == "gzip" and items != read(NOISE):
        assert items[-1].damages_shard


@compressions
@pytest.mark.parametrize("rest", [b"more", bytes(100)], ids=["text", "zeros"])
def test_other_data_after_the_end_damage_the_shard_and_lose_no_sample(name, rest):
    *samples, last = read(COMPRESS[name](PLAIN) + rest)
    assert samples == read(PLAIN)
    assert last.damages_shard
    assert last.kind in ("corrupt_compression", "truncated")


def test_a_wrong_checksum_of_gzip_damages_the_shard():
    packed = bytearray(gzip.compress(NOISE))
    packed[-8] ^= 1
    assert last_kind(bytes(packed)) == "corrupt_compression"


@compressions
def test_a_bomb_is_left_after_the_limit(name):
    bomb = member("a.jpg", bytes(80 << 20))
    packed = COMPRESS[name](bomb + END)
    assert len(packed) < 1 << 20
    tracemalloc.start()
    items = read(packed)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert items[-1].kind == "expands_too_much"
    assert items[-1].damages_shard
    assert peak_bytes < 32 << 20


@needs_zstd
@pytest.mark.parametrize(("log2_bytes", "is_read"), [(27, True), (28, False)])
def test_a_window_of_zstd_takes_128_mib_at_most(log2_bytes, is_read):
    command = ["zstd", "-q", "--ultra", f"--long={log2_bytes}"]
    items = read(subprocess.run(command, input=PLAIN, capture_output=True, check=True).stdout)
    if is_read:
        assert items == read(PLAIN)
    else:
        assert summary(items) == [(None, None, "compressed")]
        assert "--long=28" in items[0].message


@compressions
def test_a_small_shard_may_expand_by_any_factor(name):
    captions = b"".join(member(f"{index}.txt", b"a dog " * 100) for index in range(2000)) + END
    packed = COMPRESS[name](captions)
    assert len(captions) > 100 * len(packed)
    assert len(read(packed)) == 2000


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (bz2.compress(PLAIN), "bzip2"),
        (lzma.compress(PLAIN), "xz"),
        (pa.Codec("lz4").compress(PLAIN, asbytes=True), "lz4"),
        (gzip.compress(zstd(PLAIN)), "zstd"),
        (zstd(gzip.compress(PLAIN)), "gzip"),
    ],
    ids=["bzip2", "xz", "lz4", "zstd in gzip", "gzip in zstd"],
)
def test_other_compressions_are_named_with_those_that_are_read(data, name):
    (error,) = read(data)
    assert (error.stage, error.kind, error.damages_shard) == ("open", "compressed", True)
    assert f"compressed with {name};" in error.message
    assert "gzip or zstd" in error.message


def test_a_parquet_file_is_named_with_the_command_that_converts_it():
    (error,) = read(b"PAR1" + bytes(range(256)) * 9 + b"PAR1")
    assert (error.kind, error.damages_shard) == ("not_a_tar", True)
    assert "legrad shards parquet FILES DEST --image IMAGE --caption CAPTION" in error.message


@compressions
@pytest.mark.parametrize("failure", [ShardError("connection lost"), OSError("Truncated by the network")])
def test_a_source_that_fails_is_not_blamed_on_the_data(name, failure):
    packed = COMPRESS[name](NOISE)

    class Failing(io.BytesIO):
        def read(self, size=-1, /):
            if self.tell() >= len(packed) // 2:
                raise failure
            return super().read(min(size, 100))

    with pytest.raises(type(failure), match=str(failure)):
        list(read_samples(Failing(packed), max_member_bytes=1000))


@compressions
def test_a_file_is_read_to_its_end_although_its_data_are_damaged(name):
    packed = COMPRESS[name](NOISE)[:3000] + b"?" * 200_000
    stream = io.BytesIO(packed)

    assert list(read_samples(stream, max_member_bytes=1000))[-1].damages_shard
    assert stream.tell() == len(packed)


@compressions
@pytest.mark.usefixtures("only_loopback")
def test_a_compressed_shard_is_read_from_a_store(name, store):
    packed = COMPRESS[name](NOISE)
    bucket = f"compressed-{name}"
    store.ask("PUT", bucket)
    store.put(f"{bucket}/0.tar.packed", packed)
    endpoint = store.endpoint.removeprefix("http://")
    (shard,) = storage.list_shards(f"s3://{bucket}/*.packed?scheme=http&endpoint_override={endpoint}")
    with storage.open_shard(shard) as opened:
        stream = storage.DigestingStream(opened)
        assert list(read_samples(stream, max_member_bytes=1000)) == read(NOISE)
    assert stream.bytes_read == len(packed), "the digest is that of the file as it is stored"
