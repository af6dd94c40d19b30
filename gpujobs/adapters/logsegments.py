"""Segment files of a stored log: the format of a record, and reading by position, forwards and backwards."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpujobs.core import errors
from gpujobs.logwire import FRAME, GAP, MAX_PAYLOAD, STDERR, STDOUT, LogRecord

MAGIC = b"GJLOG\x001\n"
BEFORE = struct.Struct(">QQ")
_TRAILER = struct.Struct(">I")
START = len(MAGIC) + BEFORE.size
_OVERHEAD = FRAME.size + _TRAILER.size

_BLOCK = 256 << 10
"""Bytes read at a time: parsing so many short lines takes less than 10 ms of the event loop."""

RESTORED = 16
"""Added to the stored stream of a newline that the Engine had left out (`gpujobs.adapters.lognewlines`)."""

_STREAMS = frozenset({GAP, STDOUT, STDERR, STDOUT + RESTORED, STDERR + RESTORED})

Located = tuple[int, LogRecord]
"""A record, its stream as stored, and the position of its first byte."""


def stored_size(record: LogRecord) -> int:
    """Bytes that a record takes in a segment."""
    return _OVERHEAD + len(record.payload)


def encode_records(records: Iterable[LogRecord]) -> tuple[bytes, int, int]:
    """Returns records as they are stored, the number of their payload bytes, and the latest time in ns."""
    parts: list[bytes] = []
    payload = newest = 0
    header, trailer = FRAME.pack, _TRAILER.pack
    for time_ns, stream, content in records:
        length = len(content)
        payload += length
        if time_ns > newest and stream != GAP:
            newest = time_ns
        parts += (header(time_ns, stream, length), content, trailer(length))
    return b"".join(parts), payload, newest


def _parse(block: bytes, position: int) -> tuple[list[Located], int]:
    """Parses the whole records at the start of a block; returns them and the number of bytes used."""
    found: list[Located] = []
    offset, size = 0, len(block)
    while offset + _OVERHEAD <= size:
        time_ns, stream, length = FRAME.unpack_from(block, offset)
        end = offset + _OVERHEAD + length
        if end > size or stream not in _STREAMS or length > MAX_PAYLOAD:
            break
        if _TRAILER.unpack_from(block, end - _TRAILER.size)[0] != length:
            break
        content = block[offset + FRAME.size : end - _TRAILER.size]
        found.append((position + offset, LogRecord(time_ns, stream, content)))
        offset = end
    return found, offset


@dataclass(slots=True)
class Segment:
    """One file of a log.

    Attributes:
        path: Of the file.
        start: Position of its first record.
        before: Payload bytes of the log before it.
        newest_before: The latest time in ns among the records before it.
        size: Bytes of its records.
    """

    path: Path
    start: int
    before: int
    newest_before: int
    size: int

    @property
    def end(self) -> int:
        """Position after the last record."""
        return self.start + self.size


def load(directory: Path) -> list[Segment]:
    """Lists a log's segments in order. A file too short for its own header was torn at birth: left out."""
    segments = []
    for path in sorted(directory.glob("*.seg")):
        with path.open("rb") as file:
            head = file.read(START)
            size = os.fstat(file.fileno()).st_size
        if len(head) < START:
            continue
        if not head.startswith(MAGIC):
            raise errors.InvalidInput(f"{path} is not a log segment of this version")
        before, newest = BEFORE.unpack_from(head, len(MAGIC))
        segments.append(Segment(path, int(path.stem), before, newest, size - START))
    return segments


class Store:
    """Reads a log's segments by position; keeps the file last read open, so a dropped one can be finished."""

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self._fd = -1
        self._of: Segment | None = None

    def close(self) -> None:
        """Closes the file last read; reading on opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._of = -1, None

    def find(self, position: int) -> Segment | None:
        """The segment that holds a position, or the next one after it; None at the end."""
        if self._of is not None and self._of.start <= position < self._of.end:
            return self._of
        low, high = 0, len(self.segments)
        while low < high:
            middle = (low + high) // 2
            if self.segments[middle].end <= position:
                low = middle + 1
            else:
                high = middle
        return self.segments[low] if low < len(self.segments) else None

    def _read(self, segment: Segment, position: int, size: int) -> bytes:
        if self._of is not segment:
            self.close()
            self._fd, self._of = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC), segment
        return os.pread(self._fd, min(size, segment.end - position), position - segment.start + START)

    def forward(self, segment: Segment, position: int) -> tuple[list[Located], int]:
        """Some records from a position inside a segment, and the position after them (unmoved: torn)."""
        block = self._read(segment, position, _BLOCK)
        found, used = _parse(block, position)
        if not found and len(block) >= FRAME.size:
            length = FRAME.unpack_from(block)[2]
            if _BLOCK < length + _OVERHEAD <= MAX_PAYLOAD:
                found, used = _parse(self._read(segment, position, length + _OVERHEAD), position)
        return found, position + used

    def backward(self, end: int) -> Iterator[list[Located]]:
        """Records that end at or before a position (a record's boundary), the newest first, in batches."""
        for segment in reversed(self.segments.copy()):
            at = min(end, segment.end)
            while at > segment.start:
                start = max(segment.start, at - _BLOCK)
                block = self._read(segment, start, at - start)
                batch: list[Located] = []
                while at - start >= _TRAILER.size:
                    length = _TRAILER.unpack_from(block, at - start - _TRAILER.size)[0]
                    first = at - _OVERHEAD - length
                    if first < start:
                        if not batch and first >= segment.start:
                            start = first
                            block = self._read(segment, start, at - start)
                            continue
                        break
                    time_ns, stream, _ = FRAME.unpack_from(block, first - start)
                    content = block[first - start + FRAME.size : at - start - _TRAILER.size]
                    batch.append((first, LogRecord(time_ns, stream, content)))
                    at = first
                if not batch:
                    byte = at - segment.start + START
                    raise errors.InvalidInput(f"{segment.path} is damaged before byte {byte}")
                yield batch

    def first_time(self, segment: Segment) -> int | None:
        """Time of a segment's first record in ns; None where there is none yet."""
        head = self._read(segment, segment.start, FRAME.size)
        return int(FRAME.unpack(head)[0]) if len(head) == FRAME.size else None

    def measure(self, segment: Segment, until: int) -> tuple[int, int, int]:
        """Walks a segment's whole records that begin before a position.

        Returns:
            The position after them, and of the whole log up to there the payload bytes and the latest time.
        """
        block = self._read(segment, segment.start, segment.size)
        total, newest, offset, size = segment.before, segment.newest_before, 0, len(block)
        header, trailer = FRAME.unpack_from, _TRAILER.unpack_from
        stop = until - segment.start
        while offset < stop and offset + _OVERHEAD <= size:
            time_ns, stream, length = header(block, offset)
            end = offset + _OVERHEAD + length
            if end > size or stream not in _STREAMS or length > MAX_PAYLOAD or trailer(block, end - 4)[0] != length:
                break
            total += length
            if time_ns > newest and stream != GAP:
                newest = time_ns
            offset = end
        return segment.start + offset, total, newest
