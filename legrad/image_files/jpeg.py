"""JPEG: markers must be in order, data must end with the picture, and must have no long run of zeros.

libjpeg fills up what is missing and passes over what is left, with a warning that Pillow does not hand on.

Source: ITU-T T.81, annex B (marks and segments), C (Huffman codes), F and G (sequential, progressive).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from typing import NamedTuple

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

from legrad.image_files.failures import corrupt, too_many_parts, truncated

# each scan of a progressive JPEG costs a pass over the whole image; encoders write about ten
MAX_JPEG_SCANS = 64
MAX_JPEG_PARTS = 2**12
# restart marks, and what looks like a mark in metadata
MAX_JPEG_MARKS = 2**20
# a run of so many zeros, or of padding before a mark, is none that an encoder wrote
MAX_ZEROS = 64
MAX_PADDING = 64
# cameras append a few bytes to the data of a scan
MAX_SPARE_BYTES = 4
# a decoder looks ahead so many bytes; all ones are no Huffman code
_LOOKAHEAD = b"\xff\x00" * 8

_PIECE_BYTES = 2**16
_PADDING, _RESTART = 0xFF, range(0xD0, 0xD8)
_TEM, _START, _END, _SCAN, _TABLES, _INTERVAL = 0x01, 0xD8, 0xD9, 0xDA, 0xC4, 0xDD
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), (0xC2,)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# tables, restart interval, number of lines, a further scan, the end, application data, comments
_MAY_FOLLOW_A_SCAN = frozenset([0xC4, 0xCC, 0xDB, 0xDC, 0xDD, _SCAN, _END, *range(0xE0, 0xF0), 0xFE])
_END_OF_BLOCK, _NO_DIFFERENCE = 0, 0


class _Segment(NamedTuple):
    """A mark with its segment, and what lies between that and the next mark: the data of a scan.

    Attributes:
        code: the mark's second byte.
        start: of the mark.
        content: of the segment.
        data_start, data_stop: from the segment's end to the next mark that is no restart mark.
        restarts: how many restart marks are between them.
        in_turn: whether these are numbered in turn.
    """

    code: int
    start: int
    content: bytes
    data_start: int
    data_stop: int
    restarts: int
    in_turn: bool


@dataclass(frozen=True)
class _Frame:
    """What the frame header says.

    Attributes:
        code: the mark, by which the kind of JPEG is known.
        height, width: in pixels.
        factors: of each component, its horizontal and vertical sampling factor.
    """

    code: int
    height: int
    width: int
    factors: Mapping[int, tuple[int, int]]

    @property
    def is_huffman(self) -> bool:
        """Neither arithmetic nor lossless, in which other rules hold."""
        return self.code in (*_SEQUENTIAL, *_PROGRESSIVE)

    def units(self, components: tuple[int, ...]) -> int:
        """Minimum coded units of a scan of these components."""
        most_across = max(across for across, _ in self.factors.values())
        most_down = max(down for _, down in self.factors.values())
        if len(components) > 1:
            return ceil(self.width / (8 * most_across)) * ceil(self.height / (8 * most_down))
        across, down = self.factors[components[0]]
        columns, rows = ceil(self.width * across / most_across), ceil(self.height * down / most_down)
        return ceil(columns / 8) * ceil(rows / 8)


class _Scan(NamedTuple):
    """A scan's header, and where its data lie.

    Attributes:
        tables: for each component, by identifier, the numbers of its DC and AC tables.
        first_coefficient: 0 for DC.
        is_refinement: of coefficients that an earlier scan began.
        start, stop: of the data, without padding behind them.
        restarts: how many restart marks they hold.
        in_turn: whether these are numbered in turn.
    """

    tables: Mapping[int, tuple[int, int]]
    first_coefficient: int
    is_refinement: bool
    start: int
    stop: int
    restarts: int
    in_turn: bool


class CheckedJpeg(JpegImageFile):
    """A JPEG that is refused where its data end before its last row, or go on behind it."""

    def __init__(self, file: BytesIO) -> None:
        self._data = file.getvalue()
        self._pieces: tuple[bytes, ...] = ()
        self._pieces_read = 0
        super().__init__(file)

    def load_prepare(self) -> None:
        """Look at the marks, before any pixel is decoded."""
        stop = check_jpeg(self._data)
        if stop is not None:
            most = stop - MAX_SPARE_BYTES
            self._pieces = (self._data[:most], self._data[most:stop] + _LOOKAHEAD)
        super().load_prepare()

    def load_read(self, read_bytes: int) -> bytes:
        """The next bytes for the decoder, which asks for more only while it lacks rows."""
        if not self._pieces:
            return super().load_read(read_bytes)
        self._pieces_read += 1
        if self._pieces_read > len(self._pieces):
            raise corrupt("the JPEG's data end before its last row")
        return self._pieces[self._pieces_read - 1]

    def load_end(self) -> None:
        """Called when the decoder has all rows, or has failed."""
        if self._pieces and self._pieces_read < len(self._pieces):
            raise corrupt("the JPEG's data go on behind its last row, so some before it are damaged")
        super().load_end()

    def _read_dpi_from_exif(self) -> None:
        # of no interest; Pillow would look for it in the EXIF data, and warn
        pass


def check_jpeg(data: bytes) -> int | None:
    """Check the first picture's marks and the data between them; what follows the picture is of no interest.

    Returns:
        Where the data end, of a picture that is decoded while it is read; None where all is read first.

    Raises:
        ImageFileError: kind `truncated`, `corrupt` or `too_many_parts`.
    """
    try:
        return _check_segments(data)
    # what the headers say is taken at its word, and may name what is not there
    except (IndexError, KeyError, ValueError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise corrupt(f"the JPEG's headers contradict each other ({reason})") from error


def _check_segments(data: bytes) -> int | None:
    frame: _Frame | None = None
    # the first symbol of a table is the one whose code is all zeros
    first_symbols: dict[tuple[int, int], int] = {}
    interval = 0
    scans: list[_Scan] = []
    for segment in _segments(data):
        if scans and segment.code not in _MAY_FOLLOW_A_SCAN:
            what = f"a mark that belongs to no picture (FF{segment.code:02X})"
            raise corrupt(f"the JPEG has {what} at byte {segment.start}")
        if segment.code == _END:
            return _data_stop(frame, scans)
        if segment.code in _FRAMES:
            frame = _frame_of(segment)
        elif segment.code == _TABLES:
            first_symbols |= _first_symbols(segment.content)
        elif segment.code == _INTERVAL:
            interval = int.from_bytes(segment.content[:2], "big")
        elif segment.code == _SCAN:
            scans.append(_scan_of(segment, data))
            if len(scans) > MAX_JPEG_SCANS:
                raise too_many_parts(f"the JPEG has more than {MAX_JPEG_SCANS} scans")
            if frame is not None and frame.is_huffman:
                _check_restarts(scans[-1], frame, interval)
                if not _zeros_are_data(scans[-1], frame, first_symbols):
                    _check_zeros(data, scans[-1])
    raise truncated(f"the JPEG has {len(data)} bytes and no end mark (EOI)")


def _data_stop(frame: _Frame | None, scans: list[_Scan]) -> int | None:
    if frame is None or not scans:
        raise corrupt("the JPEG ends before its picture begins")
    begun = {component for scan in scans if not scan.first_coefficient for component in scan.tables}
    if missing := set(frame.factors) - begun:
        raise truncated(f"the JPEG has no data of {len(missing)} of its {len(frame.factors)} components")
    is_read_at_once = frame.code in _SEQUENTIAL and len(scans[0].tables) == len(frame.factors)
    return scans[0].stop if is_read_at_once else None


def _segments(data: bytes) -> Iterator[_Segment]:
    """The segments of the first picture, up to its end mark, or to the last that is followed by a mark."""
    begun: tuple[int, int, bytes] | None = None
    stop, parts, restarts, in_turn = 2, 0, 0, True
    for position, code in _marks(data):
        if position < stop:
            continue
        if code in _RESTART:
            in_turn = in_turn and code == _RESTART[restarts % len(_RESTART)]
            restarts += 1
            continue
        if begun is not None:
            yield _Segment(*begun, stop, position, restarts, in_turn)
        stop, content = position + 2, b""
        if code == _END:
            yield _Segment(code, position, b"", stop, stop, 0, True)
            return
        if code not in (_START, _TEM):
            stop += max(2, int.from_bytes(data[stop : stop + 2], "big"))
            content = data[position + 4 : stop]
        begun, parts = (code, position, content), parts + 1
        restarts, in_turn = 0, True
        if parts > MAX_JPEG_PARTS:
            raise too_many_parts(f"the JPEG has more than {MAX_JPEG_PARTS} segments")


def _marks(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the bytes are that may be marks, and their codes: neither escaped bytes nor padding."""
    values, found = np.frombuffer(data, np.uint8), 0
    for start in range(0, len(data) - 1, _PIECE_BYTES):
        piece = values[start : start + _PIECE_BYTES + 1]
        positions = (piece[:-1] == _PADDING).nonzero()[0]
        codes = piece[positions + 1]
        are_marks = (codes != 0) & (codes != _PADDING)
        marks = positions[are_marks] + start
        found += len(marks)
        if found > MAX_JPEG_MARKS:
            raise too_many_parts(f"the JPEG has more than {MAX_JPEG_MARKS} marks")
        yield from zip(marks.tolist(), codes[are_marks].tolist(), strict=True)


def _frame_of(segment: _Segment) -> _Frame:
    height, width = (int.from_bytes(segment.content[start : start + 2], "big") for start in (1, 3))
    described = [segment.content[start : start + 3] for start in range(6, 6 + 3 * segment.content[5], 3)]
    factors = {each[0]: (each[1] >> 4, each[1] & 15) for each in described}
    return _Frame(segment.code, height, width, factors)


def _scan_of(segment: _Segment, data: bytes) -> _Scan:
    content, count = segment.content, segment.content[0]
    tables = {content[1 + 2 * at]: divmod(content[2 + 2 * at], 16) for at in range(count)}
    first_coefficient, _, approximation = content[1 + 2 * count : 4 + 2 * count]
    stop = segment.data_start + len(data[segment.data_start : segment.data_stop].rstrip(b"\xff"))
    if segment.data_stop - stop > MAX_PADDING:
        raise corrupt(f"the JPEG has {segment.data_stop - stop} bytes of padding at byte {stop}")
    is_refinement = approximation > 15
    return _Scan(
        tables, first_coefficient, is_refinement, segment.data_start, stop, segment.restarts, segment.in_turn
    )


def _first_symbols(content: bytes) -> dict[tuple[int, int], int]:
    """The first symbol of each Huffman table, by its class (0 DC, 1 AC) and number."""
    found = {}
    while len(content) > 17:
        symbols = sum(content[1:17])
        found[divmod(content[0], 16)] = content[17]
        content = content[17 + symbols :]
    return found


def _check_restarts(scan: _Scan, frame: _Frame, interval: int) -> None:
    """Compare the restart marks, which are numbered in turn, with the picture's size and their interval."""
    expected = ceil(frame.units(tuple(scan.tables)) / interval) - 1 if interval else 0
    # some encoders set a last one behind the data
    totals = (expected, expected + 1) if interval else (expected,)
    if scan.restarts not in totals or not scan.in_turn:
        order = "" if scan.in_turn else ", not in turn,"
        found = f"{scan.restarts} restart marks{order} behind byte {scan.start}"
        raise corrupt(f"the JPEG has {found}; its size asks for {expected}")


def _zeros_are_data(scan: _Scan, frame: _Frame, first_symbols: Mapping[tuple[int, int], int]) -> bool:
    """Whether plain areas of a picture may be a run of zero bits in this scan."""
    if scan.is_refinement:
        return True
    dc_is_plain = all(not first_symbols.get((0, dc), _NO_DIFFERENCE) for dc, _ in scan.tables.values())
    ac_is_plain = all(not first_symbols.get((1, ac), _END_OF_BLOCK) for _, ac in scan.tables.values())
    if frame.code in _SEQUENTIAL:
        return dc_is_plain and ac_is_plain
    return ac_is_plain if scan.first_coefficient else dc_is_plain


def _check_zeros(data: bytes, scan: _Scan) -> None:
    start = data.find(bytes(MAX_ZEROS + 1), scan.start, scan.stop)
    if start >= 0:
        raise corrupt(f"the JPEG has more than {MAX_ZEROS} zeros in its compressed data, at byte {start}")
