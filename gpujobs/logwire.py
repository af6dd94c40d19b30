"""Log records on the wire between server and client, and nothing else (standard library only).

One frame is ``>QBI`` (time in nanoseconds since the epoch, stream, length of the payload) and the payload.
Concatenating the payloads of one stream gives exactly the bytes that the program wrote on it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

FRAME = struct.Struct(">QBI")
"""Header of a frame: time in ns, stream, payload length in bytes."""

GAP = 0
"""Stream of our own words: the payload is a sentence, without newline, that says what is missing here."""
STDOUT = 1
STDERR = 2

MAX_PAYLOAD = 1 << 24
"""No payload is longer (the Engine cuts lines at 16 KiB); a longer length means that the data is damaged."""


class LogRecord(NamedTuple):
    """One message of a program: a line with its newline, or a piece of a long or unfinished line.

    Attributes:
        time_ns: When the Engine received it, in ns since the epoch. All pieces of one long line bear the time
            of its first piece, so times do not always ascend.
        stream: ``STDOUT``, ``STDERR`` or ``GAP``.
        payload: The bytes as written; for ``GAP`` a sentence in UTF-8.
    """

    time_ns: int
    stream: int
    payload: bytes


def encode_frame(record: LogRecord) -> bytes:
    """Returns one record as a frame."""
    return FRAME.pack(record.time_ns, record.stream, len(record.payload)) + record.payload


def decode_frames(buffer: bytes) -> tuple[list[LogRecord], bytes]:
    """Decodes every whole frame at the start of a buffer.

    Args:
        buffer: Bytes from a frame's start on, of any length.

    Returns:
        The records, and the bytes of a last unfinished frame, to be put before the next buffer.

    Raises:
        ValueError: The bytes are no frames.
    """
    records: list[LogRecord] = []
    position, size, header = 0, len(buffer), FRAME.size
    while position + header <= size:
        time_ns, stream, length = FRAME.unpack_from(buffer, position)
        if stream > STDERR or length > MAX_PAYLOAD:
            raise ValueError(f"not a log frame: stream {stream}, length {length}")
        end = position + header + length
        if end > size:
            break
        records.append(LogRecord(time_ns, stream, buffer[position + header : end]))
        position = end
    return records, buffer[position:]
