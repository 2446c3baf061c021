"""From a tar's members to samples, in bounded memory: every bad case told apart, never a wrong pairing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pipeline.archive import Archive, ByteSource, DamageError, Member
from pipeline.records import SampleError, printable

MAX_FIELDS_PER_SAMPLE = 64
# the longest path of common systems
MAX_NAME_CHARACTERS = 4096
# the digests of their keys take about 700 MB
MAX_SAMPLES = 2**22

# webdataset's own rule for members that describe the archive, such as what lies in a folder __index__
_ABOUT_THE_ARCHIVE = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class RawSample:
    """The bytes of one sample; nothing in them has been looked at.

    Attributes:
        index: ordinal of the sample in its shard, failed samples counted.
        key: the members' common name, folders included, up to the first dot of the base name.
        fields: what follows that dot, in lower case, and the member's bytes.
    """

    index: int
    key: str
    fields: dict[str, bytes]


def read_samples(
    stream: ByteSource,
    *,
    max_member_bytes: int,
    wanted_fields: Collection[str] | None = None,
    max_samples: int = MAX_SAMPLES,
) -> Iterator[RawSample | SampleError]:
    """Read the samples of an uncompressed tar, one at a time.

    Args:
        stream: read forward only, never sought.
        max_member_bytes: a sample with a larger wanted member fails.
        wanted_fields: which fields to keep, in any case; None keeps all. Others are skipped unread.
        max_samples: nothing is read after so many, for their keys are remembered.

    Returns:
        An iterator that yields, for each ordinal from 0 upwards, either the sample or the one error that
        makes it unusable; and between them, with `sample_index` None, errors that belong to no sample. The
        last item, and no other, has `damages_shard` where the archive was not read to a sound end.

    Raises:
        OSError, ShardError: whatever the stream raises itself; a broken connection is not the data's fault.
    """
    wanted = None if wanted_fields is None else frozenset(field.lower() for field in wanted_fields)
    archive = Archive(stream)
    seen_keys: set[bytes] = set()
    group: _Group | None = None
    damage: DamageError | None = None
    try:
        for member in archive.members():
            key, extension = _key_and_extension(member.name)
            if not key:
                yield _stray(member)
                continue
            if group is None or key != group.key:
                following = _next_group(group, key, seen_keys, max_samples)
                if group is not None:
                    yield group.outcome()
                group = following
            field = extension.lower()
            if wanted is None or field in wanted:
                group.take(member, field, archive, max_member_bytes)
    except DamageError as error:
        # a source that failed says so at its end, and then the data is not to blame
        archive.read_to_end()
        damage = error
    if group is not None:
        yield group.outcome()
    if damage is not None:
        yield SampleError(damage.stage, damage.kind, damage.message, damages_shard=True)


class _Group:
    """The consecutive members of one key."""

    def __init__(self, index: int, key: str, failure: tuple[str, str] | None) -> None:
        self.index, self.key = index, key
        self._fields: dict[str, bytes] = {}
        self._failure = failure

    def take(self, member: Member, field: str, archive: Archive, max_member_bytes: int) -> None:
        """Read a member's bytes into its field, unless the sample has failed."""
        self._failure = self._failure or self._problem_of_member(member, field, max_member_bytes)
        if self._failure is None:
            try:
                self._fields[field] = archive.read_body()
            except DamageError as damage:
                self._failure = (damage.kind, f"{printable(member.name)}: {damage.message}")
                raise

    def outcome(self) -> RawSample | SampleError:
        """The sample, or what makes it unusable."""
        if self._failure is None:
            return RawSample(self.index, self.key, self._fields)
        kind, message = self._failure
        return SampleError("read", kind, message, printable(self.key), self.index)

    def _problem_of_member(self, member: Member, field: str, max_member_bytes: int) -> tuple[str, str] | None:
        name = printable(member.name)
        if member.oddity is not None:
            kind, what = member.oddity
            return kind, f"{name} is {what}, and only regular files are read"
        if field in self._fields:
            return "duplicate_field", f"{name}: the sample has a field {field!r} already"
        if member.size_bytes > max_member_bytes:
            sizes = f"{member.size_bytes} bytes, allowed are {max_member_bytes}"
            return "member_too_large", f"{name} has {sizes}"
        if len(self._fields) >= MAX_FIELDS_PER_SAMPLE:
            return "too_many_members", f"the sample has more than {MAX_FIELDS_PER_SAMPLE} members"
        return None


def _next_group(before: _Group | None, key: str, seen_keys: set[bytes], max_samples: int) -> _Group:
    index = 0 if before is None else before.index + 1
    if index == max_samples:
        message = f"the shard has more than {max_samples} samples; what follows is not read"
        raise DamageError("too_many_samples", message)
    # digests, so that memory stays small however long the names are
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    failure = _problem_of_key(key)
    if digest in seen_keys:
        message = "the key came before, with other samples in between; its members are not joined"
        failure = ("duplicate_key", message)
    seen_keys.add(digest)
    return _Group(index, key, failure)


def _key_and_extension(name: str) -> tuple[str | None, str]:
    """Split a name at the first dot of its base name; None as key where there is nothing to split or to name.

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
        message = f"a member's name has {len(member.name)} characters, allowed are {MAX_NAME_CHARACTERS}"
        return SampleError("read", "name_too_long", message, name)
    if member.oddity is not None:
        kind, what = member.oddity
        return SampleError("read", kind, f"{name} is {what}, and only regular files are read", name)
    if _ABOUT_THE_ARCHIVE.match(member.name):
        return SampleError("read", "no_key", f"{name} describes the archive and belongs to no sample", name)
    return SampleError("read", "no_key", f"{name} has no extension, so it belongs to no sample", name)


def _problem_of_key(key: str) -> tuple[str, str] | None:
    if key.startswith("/") or ".." in key.split("/"):
        return "unsafe_name", "the name is absolute or leaves its folder"
    if any("\ud800" <= character <= "\udfff" for character in key):
        return "name_not_utf8", "the name is not UTF-8, so no row could name the sample"
    if key != printable(key):
        return "unsafe_name", "the name holds control characters"
    return None
