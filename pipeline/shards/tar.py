"""Read the members of a tar stream, forwards and once; each kind of damage is a distinct error.

Headers are parsed by the standard library, block by block. Its stream mode is not used because it ends
silently both where an archive was cut at a member boundary and at a corrupt header, and reads extended
headers of any claimed size into memory.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from pipeline.shards.file_kinds import kind_of

BLOCK_BYTES = tarfile.BLOCKSIZE
PIECE_BYTES = 2**20
MAX_EXTENSION_BYTES = 2**20
# writers fill up to a record, which is 10 KiB by default
MAX_PADDING_BYTES = 2**16

# gzip and zstd are decompressed before, so that they are found here only inside each other
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_TYPES_WITHOUT_BODY = {
    tarfile.LNKTYPE: ("link", "a hard link"),
    tarfile.SYMTYPE: ("link", "a symbolic link"),
    tarfile.CHRTYPE: ("special_file", "a character device"),
    tarfile.BLKTYPE: ("special_file", "a block device"),
    tarfile.FIFOTYPE: ("special_file", "a named pipe"),
}
# offsets of the flag in GNU tar's older sparse headers, and in the blocks after them: another block follows
_SPARSE_HEADER_CONTINUES, _SPARSE_BLOCK_CONTINUES = 482, 504


class ByteSource(Protocol):
    """A stream of bytes that is read forwards."""

    def read(self, size_bytes: int = -1, /) -> bytes:
        """Return the next bytes, at most so many; none at the end."""


class DamageError(Exception):
    """The archive is damaged; nothing after this point can be trusted."""

    def __init__(self, kind: str, message: str, *, stage: str = "read") -> None:
        super().__init__(message)
        self.stage, self.kind, self.message = stage, kind, message


@dataclass(frozen=True)
class Member:
    """The header of one member.

    Attributes:
        name: as stored; bytes that are not UTF-8 become lone surrogates.
        size_bytes: bytes of the body in the archive.
        type: type flag.
    """

    name: str
    size_bytes: int
    type: bytes

    @property
    def oddity(self) -> tuple[str, str] | None:
        """Kind and description of a member that is not a regular file; None for a regular file."""
        if self.type in _FILE_TYPES:
            return None
        if self.type == tarfile.GNUTYPE_SPARSE:
            return "sparse", "a sparse file"
        return _TYPES_WITHOUT_BODY.get(self.type, ("special_file", f"a member of type {self.type!r}"))


@dataclass(frozen=True)
class _Extensions:
    """What the extended headers state about the member after them."""

    name: str | None = None
    size_bytes: int | None = None
    is_sparse: bool = False
    # `path` then holds an invented name
    sparse_name: str | None = None


class Archive:
    """Reads a tar forwards, header by header, and the body of the current member on demand."""

    def __init__(self, stream: ByteSource) -> None:
        self._stream = stream
        self._offset_bytes = 0
        self._body_bytes = 0
        self._padding_bytes = 0
        self._sparse_map_continues = False

    def members(self) -> Iterator[Member]:
        """Yield every member that is not a folder, then check how the archive ends.

        Raises:
            DamageError: the archive is truncated, corrupt, compressed or not a tar.
        """
        while (header := self._next_header()) is not None:
            member = self._resolved(header)
            self._padding_bytes = -member.size_bytes % BLOCK_BYTES
            self._body_bytes = member.size_bytes
            if member.type != tarfile.DIRTYPE:
                yield member
            self._skip_body()
        self._check_end()

    def read_body(self) -> bytes:
        """Read the rest of the bytes of the current member.

        Raises:
            DamageError: the archive ends before.
        """
        # in pieces, so that a header with too large a size costs no more memory than there is data
        pieces = []
        while self._body_bytes:
            piece = self._read(min(self._body_bytes, PIECE_BYTES))
            if not piece:
                raise DamageError(
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
                raise DamageError("truncated", f"the archive ends in a member, at byte {self._offset_bytes}")
            self._body_bytes -= len(piece)

    def _resolved(self, header: tarfile.TarInfo) -> Member:
        """Apply the extended headers (PAX, GNU long names) that precede the header of a member."""
        extensions = _Extensions()
        seen: set[bytes] = set()
        while True:
            if header.type in seen and header.type != tarfile.XGLTYPE:
                # the header between them is lost, and it is unknown which of them belongs to the member
                message = f"two extended headers of one member, before byte {self._offset_bytes}"
                raise DamageError("corrupt_header", message)
            seen.add(header.type)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                extensions = replace(extensions, name=_text(self._extension(header).split(b"\0", 1)[0]))
            elif header.type in _PAX_TYPES:
                extensions = _with_pax_records(extensions, self._extension(header))
            elif header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                self._extension(header)
            else:
                break
            following = self._next_header()
            if following is None:
                raise DamageError(
                    "corrupt_header", f"an extended header at byte {self._offset_bytes} has no member"
                )
            header = following
        if header.type == tarfile.GNUTYPE_SPARSE:
            self._skip_sparse_map()
        return _member_of(header, extensions)

    def _extension(self, header: tarfile.TarInfo) -> bytes:
        if header.size > MAX_EXTENSION_BYTES:
            message = f"an extended header claims {header.size} bytes, at byte {self._offset_bytes}"
            raise DamageError("corrupt_header", message)
        self._body_bytes, self._padding_bytes = header.size, -header.size % BLOCK_BYTES
        content = self.read_body()
        self._skip_body()
        return content

    def _skip_sparse_map(self) -> None:
        while self._sparse_map_continues:
            start_bytes = self._offset_bytes
            block = self._read_block()
            if len(block) < BLOCK_BYTES:
                raise _missing_block(block, start_bytes)
            self._sparse_map_continues = bool(block[_SPARSE_BLOCK_CONTINUES])

    def _next_header(self) -> tarfile.TarInfo | None:
        """Read the next header, unresolved; None at the first block of the end of the archive."""
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
        self._sparse_map_continues = bool(block[_SPARSE_HEADER_CONTINUES])
        return header

    def _check_end(self) -> None:
        block = self._read_block()
        if len(block) < BLOCK_BYTES:
            raise DamageError("truncated", "the archive ends after one of the two blocks that mark its end")
        end_bytes = self._offset_bytes
        while block:
            if any(block):
                message = (
                    f"data follows the end of the archive, before byte {self._offset_bytes}; it was not read"
                )
                raise DamageError("data_after_end", message)
            block = self._read(PIECE_BYTES)
        zero_bytes = self._offset_bytes - end_bytes
        if zero_bytes > MAX_PADDING_BYTES:
            message = (
                f"{zero_bytes} bytes of zeros follow the end of the archive at byte {end_bytes}, as in a "
                "file that was written in part; samples may be missing"
            )
            raise DamageError("zeros_at_end", message)

    def _read_block(self) -> bytes:
        block = b""
        while len(block) < BLOCK_BYTES and (piece := self._read(BLOCK_BYTES - len(block))):
            block += piece
        return block

    def _read(self, size_bytes: int) -> bytes:
        piece = self._stream.read(size_bytes)
        self._offset_bytes += len(piece)
        return piece


def _missing_block(block: bytes, start_bytes: int) -> DamageError:
    if not start_bytes and not block:
        return DamageError("zero_bytes", "the tar has 0 bytes", stage="open")
    if not start_bytes:
        return _corrupt_block(block, start_bytes)
    where = "in a header" if block else "without the blocks that mark its end"
    return DamageError("truncated", f"the archive ends {where}, at byte {start_bytes + len(block)}")


def _corrupt_block(block: bytes, start_bytes: int) -> DamageError:
    if start_bytes:
        return DamageError("corrupt_header", f"no valid header at byte {start_bytes}; the rest is not read")
    for magic, name in _COMPRESSIONS.items():
        if block.startswith(magic):
            message = (
                f"the tar is compressed with {name}; tars are read uncompressed, or compressed once "
                "with gzip or zstd"
            )
            return DamageError("compressed", message, stage="open")
    kind = kind_of(block)
    found = "" if kind is None else f": it is {kind.name}; {kind.way_out}"
    return DamageError("not_a_tar", f"the shard does not begin with a tar header{found}", stage="open")


def _member_of(header: tarfile.TarInfo, extensions: _Extensions) -> Member:
    names = (extensions.sparse_name, extensions.name, header.name)
    name = next(name for name in names if name is not None)
    size_bytes = header.size if extensions.size_bytes is None else extensions.size_bytes
    # tar stores no body for these, whatever their size says
    if header.type in _TYPES_WITHOUT_BODY or header.type == tarfile.DIRTYPE:
        return Member(name, 0, header.type)
    # an old tar marks folders by the name alone
    if header.type == tarfile.AREGTYPE and name.endswith("/"):
        return Member(name, size_bytes, tarfile.DIRTYPE)
    return Member(name, size_bytes, tarfile.GNUTYPE_SPARSE if extensions.is_sparse else header.type)


def _with_pax_records(extensions: _Extensions, content: bytes) -> _Extensions:
    """Read PAX records, each of which is "LENGTH KEYWORD=VALUE" and a line feed."""
    start = 0
    while start < len(content) and content[start]:
        length_digits, space, _ = content[start : start + 20].partition(b" ")
        if not space or not length_digits.isdigit():
            raise DamageError("corrupt_header", "a PAX header has a record without a length")
        end = start + int(length_digits)
        record = content[start + len(length_digits) + 1 : end]
        keyword, equals, value = record.partition(b"=")
        if end > len(content) or not equals or not value.endswith(b"\n"):
            raise DamageError("corrupt_header", "a PAX header has a record of another length than it states")
        extensions = _with_pax_record(extensions, keyword, value[:-1])
        start = end
    return extensions


def _with_pax_record(extensions: _Extensions, keyword: bytes, value: bytes) -> _Extensions:
    if keyword == b"path":
        return replace(extensions, name=_text(value))
    if keyword == b"size":
        return replace(extensions, size_bytes=_pax_size_bytes(value))
    if keyword == b"GNU.sparse.name":
        return replace(extensions, sparse_name=_text(value), is_sparse=True)
    return replace(extensions, is_sparse=True) if keyword.startswith(b"GNU.sparse.") else extensions


def _pax_size_bytes(value: bytes) -> int:
    if not value.isdigit() or len(value) > 19:
        raise DamageError("corrupt_header", "a PAX header has a size that is not a number")
    return int(value)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
