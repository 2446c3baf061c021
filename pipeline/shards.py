"""From a tar stream to samples, in bounded memory, with every bad case told apart and never a wrong pairing.

The archive is read block by block, headers parsed by the standard library, members grouped by webdataset's
key rule. The stream mode of `tarfile` is not used because it ends in silence both where an archive was cut at
a member boundary and at a corrupt header, and takes extended headers of any claimed size into memory.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

from pipeline.records import SampleError

BLOCK_BYTES = tarfile.BLOCKSIZE
PIECE_BYTES = 2**20
MAX_EXTENSION_BYTES = 2**20
MAX_FIELDS_PER_SAMPLE = 64
# the longest path of common systems; the key rule's pattern takes quadratic time on what is longer
MAX_NAME_CHARACTERS = 4096

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_SPECIAL_KINDS = {
    tarfile.LNKTYPE: ("link", "a hard link"),
    tarfile.SYMTYPE: ("link", "a symbolic link"),
    tarfile.CHRTYPE: ("special_file", "a character device"),
    tarfile.BLKTYPE: ("special_file", "a block device"),
    tarfile.FIFOTYPE: ("special_file", "a named pipe"),
}
# webdataset's own rule for members that describe the archive, such as what lies in a folder __index__
_ARCHIVE_METADATA = re.compile(r"__[^/]*__($|/)")


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
    stream: BinaryIO, *, max_member_bytes: int, wanted_fields: Collection[str] | None = None
) -> Iterator[RawSample | SampleError]:
    """Read the samples of an uncompressed tar, one at a time.

    Args:
        stream: read forward only, never sought.
        max_member_bytes: a sample with a larger wanted member fails.
        wanted_fields: which fields to keep, in any case; None keeps all. Others are skipped unread.

    Returns:
        An iterator that yields, for each ordinal from 0 upwards, either the sample or the one error that
        makes it unusable; and between them, with `sample_index` None, errors that belong to no sample.

    Raises:
        OSError, ShardError: whatever the stream raises itself; a broken connection is not the data's fault.
    """
    wanted = None if wanted_fields is None else frozenset(field.lower() for field in wanted_fields)
    archive = _Archive(stream)
    seen_keys: set[bytes] = set()
    group: _Group | None = None
    damage: _DamageError | None = None
    try:
        for member in archive.members():
            key, extension = _key_and_extension(member.name)
            if key is None:
                yield _stray(member)
                continue
            if group is None or key != group.key:
                if group is not None:
                    yield group.outcome()
                group = _Group(group.index + 1 if group is not None else 0, key, seen_keys)
            field = extension.lower()
            if wanted is None or field in wanted:
                group.take(member, field, archive, max_member_bytes)
    except _DamageError as error:
        damage = error
    if group is not None:
        yield group.outcome()
    if damage is not None:
        yield SampleError(damage.stage, damage.kind, damage.message)


class _DamageError(Exception):
    """From here on nothing in the archive can be trusted."""

    def __init__(self, kind: str, message: str, *, stage: str = "read") -> None:
        super().__init__(message)
        self.stage, self.kind, self.message = stage, kind, message


@dataclass(frozen=True)
class _Member:
    name: str
    size_bytes: int
    type: bytes


class _Group:
    """The consecutive members of one key."""

    def __init__(self, index: int, key: str, seen_keys: set[bytes]) -> None:
        self.index, self.key = index, key
        self._fields: dict[str, bytes] = {}
        self._failure = _problem_of_key(key)
        # digests, so that memory stays small however long the names are
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        if digest in seen_keys:
            message = "the key came before, with other samples in between; its members are not joined"
            self._failure = ("duplicate_key", message)
        seen_keys.add(digest)

    def take(self, member: _Member, field: str, archive: _Archive, max_member_bytes: int) -> None:
        """Read a member's bytes into its field, unless the sample has failed."""
        self._failure = self._failure or self._problem_of_member(member, field, max_member_bytes)
        if self._failure is None:
            try:
                self._fields[field] = archive.read_body()
            except _DamageError as damage:
                self._failure = (damage.kind, f"{_printable(member.name)}: {damage.message}")
                raise

    def outcome(self) -> RawSample | SampleError:
        """The sample, or what makes it unusable."""
        if self._failure is None:
            return RawSample(self.index, self.key, self._fields)
        kind, message = self._failure
        return SampleError("read", kind, message, _printable(self.key), self.index)

    def _problem_of_member(
        self, member: _Member, field: str, max_member_bytes: int
    ) -> tuple[str, str] | None:
        name = _printable(member.name)
        if member.type not in tarfile.REGULAR_TYPES:
            kind, what = _kind_of_special(member)
            return kind, f"{name} is {what}, and only regular files are read"
        if field in self._fields:
            return "duplicate_field", f"{name}: the sample has a field {field!r} already"
        if member.size_bytes > max_member_bytes:
            sizes = f"{member.size_bytes} bytes, allowed are {max_member_bytes}"
            return "member_too_large", f"{name} has {sizes}"
        if len(self._fields) >= MAX_FIELDS_PER_SAMPLE:
            return "too_many_members", f"the sample has more than {MAX_FIELDS_PER_SAMPLE} members"
        return None


class _Archive:
    """Reads a tar forwards: header by header, and the body of the current member on demand."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._offset_bytes = 0
        self._body_bytes = 0
        self._padding_bytes = 0

    def members(self) -> Iterator[_Member]:
        """Yield every member that is no folder, then check how the archive ends.

        Raises:
            _DamageError: the archive is cut, corrupt, compressed or no tar at all.
        """
        while (header := self._next_header()) is not None:
            member = self._resolved(header)
            self._padding_bytes = -member.size_bytes % BLOCK_BYTES
            self._body_bytes = member.size_bytes
            if member.type != tarfile.DIRTYPE and not _ARCHIVE_METADATA.match(member.name):
                yield member
            self._skip_body()
        self._check_end()

    def read_body(self) -> bytes:
        """Read the rest of the current member's bytes.

        Raises:
            _DamageError: the archive ends before.
        """
        # in pieces, so that a header that claims too much costs no more memory than there is data
        pieces = []
        while self._body_bytes:
            piece = self._read(min(self._body_bytes, PIECE_BYTES))
            if not piece:
                raise _DamageError(
                    "truncated", f"the archive ends in the member, at byte {self._offset_bytes}"
                )
            pieces.append(piece)
            self._body_bytes -= len(piece)
        return b"".join(pieces)

    def _skip_body(self) -> None:
        self._body_bytes += self._padding_bytes
        self._padding_bytes = 0
        while self._body_bytes:
            piece = self._read(min(self._body_bytes, PIECE_BYTES))
            if not piece:
                raise _DamageError("truncated", f"the archive ends in a member, at byte {self._offset_bytes}")
            self._body_bytes -= len(piece)

    def _resolved(self, header: tarfile.TarInfo) -> _Member:
        """Apply the extended headers (PAX, GNU long names) that stand before a member's own."""
        name: str | None = None
        size_bytes: int | None = None
        while True:
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = _text(self._extension(header).split(b"\0", 1)[0])
            elif header.type in _PAX_TYPES:
                name, size_bytes = _pax_name_and_size(self._extension(header), name, size_bytes)
            elif header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                self._extension(header)
            else:
                break
            following = self._next_header()
            if following is None:
                raise _DamageError(
                    "corrupt_header", f"an extended header at byte {self._offset_bytes} has no member"
                )
            header = following
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _DamageError(
                "sparse", "the archive stores a sparse file, whose extent this reader does not know"
            )
        return _member_of(header, name, size_bytes)

    def _extension(self, header: tarfile.TarInfo) -> bytes:
        if header.size > MAX_EXTENSION_BYTES:
            message = f"an extended header claims {header.size} bytes, at byte {self._offset_bytes}"
            raise _DamageError("corrupt_header", message)
        self._body_bytes, self._padding_bytes = header.size, -header.size % BLOCK_BYTES
        content = self.read_body()
        self._skip_body()
        return content

    def _next_header(self) -> tarfile.TarInfo | None:
        """The next header as it stands, or None at the first block of the end of the archive."""
        start_bytes = self._offset_bytes
        block = self._read_block()
        if len(block) < BLOCK_BYTES:
            raise _missing_block(block, start_bytes)
        if not any(block):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _corrupt_block(block, start_bytes) from error
        if header.size < 0:
            raise _corrupt_block(block, start_bytes)
        return header

    def _check_end(self) -> None:
        block = self._read_block()
        if len(block) < BLOCK_BYTES:
            raise _DamageError("truncated", "the archive ends after one of the two blocks that mark its end")
        while block:
            if any(block):
                message = (
                    f"data follows the end of the archive, before byte {self._offset_bytes}; it was not read"
                )
                raise _DamageError("data_after_end", message)
            block = self._read(PIECE_BYTES)

    def _read_block(self) -> bytes:
        block = b""
        while len(block) < BLOCK_BYTES and (piece := self._read(BLOCK_BYTES - len(block))):
            block += piece
        return block

    def _read(self, size_bytes: int) -> bytes:
        piece = self._stream.read(size_bytes)
        self._offset_bytes += len(piece)
        return piece


def _missing_block(block: bytes, start_bytes: int) -> _DamageError:
    if not start_bytes and not block:
        return _DamageError("zero_bytes", "the shard has no bytes at all", stage="open")
    if not start_bytes:
        return _corrupt_block(block, start_bytes)
    where = "in a header" if block else "without the blocks that mark its end"
    return _DamageError("truncated", f"the archive ends {where}, at byte {start_bytes + len(block)}")


def _corrupt_block(block: bytes, start_bytes: int) -> _DamageError:
    if start_bytes:
        return _DamageError(
            "corrupt_header", f"no valid header at byte {start_bytes}; what follows is not read"
        )
    for magic, name in _COMPRESSIONS.items():
        if block.startswith(magic):
            message = f"the shard is compressed with {name}; shards are read uncompressed"
            return _DamageError("compressed", message, stage="open")
    return _DamageError("not_a_tar", "the shard does not begin with a tar header", stage="open")


def _member_of(header: tarfile.TarInfo, name: str | None, size_bytes: int | None) -> _Member:
    member = _Member(
        header.name if name is None else name, header.size if size_bytes is None else size_bytes, header.type
    )
    # tar stores no body for these, whatever their size says; an old tar marks folders by the name alone
    if header.type in _SPECIAL_KINDS or header.type == tarfile.DIRTYPE:
        return replace(member, size_bytes=0)
    if header.type == tarfile.AREGTYPE and member.name.endswith("/"):
        return replace(member, type=tarfile.DIRTYPE)
    return member


def _pax_name_and_size(
    content: bytes, name: str | None, size_bytes: int | None
) -> tuple[str | None, int | None]:
    """Read `path` and `size` from PAX records, each of which is "LENGTH KEYWORD=VALUE" and a line feed."""
    start = 0
    while start < len(content) and content[start]:
        length_digits, space, _ = content[start : start + 20].partition(b" ")
        if not space or not length_digits.isdigit():
            raise _DamageError("corrupt_header", "a PAX header has a record without a length")
        end = start + int(length_digits)
        record = content[start + len(length_digits) + 1 : end]
        keyword, equals, value = record.partition(b"=")
        if end > len(content) or not equals or not value.endswith(b"\n"):
            raise _DamageError("corrupt_header", "a PAX header has a record that does not fit its length")
        if keyword == b"path":
            name = _text(value[:-1])
        elif keyword == b"size":
            size_bytes = _pax_size_bytes(value[:-1])
        elif keyword.startswith(b"GNU.sparse."):
            raise _DamageError("sparse", "the archive stores a sparse file, whose content is not read")
        start = end
    return name, size_bytes


def _pax_size_bytes(value: bytes) -> int:
    if not value.isdigit() or len(value) > 19:
        raise _DamageError("corrupt_header", "a PAX header gives a size that is no number")
    return int(value)


def _kind_of_special(member: _Member) -> tuple[str, str]:
    return _SPECIAL_KINDS.get(member.type, ("special_file", f"a member of type {member.type!r}"))


def _key_and_extension(name: str) -> tuple[str | None, str]:
    if len(name) > MAX_NAME_CHARACTERS:
        return None, ""
    key, extension = base_plus_ext(name)
    # the rule takes a hidden file in a folder (x/._a.jpg) for an extension of the folder's own name
    if key is None or key.endswith("/"):
        return None, ""
    return key, extension


def _stray(member: _Member) -> SampleError:
    name = _printable(member.name[:MAX_NAME_CHARACTERS])
    if len(member.name) > MAX_NAME_CHARACTERS:
        message = f"a member's name has {len(member.name)} characters, allowed are {MAX_NAME_CHARACTERS}"
        return SampleError("read", "name_too_long", message, name)
    if member.type not in tarfile.REGULAR_TYPES:
        kind, what = _kind_of_special(member)
        return SampleError("read", kind, f"{name} is {what}, and only regular files are read", name)
    return SampleError("read", "no_key", f"{name} has no extension, so it belongs to no sample", name)


def _problem_of_key(key: str) -> tuple[str, str] | None:
    if key.startswith("/") or ".." in key.split("/"):
        return "unsafe_name", "the name is absolute or leaves its folder"
    if key != _printable(key):
        return "name_not_utf8", "the name is not UTF-8, so no row could name the sample"
    return None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
