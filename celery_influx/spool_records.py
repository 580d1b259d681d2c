"""The records of the spool's files: each a batch with a checksum. No I/O."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

#: Of a record: magic, number of lines, bytes of the body, CRC-32 of these two and the body. That is
#: each line's length, and the lines with newlines between them: for whoever looks, since a line may
#: have newlines of its own. No UTF-8 has a byte 255.
_HEADER = struct.Struct("<4sIII")
_SIZES = struct.Struct("<II")
_MAGIC = b"\xffCI1"


def pack(lines: list[bytes]) -> bytes:
    """One record."""
    body = struct.pack(f"<{len(lines)}I", *map(len, lines)) + b"\n".join(lines)
    return _HEADER.pack(_MAGIC, len(lines), len(body), _crc(len(lines), body)) + body


def _crc(count: int, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(_SIZES.pack(count, len(body))))


def records(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Start, end and number of lines of each whole record in ``data``."""
    start = 0
    while (start := data.find(_MAGIC, start)) >= 0:
        if len(data) - start < _HEADER.size:
            return
        _, count, size, crc = _HEADER.unpack_from(data, start)
        end = start + _HEADER.size + size
        if end <= len(data) and _crc(count, memoryview(data)[end - size : end]) == crc:
            yield start, end, count
            start = end
        else:
            start += len(_MAGIC)


def unpack(data: bytes, start: int, count: int) -> list[bytes]:
    """The lines of the record at ``start``."""
    start += _HEADER.size
    lines = []
    place = start + 4 * count
    for length in struct.unpack_from(f"<{count}I", data, start):
        lines.append(data[place : place + length])
        place += length + 1
    return lines
