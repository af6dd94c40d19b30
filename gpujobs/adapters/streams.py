"""Long streams from the Docker Engine, each one socket of the event loop: its events, and containers' logs.

A log is complete whatever is killed on the way, and this is how. Engine 20.10's ``follow`` silently skips
whole files when its log is rotated faster than it is read (seen: 111 of 424 MB arrived from a writer at full
speed); a read without ``follow`` never does, as it holds all files open. So a log is read in turns:

1. A *snapshot* (no ``follow``) is laid over what is stored (`gpujobs.adapters.logalign`), and what is new is
   appended; where the stored end turns out to lack something, it is cut and written again.
2. When a snapshot brings little news, ``follow`` shows what is written live, up to `FOLLOW_BYTES`: less than
   one of the Engine's files. Then, and when the stream ends, comes a snapshot, which finds what was skipped.

A writer faster than this reader is read by snapshots alone; what the Engine has dropped before it could be read
is marked in the log as a gap.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gpujobs.adapters.enginesocket import Answer, Backoff, Demultiplexer, NotFound, parse_host
from gpujobs.adapters.logalign import INDEX_RECORDS, Aligner, Index, State, index
from gpujobs.adapters.logfile import LogWriter
from gpujobs.adapters.lognewlines import Newlines, ended_line, newline
from gpujobs.core.ports import Disconnected, EngineEvent, LogEnd, Reconnected
from gpujobs.logwire import LogRecord

logger = logging.getLogger(__name__)

_MAX_SIZE, _MAX_FILE = 32, 8
LOG_CONFIG: Mapping[str, object] = {
    "Type": "local",
    "Config": {"max-size": f"{_MAX_SIZE}m", "max-file": str(_MAX_FILE), "compress": "false"},
}
"""``HostConfig.LogConfig`` of every container: at least 224 MB of what was written last can be read again.

100 MB in 80-byte lines are 134 MB in the Engine's files. Not compressed: of compressed files Engine 20.10
leaves out all but the newest ones as soon as the oldest lies before ``since``, and it unpacks every one of
them for each read.
"""

_WINDOW = (_MAX_FILE - 1) * _MAX_SIZE * 1_000_000
_SILENCE_SECONDS = 120.0
_ENGINE_OVERHEAD = 28
"""Bytes that the Engine's file holds for each message beyond its text (107 bytes for 79, measured)."""

FOLLOW_BYTES = 16 << 20
"""Bytes taken from one ``follow`` before a snapshot checks them: half of one of the Engine's files."""
_FOLLOW_MESSAGES = INDEX_RECORDS * 5 // 6
_CAUGHT_UP = 1 << 20
"""A snapshot with less news than this has caught up with the writer."""
_OVERLAP = 64 << 10
_OVERLAP_MESSAGES = 4096
_TURNS_AFTER_END = 10
"""An ended container's log does not grow: two turns show that all is stored. More of them would write for ever."""
_ALL_MESSAGES = 8_000_000
_REMEMBERED = 512  # events: twice as many as the Engine keeps for those who connect


async def engine_events(
    host: str, since: float, filters: Mapping[str, list[str]]
) -> AsyncIterator[EngineEvent | Disconnected | Reconnected]:
    """Yields what happens in the Engine until it is cancelled or closed; outlives restarts of the Engine.

    Args:
        host: ``DOCKER_HOST``.
        since: From when, in seconds since the epoch; the Engine remembers its last 256 events.
        filters: As of the Engine's API, such as ``{"type": ["container"], "label": ["gpujobs.server"]}``.

    Yields:
        Events, except those of exec; `Disconnected` once when the Engine goes, `Reconnected` when it is back.

    Raises:
        InvalidInput: The host.
    """
    address = parse_host(host)
    last_ns = int(since * 1e9)
    seen: dict[tuple[int, str, str], None] = {}  # the latest ones, in the order in which they came
    connected, backoff = True, Backoff()
    while True:
        answer = Answer(address)
        rest = b""
        try:
            after = f"{last_ns // 10**9}.{last_ns % 10**9:09d}"
            await answer.open("/events", since=after, filters=json.dumps(dict(filters)))
            if not connected:
                connected = True
                yield Reconnected()
            backoff.reset()
            while data := await answer.receive():
                *lines, rest = (rest + data).split(b"\n")
                for event in map(_event, lines):
                    # What came last comes again after each connect. It is not told by its time: the machine's clock
                    # may have been set back since.
                    key = (event.time_ns, event.id, event.action) if event else (0, "", "")
                    if event is None or key in seen:
                        continue
                    seen[key] = None
                    if len(seen) > _REMEMBERED:
                        del seen[next(iter(seen))]
                    last_ns = event.time_ns
                    yield event
            reason = "the Engine ended the connection"
        except (OSError, NotFound, ValueError) as error:
            reason = str(error) or type(error).__name__
        finally:
            answer.close()
        if connected:
            connected = False
            yield Disconnected(reason)
        await backoff.wait()


def _event(line: bytes) -> EngineEvent | None:
    if not line.strip():
        return None
    raw: dict[str, Any] = json.loads(line)
    action = str(raw.get("Action", ""))
    if action.startswith("exec_"):
        return None
    actor = raw.get("Actor") or {}
    return EngineEvent(
        int(raw.get("timeNano", 0)),
        str(raw.get("Type", "")),
        action,
        str(actor.get("ID", "")),
        dict(actor.get("Attributes") or {}),
    )


@dataclass(slots=True)
class _Turn:
    """What one read of the Engine's log brought."""

    state: State = State.SEARCH
    short: bool = False
    broken: str = ""
    received: int = 0
    messages: int = 0
    stored: int = 0
    engine_bytes: int = 0
    first_ns: int = 0


def _wider(probe: tuple[int, int], earlier: tuple[int, int] | None, wanted_ns: int) -> int:
    """How many messages to ask for when an answer began too late; 0: for all.

    An answer that begins too late is dropped at its first message, and so costs little; one that begins too
    early costs all of its messages. So the number is worked out from how far back two answers reached.

    Args:
        probe: Number of messages asked for, and the first one's time in ns.
        earlier: The same of the answer before it.
        wanted_ns: Time of a message that is to be in the next answer.
    """
    tail, first_ns = probe
    wider = tail * 4
    if earlier is not None and earlier[1] > first_ns:
        each = (tail - earlier[0]) / (earlier[1] - first_ns)
        wider = tail + int(each * max(0, first_ns - wanted_ns) * 1.1)
    wider = min(max(wider, tail + tail // 4), tail * 16)
    return wider if wider < _ALL_MESSAGES else 0


class _Follower:
    """Follows one container's log into one writer."""

    def __init__(self, address: str | tuple[str, int], container: str, log: LogWriter) -> None:
        self._address = address
        self._path = f"/containers/{quote(container, safe='')}"
        self._log = log
        self._verified = max(0, log.end - FOLLOW_BYTES)  # what a former process did not live to verify
        self._newlines = Newlines(log)
        self._swallows_newlines = False
        self._resync: int | None = None
        self._gaps = 0
        self._shorts = 0

    async def run(self) -> LogEnd:
        backoff = Backoff()
        told = ""
        after_end = 0
        while True:
            try:
                running = await self._running()
                turn = await self._snapshot()
                after_end += not running
                if not running and (not turn.stored or after_end > _TURNS_AFTER_END):
                    self._doubts(turn)
                    await self._last_newlines()
                    return LogEnd(gone=False, gaps=self._gaps)
                began = time.monotonic()
                if running and turn.stored < _CAUGHT_UP:
                    turn = await self._live()
                if turn.stored or time.monotonic() > began + 1:
                    backoff.reset()
                    told = ""
                    continue
            except NotFound:
                return LogEnd(gone=True, gaps=self._gaps)
            except OSError as error:  # of the Engine, or of our own disk: the Engine keeps the log meanwhile
                if str(error) != told:
                    told = str(error)
                    logger.warning("the log of %s waits: %s", self._path, error or type(error).__name__)
            await backoff.wait()

    async def _get(self, path: str) -> dict[str, Any]:
        answer = Answer(self._address)
        try:
            await answer.open(path)
            body = b""
            async with asyncio.timeout(_SILENCE_SECONDS):
                while data := await answer.receive():
                    body += data
        finally:
            answer.close()
        self._swallows_newlines = 0 < answer.engine_major < 23
        try:
            found: dict[str, Any] = json.loads(body)
        except ValueError as error:  # cut short
            raise ConnectionError("the Engine's answer ended early") from error
        return found

    async def _running(self) -> bool:
        state = (await self._get(f"{self._path}/json"))["State"]
        return state["Status"] not in ("exited", "dead", "removing")

    async def _last_newlines(self) -> None:
        """Adds the newline of a long line at the very end, if there was one."""
        doubtful = self._newlines.doubtful() if self._swallows_newlines else []
        if not doubtful:
            return
        container = str((await self._get(f"{self._path}/json"))["Id"])
        root = Path(str((await self._get("/info"))["DockerRootDir"]))
        for stream, time_ns in doubtful:
            local = isinstance(self._address, str)
            if not local or ended_line(root, container, stream, time_ns) is not False:
                self._log.append([newline(stream, time_ns)])

    async def _snapshot(self) -> _Turn:
        """Reads everything there is beyond what is stored, without ``follow``: nothing is left out."""
        stored = await index(self._log, self._verified - _OVERLAP)
        tail = len(stored) + _OVERLAP_MESSAGES if len(stored) else 0
        earlier: tuple[int, int] | None = None
        while True:
            turn = await self._read(stored, tail, follow=False)
            if tail == 0 or turn.broken or turn.state not in (State.TOO_LATE, State.SEARCH):
                break
            probe = tail, turn.first_ns
            tail = _wider(probe, earlier, self._log.newest_ns)
            earlier = probe
        if turn.short:
            self._shorts += 1
            if self._shorts < 3:
                raise ConnectionError("the Engine's answer ended early")
        self._shorts = 0
        if not len(stored) and turn.engine_bytes > _WINDOW:
            self._gap("gap: output before this may have been lost at its start: the Engine's log had been rotated")
        self._verified = self._log.end
        return turn

    async def _live(self) -> _Turn:
        """Follows what is written, until the stream ends or so much has come that it is to be checked."""
        stored = await index(self._log, self._verified - _OVERLAP)
        return await self._read(stored, len(stored) + _OVERLAP_MESSAGES if len(stored) else 0, follow=True)

    async def _read(self, stored: Index, tail: int, *, follow: bool) -> _Turn:
        turn = _Turn()
        aligner = Aligner(self._log, stored, whole=tail == 0)
        demultiplexer = Demultiplexer()
        answer = Answer(self._address)
        try:
            await answer.open(
                f"{self._path}/logs",
                stdout=1,
                stderr=1,
                timestamps=1,
                follow=int(follow),
                tail=tail or "all",
            )
            while True:
                try:
                    async with asyncio.timeout(_SILENCE_SECONDS):
                        data = await answer.receive()
                except TimeoutError:
                    if follow:  # nothing is written, or the Engine has forgotten us: the next turn shows which
                        break
                    raise
                if not data:
                    break
                records = demultiplexer.feed(data)
                if records and not turn.messages:
                    turn.first_ns = records[0].time_ns
                turn.received += len(data)
                turn.messages += len(records)
                if tail == 0:
                    turn.engine_bytes += sum(len(record.payload) + _ENGINE_OVERHEAD for record in records)
                fresh = aligner.feed(records)
                if aligner.resync is not None:
                    self._resync, aligner.resync = aligner.resync, None
                    self._newlines.load()
                if aligner.lost:
                    aligner.lost = False
                    self._lost(self._log.newest_ns, fresh[0].time_ns)
                turn.stored += self._store(fresh)
                if aligner.state is State.TOO_LATE or demultiplexer.broken:
                    break
                if follow and (turn.received > FOLLOW_BYTES or turn.messages > _FOLLOW_MESSAGES):
                    break
        finally:
            answer.close()
        turn.state, turn.short, turn.broken = aligner.state, aligner.short, demultiplexer.broken
        return turn

    def _doubts(self, turn: _Turn) -> None:
        """Marks at a log's end that the Engine could not give what it should have."""
        if turn.broken:
            self._gap(f"gap: the Engine could not read the rest of its log: {turn.broken}")
        elif turn.state is State.SEARCH or turn.stored:
            self._gap("gap: the Engine's log does not continue what is stored here: output may be missing")

    def _store(self, records: list[LogRecord]) -> int:
        if self._resync is None or not records:
            return self._log.append(self._newlines.restore(records))
        stored = 0
        for number, record in enumerate(records):
            if hash(record) == self._resync:
                self._resync = None
                stored = self._log.append(self._newlines.restore(records[:number]))
                self._log.resynced()
                records = records[number:]
                break
        return stored + self._log.append(self._newlines.restore(records))

    def _lost(self, after_ns: int, until_ns: int) -> None:
        first, last = (datetime.fromtimestamp(ns / 1e9, UTC).isoformat() for ns in (after_ns, until_ns))
        self._gap(f"gap: output between {first} and {last} was lost: the Engine's log had been rotated", until_ns)

    def _gap(self, text: str, time_ns: int | None = None) -> None:
        self._gaps += 1
        self._log.append_gap(text, time.time_ns() if time_ns is None else time_ns)


async def follow_log(host: str, container_id: str, log: LogWriter) -> LogEnd:
    """Copies a container's log until the container has ended and everything is stored.

    Continues whatever is stored already, without loss or doubling; waits for an Engine that does not answer,
    and for a full disk, as long as it takes. Cancelling leaves a log that a later call continues.

    Args:
        host: ``DOCKER_HOST``.
        container_id: Id or name of a container that has been started, with `LOG_CONFIG` and no terminal.
        log: Where it goes; neither closed nor synced here.

    Raises:
        InvalidInput: The host.
    """
    return await _Follower(parse_host(host), container_id, log).run()
