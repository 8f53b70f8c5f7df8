"""Whether a video file is cut off, by what its container says of its own length.

A decoder can't tell: the number of frames that a container gives is often an estimate, of its longest track (sound too)
at its highest rate, and of a trimmed MP4 it has frames that are never shown. The lengths in bytes are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["ends_early"]

_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_BOXES = (*_FIRST_BOXES, b"moof", b"mfra", b"sidx", b"styp", b"uuid", b"meta", b"udta", b"pdin", b"emsg")
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18\x53\x80\x67"
_OPEN = 0xFFFFFFFF  # a chunk's length, as FFmpeg writes it until it knows


def ends_early(path: Path) -> bool:
    """Whether a file's container says that it is longer than the file: MP4 and MOV, AVI, Matroska and WebM.

    False of other containers (MPEG-TS, FLV), of lengths that are left open, as of a recording under way, and of what
    is no file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(64)
            if head[4:8] in _FIRST_BOXES:
                return _end_of_parts(file, size, _length_of_box) > size
            if head[:4] == b"RIFF":
                return _end_of_parts(file, size, _length_of_chunk) > size + 1  # the last one's padding may be left out
            return head[:4] == _EBML and _end_of_segment(head) > size
    except OSError:
        return False


def _end_of_parts(file: BinaryIO, size: int, length_of: Callable[[bytes], int]) -> int:
    """Where the last of a file's parts ends, by the heads that lie within it; 0 where that is open."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        length = length_of(file.read(16))
        if not length:
            return 0
        at += length
    return at


def _length_of_box(head: bytes) -> int:
    """ISO/IEC 14496-12, 4.2; 0 where it is open, and of what is no box: cameras append such."""
    length = int.from_bytes(head[:4], "big")
    if length == 1:
        length = int.from_bytes(head[8:16], "big")
    return length if length >= 8 and head[4:8] in _BOXES else 0


def _length_of_chunk(head: bytes) -> int:
    """Of a RIFF chunk, of which a long AVI has several; 0 where a recorder did not come to write it."""
    length = int.from_bytes(head[4:8], "little")
    return 0 if length in (0, _OPEN) or head[:4] != b"RIFF" else 8 + length + length % 2


def _end_of_segment(head: bytes) -> int:
    """Where the segment after the EBML header ends (RFC 8794, 4 and 6); 0 where its length is unknown."""
    header, at = _number(head, 4)
    at += header or 0
    segment, begin = _number(head, at + 4)
    return 0 if header is None or segment is None or head[at : at + 4] != _SEGMENT else begin + segment


def _number(data: bytes, at: int) -> tuple[int | None, int]:
    """A length of 1 to 8 bytes, None where all its bits are set or it is cut off, and where it ends."""
    length = 9 - data[at].bit_length() if at < len(data) else 9
    most = (1 << 7 * length) - 1
    value = int.from_bytes(data[at : at + length], "big") & most
    return (None if value == most or at + length > len(data) else value), at + length
