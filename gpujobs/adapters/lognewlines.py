"""Gives back the newlines that Engine 20.10 swallows: those of lines of 16 KiB and longer.

The Engine cuts a long line into messages of 16 KiB and a shorter, perhaps empty, rest. Before version 23 its
``local`` driver leaves out the newline after that rest when it reads. A message without newline that is not
16 KiB long can otherwise only be the very last of its stream, so as soon as another one follows, the newline is
known to have been there. It is stored as a record of its own, marked, with the time of the rest.

Whether the very last line of a stream ended with a newline is only in the Engine's file, which is looked at
where it can be read; elsewhere a newline is assumed, as programs end their lines.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from gpujobs.adapters.logfile import LogWriter
from gpujobs.adapters.logsegments import RESTORED
from gpujobs.logwire import GAP, STDERR, STDOUT, LogRecord

CHUNK = 16384
"""Bytes of a piece of a long line (the Engine's ``defaultBufSize``)."""

WHOLE, PIECE, REST = range(3)
"""What a record can be: the end of a line; 16 KiB of a long line; shorter, without newline."""

_LENGTH = struct.Struct(">I")
_FILE_TAIL = 4 << 20
_LOAD_BATCHES = 8
"""How far back, in steps of 256 KiB, a quiet stream's last record is looked for."""


def kind(payload: bytes) -> int:
    """Says which of `WHOLE`, `PIECE` and `REST` a record is."""
    if payload[-1:] == b"\n":
        return WHOLE
    return PIECE if len(payload) >= CHUNK else REST


def newline(stream: int, time_ns: int) -> LogRecord:
    """The record of a newline that is put in after a rest of that time."""
    return LogRecord(time_ns, stream + RESTORED, b"\n")


class Newlines:
    """Adds to a log's records what the Engine left out."""

    def __init__(self, log: LogWriter) -> None:
        self._log = log
        self._last: dict[int, tuple[int, int]] = {}
        self._rest_of_long: dict[int, bool] = {}
        self.load()

    def load(self) -> None:
        """Takes up from the stored end: at the beginning, and after the log was cut."""
        self._last.clear()
        self._rest_of_long.clear()
        recent: list[LogRecord] = []
        for number, batch in enumerate(self._log.backward()):
            recent += (record for _, record in batch)
            streams = [record.stream % RESTORED for record in recent]
            if number >= _LOAD_BATCHES or min(streams.count(STDOUT), streams.count(STDERR)) >= 2:
                break
        self._pass(reversed(recent))

    def _pass(self, records: Iterable[LogRecord]) -> list[LogRecord]:
        passed: list[LogRecord] = []
        for record in records:
            time_ns, stream, payload = record
            if stream == GAP:
                passed.append(record)
                continue
            stream %= RESTORED
            before = self._last.get(stream)
            this = kind(payload)
            if before is not None and before[0] == REST and record.stream < RESTORED:
                passed.append(newline(stream, before[1]))
            self._rest_of_long[stream] = this == REST and (not payload or before == (PIECE, time_ns))
            self._last[stream] = this, time_ns
            passed.append(record)
        return passed

    def restore(self, records: list[LogRecord]) -> list[LogRecord]:
        """Returns records with the missing newlines between them."""
        if not any(last[0] == REST for last in self._last.values()):
            for record in records:
                if record[2][-1:] != b"\n":
                    break
            else:
                for stream in {record[1] for record in records}:
                    self._last[stream] = WHOLE, 0
                return records
        return self._pass(records)

    def doubtful(self) -> list[tuple[int, int]]:
        """Stream and time in ns of each last record of which it is not known whether a newline followed."""
        return [
            (stream, time_ns)
            for stream, (this, time_ns) in self._last.items()
            if this == REST and self._rest_of_long[stream]
        ]


def ended_line(root: Path, container_id: str, stream: int, time_ns: int) -> bool | None:
    """Looks into the Engine's own file whether a stream's last message ended its line.

    A record there is ``>I`` length, a protocol buffer (`LogEntry`: 1 source, 2 time_nano, 3 line, 4 partial,
    5 partial_log_metadata with 1 last, 2 id, 3 ordinal) and the length again.

    Args:
        root: The Engine's data root.
        container_id: The full id.
        stream: ``STDOUT`` or ``STDERR``.
        time_ns: Time of that message.

    Returns:
        None where the file is not there for us, or is not as expected.
    """
    path = root / "containers" / container_id / "local-logs" / "container.log"
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _FILE_TAIL))
            data = file.read()
    except OSError:
        return None
    source = {STDOUT: b"stdout", STDERR: b"stderr"}[stream]
    end = len(data)
    try:
        while end > 2 * _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, end - _LENGTH.size)
            start = end - _LENGTH.size - length
            if start < _LENGTH.size:
                return None
            fields = _fields(data[start : end - _LENGTH.size])
            if fields.get(1) == source:
                metadata = fields.get(5)
                known = fields.get(2) == time_ns and isinstance(metadata, bytes)
                return _fields(metadata).get(1) == 1 if known and isinstance(metadata, bytes) else None
            end = start - _LENGTH.size
    except (IndexError, ValueError):
        pass
    return None


def _fields(data: bytes) -> dict[int, int | bytes]:
    """The fields of a protocol buffer with numbers and bytes only."""

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    fields: dict[int, int | bytes] = {}
    at = 0
    while at < len(data):
        key, at = number(at)
        value, at = number(at)
        if key & 7 == 0:
            fields[key >> 3] = value
        elif key & 7 == 2:
            fields[key >> 3] = data[at : at + value]
            at += value
        else:
            raise ValueError("a field of another kind")
    return fields
