"""Generated archives damaged at random places: what is read is right, and what is not read is reported."""

import hashlib
import io
import tarfile
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, read_samples

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
FIELDS = ("jpg", "txt", "json", "seg.png")


@dataclass(frozen=True)
class Body:
    """Where the bytes of one member lie."""

    key: str
    field: str
    start: int
    stop: int


@dataclass(frozen=True)
class Written:
    """An archive by the standard library, and what was put in."""

    data: bytes
    bodies: tuple[Body, ...]
    keys: tuple[str, ...]

    def end_of(self, key: str) -> int:
        return max(body.stop for body in self.bodies if body.key == key)


def key_of(number: int, style: str) -> str:
    """Keys so different that a few changed bytes make none of them into another."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()[:24]
    return {"plain": digest, "folders": f"{digest[:8]}/v1.5/{digest}", "long": f"{'n' * 130}/{digest}"}[style]


def write(samples: list[tuple[int, str, list[str], int]], tar_format: int) -> Written:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tar_format) as tar:
        for number, style, fields, size in samples:
            for field in fields:
                name = f"{key_of(number, style)}.{field}"
                content = (hashlib.sha256(name.encode()).digest() * (1 + size // 32))[: 20 + size]
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(sink.getvalue())) as tar:
        bodies = tuple(
            Body(*_split(member.name), member.offset_data, member.offset_data + member.size) for member in tar
        )
    return Written(sink.getvalue(), bodies, tuple(dict.fromkeys(body.key for body in bodies)))


def _split(name: str) -> tuple[str, str]:
    field = next(field for field in sorted(FIELDS, key=len, reverse=True) if name.endswith(f".{field}"))
    return name.removesuffix(f".{field}"), field


archives = st.builds(
    write,
    st.lists(
        st.tuples(
            st.integers(0, 10**6),
            st.sampled_from(["plain", "folders", "long"]),
            st.lists(st.sampled_from(FIELDS), min_size=1, unique=True),
            st.integers(0, 1500),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda sample: sample[0],
    ),
    st.sampled_from(FORMATS),
)


def read(data: bytes) -> tuple[list[RawSample], list[SampleError]]:
    items = list(read_samples(io.BytesIO(data), max_member_bytes=10**6))
    outcomes = [item for item in items if isinstance(item, RawSample) or item.sample_index is not None]
    ordinals = [item.index if isinstance(item, RawSample) else item.sample_index for item in outcomes]
    assert ordinals == list(range(len(outcomes))), "every sample has one outcome, in order"
    errors = [item for item in items if isinstance(item, SampleError)]
    assert all(error.as_row("shard")["message"].encode() for error in errors)
    return [item for item in items if isinstance(item, RawSample)], errors


def check_pairing(samples: list[RawSample], written: Written, data: bytes) -> None:
    """All of a sample's fields lie in one sample of the archive, whatever its name became."""
    for sample in samples:
        # by content alone, which differs from body to body: damage may have changed the field's name too
        found = [
            {body.key for body in written.bodies if data[body.start : body.stop] == content}
            for content in sample.fields.values()
        ]
        owners = [keys for keys in found if keys]
        assert not owners or set.intersection(*owners), sample.key
    assert len({sample.key for sample in samples}) == len(samples)


@settings(deadline=None, max_examples=60)
@given(archives)
def test_an_archive_as_written_gives_back_every_sample(written):
    samples, errors = read(written.data)
    assert (errors, [sample.key for sample in samples]) == ([], list(written.keys))
    check_pairing(samples, written, written.data)


@settings(deadline=None, max_examples=120)
@given(archives, st.data())
def test_an_archive_cut_anywhere_loses_only_what_was_cut_off_and_says_so(written, data):
    # the standard library fills up with more than the two blocks that mark the end
    end = max(-(-body.stop // 512) * 512 for body in written.bodies) + 1024
    cut = data.draw(st.integers(0, end - 1))
    samples, errors = read(written.data[:cut])
    assert [error.kind for error in errors if error.sample_index is None] != []
    before = [key for key in written.keys if written.end_of(key) <= cut]
    assert [sample.key for sample in samples][: len(before)] == before
    check_pairing(samples, written, written.data[:cut])
    whole = {(body.key, body.field): written.data[body.start : body.stop] for body in written.bodies}
    for sample in samples:
        assert all(whole[sample.key, field] == content for field, content in sample.fields.items())


def long_names(written):
    """Where names are that take a block of their own, which no checksum covers: first byte, and the end."""
    for key in written.keys:
        name = key.encode()
        start = written.data.find(name) if len(name) > 100 else -1
        while start >= 0:
            yield start, start + len(name) + len(".seg.png")
            start = written.data.find(name, start + 1)


# where in an archive something is overwritten, as a share of its bytes, and by what
places = st.floats(0, 1, exclude_max=True)
junks = st.binary(min_size=1, max_size=8) | st.integers(1, 1200).map(bytes)


@settings(deadline=None, max_examples=250)
@given(archives, st.lists(st.tuples(places, junks), min_size=1, max_size=3))
def test_overwritten_bytes_anywhere_never_pair_wrongly_and_never_lose_a_sample_in_silence(written, blows):
    damaged = bytearray(written.data)
    first = len(damaged)
    is_renamed = False
    for place, junk in blows:
        start = int(place * len(damaged))
        is_renamed |= any(start < stop and start + len(junk) > begin for begin, stop in long_names(written))
        damaged[start : start + len(junk)] = junk[: len(damaged) - start]
        first = min(first, start)
    samples, errors = read(bytes(damaged))
    check_pairing(samples, written, bytes(damaged))
    before = [key for key in written.keys if written.end_of(key) <= first]
    assert [sample.key for sample in samples][: len(before)] == before
    # what is zeros to its end ended before, perhaps at once; and no checksum covers a long name
    is_erased = any(not any(damaged[body.start - 512 :]) for body in written.bodies)
    if not errors and not is_erased and not is_renamed:
        assert len(samples) == len(written.keys)
        assert sum(len(sample.fields) for sample in samples) == len(written.bodies)


@settings(deadline=None, max_examples=80)
@given(archives, st.data())
def test_members_in_any_order_are_paired_only_where_they_are_together(written, data):
    shuffled = data.draw(st.permutations(written.bodies))
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=data.draw(st.sampled_from(FORMATS))) as tar:
        for body in shuffled:
            info = tarfile.TarInfo(f"{body.key}.{body.field}")
            info.size = body.stop - body.start
            tar.addfile(info, io.BytesIO(written.data[body.start : body.stop]))
    samples, errors = read(sink.getvalue())
    runs = [body.key for i, body in enumerate(shuffled) if i == 0 or shuffled[i - 1].key != body.key]
    assert [sample.key for sample in samples] == list(dict.fromkeys(runs))
    apart = len(runs) - len(samples)
    assert [(error.kind, error.sample_index) for error in errors] == [("members_apart", None)][:apart]
    assert not errors or f" {apart} time(s)" in errors[0].message
    for sample in samples:
        for field, content in sample.fields.items():
            (body,) = (body for body in written.bodies if (body.key, body.field) == (sample.key, field))
            assert content == written.data[body.start : body.stop]
