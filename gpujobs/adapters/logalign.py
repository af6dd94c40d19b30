"""Where the Engine's answer continues what is stored: no record twice, none lost without a mark.

The Engine gives a container's messages always in the same order, the one of its file. What is stored is a part
of that sequence, so the two are laid over each other by content: time, stream and bytes of each message. Times
alone would not do, nor would the Engine's ``since``: all pieces of one unfinished line bear the time of its
first piece, hours old for a progress bar, and the two streams' times cross. The Engine is therefore asked for
its last N messages, with N larger than the overlap that is wanted.

Equal neighbours (the zeros of a long line: same time, same bytes) are told apart by counting them from the
start of their run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from enum import Enum, auto

from gpujobs.adapters.logfile import LogWriter
from gpujobs.adapters.logsegments import RESTORED, stored_size
from gpujobs.logwire import GAP, LogRecord

LOSS = b"gap:"
"""How our own words begin where they mark that something is missing."""

INDEX_RECORDS = 120_000
"""Records of the stored end that are held against an answer: about 25 MB of memory."""


_Digest = tuple[int, int, int]
"""Of a stored record: its position, stream, and hash."""


class _Runs:
    """Counts equal neighbours on each stream; of the first run the count is known only at a log's start."""

    def __init__(self, *, from_start: bool) -> None:
        self._from_start = from_start
        self._last: dict[int, int] = {}
        self._count: dict[int, int | None] = {}

    def of(self, stream: int, digest: int) -> int | None:
        """How many equal records precede this one directly on its stream; None where that is not known."""
        last = self._last.get(stream)
        if last == digest:
            count = self._count[stream]
            self._count[stream] = None if count is None else count + 1
        else:
            self._last[stream] = digest
            self._count[stream] = 0 if last is not None or self._from_start else None
        return self._count[stream]

    def forget(self) -> None:
        """Something may be missing here: the next runs are of unknown length."""
        self._last.clear()
        self._from_start = False


class Index:
    """The end of a stored log, as digests.

    Attributes:
        positions: Where each record begins.
        digests: Hash of each record.
        places: Place in these lists by (digest, number in its run), for those whose number is known.
    """

    def __init__(self, *, from_start: bool) -> None:
        self.positions: list[int] = []
        self.digests: list[int] = []
        self.places: dict[tuple[int, int], int] = {}
        self._runs = _Runs(from_start=from_start)

    def add(self, records: Iterable[_Digest]) -> None:
        """Takes the next records."""
        for position, stream, digest in records:
            if stream == GAP:
                self._runs.forget()
                continue
            if stream >= RESTORED:
                continue
            run = self._runs.of(stream, digest)
            if run is not None:
                self.places[digest, run] = len(self.digests)
            self.positions.append(position)
            self.digests.append(digest)

    def __len__(self) -> int:
        return len(self.digests)


async def index(log: LogWriter, position: int) -> Index:
    """Indexes the stored records from about a position to the end; further back if these cannot be told apart."""
    wanted = INDEX_RECORDS
    while True:
        found: list[list[_Digest]] = []
        count = 0
        whole = log.end == 0
        expected = log.end
        for batch in log.backward():
            first, record = batch[0]
            if first + stored_size(record) != expected:
                break  # the middle of the log has been dropped here: what lies before does not adjoin
            found.append([
                (at, record.stream, hash(record)) for at, record in batch
                if record.stream != GAP or record.payload.startswith(LOSS)  # our other words part nothing
            ])  # fmt: skip
            count += len(batch)
            expected = batch[-1][0]
            whole = expected == 0
            if count >= wanted or expected <= position:
                break
            await asyncio.sleep(0)
        made = Index(from_start=whole)
        while found:
            made.add(reversed(found.pop()))
            await asyncio.sleep(0)
        if made.places or whole or (count < wanted and expected > position):
            return made
        wanted, position = wanted * 4, expected // 2


class State(Enum):
    """How far an answer has been aligned."""

    SEARCH = auto()
    MATCH = auto()
    NEW = auto()
    TOO_LATE = auto()


class Aligner:
    """Lays one answer of the Engine over the stored end of the log.

    Args:
        log: Is rewound where the answer has records that it lacks.
        stored: Its end.
        whole: The answer is everything that the Engine has.

    Attributes:
        state: ``TOO_LATE``: the answer begins after the stored end; one that begins earlier is needed.
        lost: Everything between the stored end and this answer has been lost.
        resync: Digest of the record that stood where the log was rewound; None if it was not.
    """

    def __init__(self, log: LogWriter, stored: Index, *, whole: bool) -> None:
        self._log = log
        self._stored = stored
        self._whole = whole
        self._newest_ns = log.newest_ns
        self._next = 0
        self._runs = _Runs(from_start=whole)
        self.lost = False
        self.resync: int | None = None
        self.state = State.SEARCH if len(stored) else State.NEW

    @property
    def short(self) -> bool:
        """Whether the answer, if it ends here, has less than what is stored."""
        return self.state is State.MATCH and self._next < len(self._stored)

    def feed(self, records: list[LogRecord]) -> list[LogRecord]:
        """Takes the next records of the answer; returns those that are to be stored."""
        if self.state is State.NEW:
            return records
        for number, record in enumerate(records):
            digest = hash(record)
            if self.state is State.SEARCH:
                reached = self._search(record, digest)
                self.state = reached
                if reached is State.TOO_LATE:
                    return []
                if reached is State.NEW:
                    return records[number:]
            elif self._next == len(self._stored):
                self.state = State.NEW
                return records[number:]
            elif digest == self._stored.digests[self._next]:
                self._next += 1
            else:
                self.resync = self._stored.digests[self._next]
                self._log.rewind(self._stored.positions[self._next])
                self.state = State.NEW
                return records[number:]
        return []

    def _search(self, record: LogRecord, digest: int) -> State:
        run = self._runs.of(record.stream, digest)
        place = None if run is None else self._stored.places.get((digest, run))
        if place is not None:
            self._next = place + 1
            return State.MATCH
        if record.time_ns > self._newest_ns:
            # Later than everything stored, so it is not stored; and as the order never changes, all that is
            # stored was before it.
            self.lost = self._whole
            return State.NEW if self._whole else State.TOO_LATE
        return State.SEARCH
