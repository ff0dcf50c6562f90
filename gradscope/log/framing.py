"""TFRecord framing: how a record of bytes lies in an event file, checked by CRC-32C.

TensorBoard's own writer computes the checksum in Python: 118 µs per kB, holding the GIL.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c

# length (uint64), masked CRC of the length (uint32) · data · masked CRC of the data (uint32)
_HEADER = struct.Struct("<QI")
_LENGTH = struct.Struct("<Q")
_FOOTER = struct.Struct("<I")


def _masked_crc(data: bytes) -> int:
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """The record as it lies in the file."""
    length = _LENGTH.pack(len(data))
    return b"".join(
        (length, _FOOTER.pack(_masked_crc(length)), data, _FOOTER.pack(_masked_crc(data)))
    )


@dataclass(slots=True)
class Leftover:
    """What `records` could not read of a file, in bytes and in words."""

    unread_bytes: int = 0
    damaged_records: int = 0


def records(file: BinaryIO, leftover: Leftover) -> Iterator[bytes]:
    """The records of a file; a torn tail and damaged records are counted in `leftover`.

    One after the other: a file may be larger than what may be taken of the memory. What is
    written to it meanwhile is left for the next time.
    """
    at, end = 0, file.seek(0, os.SEEK_END)
    file.seek(0)
    while at + _HEADER.size <= end:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            break
        length, length_crc = _HEADER.unpack(header)
        # A wrong length loses the place of every later record: nothing behind it can be read.
        if _masked_crc(header[: _LENGTH.size]) != length_crc:
            break
        stop = at + _HEADER.size + length + _FOOTER.size
        if stop > end:
            break
        data, footer = file.read(length), file.read(_FOOTER.size)
        if len(footer) < _FOOTER.size:
            break
        at = stop
        if _FOOTER.pack(_masked_crc(data)) == footer:
            yield data
        else:
            leftover.damaged_records += 1
    leftover.unread_bytes += end - at
