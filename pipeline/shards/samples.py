"""Group the members of a tar into samples, in bounded memory; each kind of fault is a distinct error."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from pipeline.shards.compression import decompressed
from pipeline.shards.sample_error import SampleError
from pipeline.shards.tar import PIECE_BYTES, Archive, ByteSource, DamageError, Member
from pipeline.text import printable

MAX_FIELDS_PER_SAMPLE = 64
# the longest path of common systems
MAX_NAME_CHARACTERS = 4096
# the digests of their keys take about 700 MB
MAX_SAMPLES = 2**22

# names kept of fields that are not wanted, for the message about a missing one
MAX_SKIPPED_NAMES = 16
# combinations of field names that are remembered: shards have a few, and a hostile one cannot fill memory
MAX_COMBINATIONS = 2**10
MAX_FIELD_CHARACTERS = 64

# webdataset's own rule for members that describe the archive, such as those in a folder __index__
_ABOUT_THE_ARCHIVE = re.compile(r"__[^/]*__($|/)")


class SampleFields(dict[str, bytes]):
    """The bytes of a sample's fields, and the names of some that were skipped unread.

    Attributes:
        skipped: at most MAX_SKIPPED_NAMES names, as far as MAX_FIELD_CHARACTERS.
    """

    def __init__(self, fields: Iterable[tuple[str, bytes]] = (), skipped: Iterable[str] = ()) -> None:
        super().__init__(fields)
        self.skipped = list(skipped)

    def skip(self, name: str) -> None:
        """Remember the name of a field that is not read."""
        if len(self.skipped) < MAX_SKIPPED_NAMES:
            self.skipped.append(name[:MAX_FIELD_CHARACTERS])


@dataclass(frozen=True)
class RawSample:
    """The bytes of one sample, unchecked.

    Attributes:
        index: ordinal of the sample in its shard, failed samples counted.
        key: the members' common name, folders included, up to the first dot of the base name.
        fields: what follows that dot, in lower case, and the member's bytes.
        shard: canonical URL of the shard, for readers that need it; otherwise empty.
    """

    index: int
    key: str
    fields: SampleFields
    shard: str = ""


def read_samples(
    stream: ByteSource,
    *,
    max_member_bytes: int,
    wanted_fields: Collection[str] | None = None,
    max_samples: int = MAX_SAMPLES,
) -> Iterator[RawSample | SampleError]:
    """Read the samples of a tar, one at a time.

    Args:
        stream: the tar as it is stored, uncompressed or compressed with gzip or zstd; read forward only.
        max_member_bytes: a sample with a larger wanted member fails.
        wanted_fields: which fields to keep, in any case; None keeps all. Others are skipped unread. Ordinals
            do not depend on it.
        max_samples: nothing is read after so many different keys, for they are remembered.

    Returns:
        An iterator that yields, for each ordinal from 0 upwards, either the sample or the one error that
        makes it unusable; and between them, with `sample_index` None, errors that belong to no sample. The
        last item, and no other, has `damages_shard` where the archive was not read to a sound end, or has
        members of which none belongs to a sample.

    Raises:
        OSError, ShardError: whatever the stream raises itself; a broken connection is not the data's fault.
    """
    wanted = None if wanted_fields is None else frozenset(field.lower() for field in wanted_fields)
    archive = Archive(decompressed(stream))
    keys = _Keys(max_samples)
    group: _Group | None = None
    damage: DamageError | None = None
    strays = 0
    try:
        for member in archive.members():
            key, extension = _key_and_extension(member.name)
            if not key:
                strays += 1
                yield replace(_stray(member), read_before=keys.index_after(group))
                continue
            if group is None or key != group.key:
                finished, group = group, None
                yield from keys.outcome(finished)
                group = keys.group(key)
            field = extension.lower()
            if wanted is None or field in wanted:
                group.take(member, field, archive, max_member_bytes)
            else:
                group.skip(field)
    except DamageError as error:
        # a source that failed raises at its end, and then the data is not to blame
        while stream.read(PIECE_BYTES):
            pass
        damage = error
    yield from keys.outcome(group)
    yield from keys.apart()
    if damage is None and strays and group is None:
        message = f"none of the archive's {strays} members belongs to a sample"
        damage = DamageError("no_samples", message)
    if damage is not None:
        yield SampleError(damage.stage, damage.kind, damage.message, damages_shard=True)


class _Keys:
    """Remembers the keys of a shard, and decides about members whose key was seen before.

    Such members with other fields than before are the rest of a sample that was yielded without them: they
    have no ordinal of their own, so the sample counts once. With a field seen before they are another sample.
    """

    def __init__(self, max_samples: int) -> None:
        self._max_samples = max_samples
        # digests, so that memory stays small however long the names are
        self._fields: dict[bytes, frozenset[str] | None] = {}
        self._combinations: dict[frozenset[str], frozenset[str]] = {}
        self._next_index = 0
        self._parts_apart = 0
        self._first_apart = ""

    def group(self, key: str) -> _Group:
        """Start a group for the members of a key; raises DamageError where there are too many keys."""
        if _digest(key) in self._fields:
            return _Group(key, None, None)
        if len(self._fields) == self._max_samples:
            message = (
                f"the shard has more samples than the limit of {self._max_samples}; the rest is not read"
            )
            raise DamageError("too_many_samples", message)
        self._next_index += 1
        return _Group(key, self._next_index - 1, _problem_of_key(key))

    def index_after(self, group: _Group | None) -> int:
        """Return the ordinal of the next sample that is yielded, given the group that is being read."""
        return self._next_index if group is None or group.index is None else group.index

    def outcome(self, group: _Group | None) -> Iterator[RawSample | SampleError]:
        """Yield the sample of a complete group, or its error; nothing for the rest of a sample."""
        if group is None:
            return
        digest, names = _digest(group.key), self._combination(group.names)
        if group.index is not None:
            self._fields[digest] = names
            yield group.outcome(group.index)
            return
        before = self._fields[digest]
        if before is None or names is None or before & names:
            message = (
                "the key came before, with a field of the same name and other samples in between; keys must "
                "differ, and members of a sample must be adjacent (tar --sort=name)"
            )
            self._next_index += 1
            yield SampleError("read", "duplicate_key", message, printable(group.key), self._next_index - 1)
            return
        self._fields[digest] = self._combination(before | names)
        if group.has_wanted:
            self._first_apart = self._first_apart or group.key
            self._parts_apart += 1

    def apart(self) -> Iterator[SampleError]:
        """Yield one error for all members that came too late for their samples."""
        if self._parts_apart:
            message = (
                f"members came after those of other samples {self._parts_apart} time(s) in this shard, and "
                "were not read; a sample's members must be adjacent: write the tar with `tar --sort=name`"
            )
            yield SampleError("read", "members_apart", message, printable(self._first_apart))

    def _combination(self, names: frozenset[str]) -> frozenset[str] | None:
        """Return one object for equal sets; None where they are too many or too long to be remembered."""
        known = self._combinations.get(names)
        if known is not None:
            return known
        if len(self._combinations) == MAX_COMBINATIONS or len(names) > MAX_FIELDS_PER_SAMPLE:
            return None
        if any(len(name) > MAX_FIELD_CHARACTERS for name in names):
            return None
        return self._combinations.setdefault(names, names)


class _Group:
    """The consecutive members of one key.

    Attributes:
        key: key of the members.
        index: ordinal of the sample; None where the key was seen before, and nothing is read.
        has_wanted: whether any of their fields is wanted.
    """

    def __init__(self, key: str, index: int | None, failure: tuple[str, str] | None) -> None:
        self.key, self.index = key, index
        self.has_wanted = False
        self._fields = SampleFields()
        self._names: set[str] = set()
        self._failure = failure

    @property
    def names(self) -> frozenset[str]:
        """Fields of all members, also of those that are not read."""
        return frozenset(self._names)

    def skip(self, field: str) -> None:
        """Record a member whose field is not wanted."""
        self._add_name(field)
        self._fields.skip(field)

    def take(self, member: Member, field: str, archive: Archive, max_member_bytes: int) -> None:
        """Read a member's bytes into its field, unless the sample has failed."""
        self._add_name(field)
        self.has_wanted = True
        if self.index is None:
            return
        self._failure = self._failure or self._problem_of_member(member, field, max_member_bytes)
        if self._failure is None:
            try:
                self._fields[field] = archive.read_body()
            except DamageError as damage:
                self._failure = (damage.kind, f"{printable(member.name)}: {damage.message}")
                raise

    def outcome(self, index: int) -> RawSample | SampleError:
        """Return the sample, or the error that makes it unusable."""
        if self._failure is None:
            return RawSample(index, self.key, self._fields)
        kind, message = self._failure
        return SampleError("read", kind, message, printable(self.key), index)

    def _add_name(self, field: str) -> None:
        # one more than is remembered, so that too many are known as such
        if len(self._names) <= MAX_FIELDS_PER_SAMPLE:
            self._names.add(field[: MAX_FIELD_CHARACTERS + 1])

    def _problem_of_member(self, member: Member, field: str, max_member_bytes: int) -> tuple[str, str] | None:
        name = printable(member.name)
        if member.oddity is not None:
            kind, what = member.oddity
            return kind, f"{name} is {what}, and only regular files are read"
        if field in self._fields:
            return "duplicate_field", f"{name}: the sample already has a field {field!r}"
        if member.size_bytes > max_member_bytes:
            sizes = f"{member.size_bytes} bytes; the limit is {max_member_bytes}"
            return "member_too_large", f"{name} has {sizes}"
        if len(self._fields) >= MAX_FIELDS_PER_SAMPLE:
            return (
                "too_many_members",
                f"the sample has more members than the limit of {MAX_FIELDS_PER_SAMPLE}",
            )
        return None


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _key_and_extension(name: str) -> tuple[str | None, str]:
    """Split a name at the first dot of its base name; the key is None where it belongs to no sample.

    Source: webdataset's rule, without its pattern, which takes quadratic time on a name of many folders; and
        a hidden file in a folder (x/._a.jpg) has no key here, where it would be one of the folder's name.
    """
    if len(name) > MAX_NAME_CHARACTERS or _ABOUT_THE_ARCHIVE.match(name):
        return None, ""
    folder, slash, base_name = name.rpartition("/")
    stem, dot, extension = base_name.partition(".")
    return (folder + slash + stem, extension) if stem and dot else (None, "")


def _stray(member: Member) -> SampleError:
    name = printable(member.name[:MAX_NAME_CHARACTERS])
    if len(member.name) > MAX_NAME_CHARACTERS:
        message = f"a member's name has {len(member.name)} characters; the limit is {MAX_NAME_CHARACTERS}"
        return SampleError("read", "name_too_long", message, name)
    if member.oddity is not None:
        kind, what = member.oddity
        return SampleError("read", kind, f"{name} is {what}, and only regular files are read", name)
    if _ABOUT_THE_ARCHIVE.match(member.name):
        return SampleError("read", "no_key", f"{name} describes the archive and belongs to no sample", name)
    return SampleError("read", "no_key", f"{name} has no extension, so it belongs to no sample", name)


def _problem_of_key(key: str) -> tuple[str, str] | None:
    if key.startswith("/") or ".." in key.split("/"):
        return "unsafe_name", "the name is an absolute path or leads out of its folder"
    if any("\ud800" <= character <= "\udfff" for character in key):
        return "name_not_utf8", "the name is not UTF-8, so no row could contain it"
    if key != printable(key):
        return "unsafe_name", "the name contains control characters"
    return None
