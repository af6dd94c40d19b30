"""The log of one attempt on disk: append-only segments with time and stream, limited in size, readable live.

A log is a directory of segment files, each named by the position of its first byte. A *position* counts the
bytes of all records ever appended, so it stays valid when segments in the middle are dropped: the first
``head_limit`` bytes are kept for good, and after them the last ``tail_limit``.

A segment is ``MAGIC``, the payload bytes and the latest time before it in the log (``>QQ``), and records. A record is
``>QBI`` (time in ns, stream, length), the payload, and the length again (``>I``), by which a log is read
backwards.

Nothing is synced to the disk before the attempt's end: until then the Engine's own log is the truth, and
whatever a crash takes from ours is fetched again. A record torn by a SIGKILL is cut off at the next open.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gpujobs.adapters.logsegments import BEFORE, MAGIC, RESTORED, START, Located, Segment, Store, encode_records, load
from gpujobs.core import errors
from gpujobs.logwire import GAP, STDERR, STDOUT, LogRecord, encode_frame

HEAD_LIMIT = 200_000_000
TAIL_LIMIT = 200_000_000
SEGMENT = 4 << 20
"""Bytes after which a new segment begins: small, as the last one is checked record by record at open."""
_LINE_PIECES = 4096
"""How many records back the start of an unfinished line is looked for when the last lines are asked for."""


class Repair(NamedTuple):
    """The log was cut at ``start`` to put in what had been missed; what stood there has moved by ``shift``.

    Attributes:
        start: Position at which records were missing.
        shift: Bytes by which the old records moved; None while they have not come again.
        payload: Payload bytes that were put in; 0 while that is not known.
    """

    start: int
    shift: int | None
    payload: int


class LogWriter:
    """Appends to the log of one attempt; owned by one event loop, which also runs its readers.

    Args:
        path: The log's directory; made if missing. An existing log is continued, a torn last record cut off.
        head_limit: Bytes of records kept from the start.
        tail_limit: Bytes of records kept from the end, beyond the head.

    Attributes:
        newest_ns: The latest time ever stored, in ns; not always the last record's.
        closed: Nothing more is written.
        repairs: Where records were put in later.

    Raises:
        InvalidInput: There is something else at that path.
        OSError: The disk.
    """

    def __init__(self, path: Path, head_limit: int = HEAD_LIMIT, tail_limit: int = TAIL_LIMIT) -> None:
        self.path = path
        self.closed = False
        self.repairs: list[Repair] = []
        self._head_limit, self._tail_limit = head_limit, tail_limit
        self._segment_size = max(1, min(SEGMENT, tail_limit // 4))
        self._changed = asyncio.Event()
        self._fd = -1
        self._payload = 0
        self.newest_ns = 0
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        segments = load(path)
        torn_at_birth = set(path.glob("*.seg")) - {segment.path for segment in segments}
        for other in torn_at_birth:
            other.unlink()
        self._store = Store(segments)
        if segments:
            self._continue(segments[-1])
        else:
            self._begin(0)

    def _continue(self, last: Segment) -> None:
        position, self._payload, self.newest_ns = self._store.measure(last, last.end)
        self._fd = os.open(last.path, os.O_RDWR | os.O_CLOEXEC | os.O_APPEND)
        if position != last.end:
            os.ftruncate(self._fd, position - last.start + START)
            last.size = position - last.start

    def _begin(self, start: int) -> None:
        path = self.path / f"{start:020d}.seg"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_APPEND, 0o600)
        try:
            os.write(fd, MAGIC + BEFORE.pack(self._payload, self.newest_ns))
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._store.segments.append(Segment(path, start, self._payload, self.newest_ns, 0))
        self._drop()

    def _drop(self) -> None:
        """Drops the oldest segments beyond the head while the rest is more than the tail's limit."""
        segments = self._store.segments
        first = next((i for i, s in enumerate(segments) if s.start >= self._head_limit), len(segments))
        kept = sum(segment.size for segment in segments[first:])
        while kept > self._tail_limit and first < len(segments) - 1:
            dropped = segments.pop(first)
            kept -= dropped.size
            dropped.path.unlink(missing_ok=True)

    @property
    def end(self) -> int:
        """Position after the last record."""
        return self._store.segments[-1].end

    @property
    def payload(self) -> int:
        """Payload bytes ever appended."""
        return self._payload

    def append(self, records: Iterable[LogRecord]) -> int:
        """Appends records with one write and wakes the readers.

        Returns:
            The number of bytes stored.

        Raises:
            OSError: The disk is full or broken; nothing of these records is stored then.
        """
        data, payload, newest = encode_records(records)
        if not data:
            return 0
        if self._store.segments[-1].size >= self._segment_size:
            self._begin(self.end)
        segment = self._store.segments[-1]
        try:
            written = os.write(self._fd, data)
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            os.ftruncate(self._fd, segment.size + START)
            raise
        segment.size += len(data)
        self._payload += payload
        self.newest_ns = max(self.newest_ns, newest)
        self._wake()
        return len(data)

    def append_gap(self, text: str, time_ns: int) -> None:
        """Marks a loss at this place of the log with a sentence."""
        self.append([LogRecord(time_ns, GAP, text.encode())])

    def rewind(self, position: int) -> None:
        """Cuts the log at a record's start, because records are missing there that come again now, with more.

        Readers that have passed the position wait until `resynced` is called.
        """
        segments = self._store.segments
        self._store.close()
        while segments[-1].start > position:
            segments.pop().path.unlink()
        last = segments[-1]
        _, self._payload, self.newest_ns = self._store.measure(last, position)
        os.close(self._fd)
        self._fd = os.open(last.path, os.O_RDWR | os.O_CLOEXEC | os.O_APPEND)
        os.ftruncate(self._fd, position - last.start + START)
        last.size = position - last.start
        if self.repairs and self.repairs[-1].shift is None:  # two cuts before anything came again are one
            position = min(position, self.repairs.pop().start)
        self.repairs.append(Repair(position, None, -self._payload))
        self._wake()

    def resynced(self) -> None:
        """What had stood at the rewound position comes next: everything that was missing is in."""
        start, _, payload = self.repairs[-1]
        self.repairs[-1] = Repair(start, self.end - start, payload + self._payload)
        self._wake()

    def backward(self, end: int | None = None) -> Iterator[list[Located]]:
        """Records before a position (default: the end), the newest first, in batches of at most 256 KiB."""
        return self._store.backward(self.end if end is None else end)

    def reader(self) -> LogReader:
        """A reader that can follow this log while it grows."""
        return LogReader(self.path, live=self)

    async def changed(self) -> None:
        """Waits for the next append, repair or close."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Ends writing without syncing: for a server that stops while the attempt goes on. Idempotent."""
        if self.closed:
            return
        self.closed = True
        os.close(self._fd)
        self._store.close()
        if self.repairs and self.repairs[-1].shift is None:
            self.resynced()
        self._wake()

    async def finish(self) -> None:
        """Ends writing for good: everything is on the disk when this returns; the wait is a thread's."""
        paths = [segment.path for segment in self._store.segments]
        await asyncio.to_thread(_sync, [*paths, self.path])
        self.close()


def _sync(paths: list[Path]) -> None:
    for path in paths:
        with suppress(FileNotFoundError):  # dropped meanwhile
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


class LogReader:
    """Reads one attempt's log in bounded memory, whatever its size.

    Args:
        path: The log's directory.
        live: The writer in this process, if the log is still being written; needed to follow.

    Raises:
        UnknownId: There is no such log.
    """

    def __init__(self, path: Path, live: LogWriter | None = None) -> None:
        if not path.is_dir():
            raise errors.UnknownId(f"there is no log at {path}")
        self._live = live
        self._repaired = 0
        # A live reader shares the writer's list: segments that are added or dropped are seen at once.
        self._store = Store(live._store.segments if live else load(path))

    def _last(self) -> int:
        return self._store.segments[-1].end if self._store.segments else 0

    def _since(self, since_ns: int) -> int:
        """A position before which nothing is so late: a segment early, as times may be out of order."""
        start = previous = 0
        for segment in self._store.segments:
            time_ns = self._store.first_time(segment)
            if time_ns is not None and time_ns >= since_ns:
                break
            start, previous = previous, segment.start
        return start

    def _tail(self, lines: int) -> dict[int, int]:
        """For each stream the position from which the last lines of the whole log begin."""
        end = self._sound_end()
        starts: dict[int, int] = {GAP: end, STDOUT: end, STDERR: end}
        seen: set[int] = set()
        complete: set[int] = set()  # streams whose counted lines are there from their first piece on
        count = extra = 0
        for position, (_, stream, payload) in (item for batch in self._store.backward(end) for item in batch):
            if count >= lines:
                extra += 1
                if extra > _LINE_PIECES or all(starts[s] == end or s in complete for s in (STDOUT, STDERR)):
                    break
            if stream == GAP:
                if count < lines:
                    starts[GAP] = position
                continue
            stream %= RESTORED
            if payload.endswith(b"\n") or stream not in seen:
                seen.add(stream)
                if count >= lines:
                    complete.add(stream)
                else:
                    count += 1
                    starts[stream] = position
            elif stream not in complete:
                starts[stream] = position
        return starts

    def _sound_end(self) -> int:
        """The end of the last whole record: a log that nobody writes may end torn."""
        if self._live is not None or not self._store.segments:
            return self._last()
        last = self._store.segments[-1]
        return self._store.measure(last, last.end)[0]

    async def batches(
        self, *, since_ns: int | None = None, tail: int | None = None, follow: bool = False
    ) -> AsyncIterator[list[LogRecord]]:
        """Yields the log's records in order, in batches of about 256 KiB.

        Args:
            since_ns: Only records as late as this, in ns since the epoch.
            tail: Only the last lines, counted over both streams; 0 with ``follow`` gives only what comes.
            follow: Go on while the log is written, until its writer is closed.
        """
        position = 0 if since_ns is None else self._since(since_ns)
        starts: dict[int, int] = {}
        if tail is not None:
            starts = self._tail(tail)
            position = max(position, min(starts.values()))
        self._repaired = len(self._live.repairs) if self._live else 0
        try:
            while True:
                moved, notes = await self._after_repairs(position)
                shift = moved - position
                starts = {stream: start + shift for stream, start in starts.items()} if shift else starts
                segment = self._store.find(moved)
                if segment is None:
                    position = moved
                    if notes:
                        yield notes
                    elif not follow or self._live is None or self._live.closed:
                        return
                    else:
                        await self._live.changed()
                    continue
                found, position = self._step(segment, moved, notes)
                if not found and position == moved and not notes:
                    return  # a torn end that no writer has cut off yet
                batch = notes + [
                    record if record.stream < RESTORED else record._replace(stream=record.stream - RESTORED)
                    for where, record in found
                    if where >= starts.get(record.stream % RESTORED, 0)
                    and (since_ns is None or record.time_ns >= since_ns)
                ]
                if batch:
                    yield batch
                await asyncio.sleep(0)
        finally:
            self._store.close()

    def _step(self, segment: Segment, position: int, notes: list[LogRecord]) -> tuple[list[Located], int]:
        """Reads on at a position, or at the segment after it; adds to the notes what is missing between."""
        try:
            if segment.start > position:
                notes.append(self._dropped(segment))
            found, after = self._store.forward(segment, max(position, segment.start))
        except FileNotFoundError:  # dropped between the look and the opening; the list has moved on
            notes.clear()
            return [], position + 1
        if not found and segment is not self._store.segments[-1]:
            notes.append(LogRecord(0, GAP, b"gap: a part of the stored log is damaged"))
            after = segment.end
        return found, after

    async def _after_repairs(self, position: int) -> tuple[int, list[LogRecord]]:
        """Where a reader stands after what the writer has put in behind it, and what to tell of that."""
        notes: list[LogRecord] = []
        while self._live is not None and self._repaired < len(self._live.repairs):
            repair = self._live.repairs[self._repaired]
            behind = position > repair.start
            if behind and repair.shift is None:
                await self._live.changed()
                continue
            if behind and repair.shift is not None:
                if position + repair.shift > self._last() and not self._live.closed:
                    await self._live.changed()  # until what this reader has had already is back
                    continue
                position = min(position + repair.shift, self._last())
                notes.append(_missed(repair.payload))
            self._repaired += 1
            self._store.close()
        return position, notes

    async def frames(
        self, *, since_ns: int | None = None, tail: int | None = None, follow: bool = False
    ) -> AsyncIterator[bytes]:
        """Yields what `batches` yields, as frames of `gpujobs.logwire`, many in each chunk of bytes."""
        async for batch in self.batches(since_ns=since_ns, tail=tail, follow=follow):
            yield b"".join(map(encode_frame, batch))

    def _dropped(self, after: Segment) -> LogRecord:
        earlier = [segment for segment in self._store.segments if segment.start < after.start]
        before = self._store.measure(earlier[-1], earlier[-1].end)[1] if earlier else 0
        time_ns = self._store.first_time(after) or 0
        text = (
            f"gap: {after.before - before:,} bytes of output were dropped here: "
            "a log is kept at its start and at its end"
        )
        return LogRecord(time_ns, GAP, text.encode())


def _missed(payload: int) -> LogRecord:
    text = f"gap: {payload:,} bytes of output came late and are not shown here; the stored log has them"
    return LogRecord(0, GAP, text.encode())
