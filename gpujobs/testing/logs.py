"""Logs in memory that satisfy :class:`gpujobs.core.ports.Logs`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from gpujobs.core.job import JobId
from gpujobs.logwire import GAP, LogRecord


@dataclass(eq=False)
class MemoryLog:
    """One attempt's log.

    Attributes:
        records: What is stored.
        complete: Nothing comes any more.
    """

    records: list[LogRecord] = field(default_factory=list)
    complete: bool = False

    def append_gap(self, text: str, time_ns: int) -> None:
        """Add a line of our own words."""
        self.records.append(LogRecord(time_ns, GAP, text.encode()))

    def reader(self) -> MemoryLogReader:
        """A reader."""
        return MemoryLogReader(self)

    def close(self) -> None:
        """Nothing is to be done."""

    async def finish(self) -> None:
        """Nothing comes any more."""
        self.complete = True


class MemoryLogReader:
    """Reads a log in memory."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log

    async def batches(
        self, *, since_ns: int | None = None, tail: int | None = None, follow: bool = False
    ) -> AsyncIterator[list[LogRecord]]:
        """All of it at once, then what comes."""
        records = self._log.records
        found = [record for record in records if since_ns is None or record.time_ns >= since_ns]
        yield found if tail is None else found[len(found) - min(tail, len(found)) :]
        position = len(records)
        while follow and not self._log.complete:
            await asyncio.sleep(0.1)
            if position < len(records):
                yield records[position:]
                position = len(records)


class MemoryLogs:
    """The logs of all attempts.

    Args:
        kept: What a former server left.
    """

    def __init__(self, kept: dict[tuple[JobId, int], MemoryLog] | None = None) -> None:
        self.kept = {} if kept is None else kept
        self._open: set[tuple[JobId, int]] = set()

    def log(self, job: JobId, attempt: int) -> MemoryLog:
        """The log of an attempt, to be written."""
        self._open.add((job, attempt))
        return self.kept.setdefault((job, attempt), MemoryLog())

    def reader(self, job: JobId, attempt: int) -> tuple[MemoryLogReader, bool] | None:
        """A reader, and whether the log is still being written."""
        found = self.kept.get((job, attempt))
        return None if found is None else (found.reader(), self.is_open(job, attempt))

    def is_open(self, job: JobId, attempt: int) -> bool:
        """Whether it is being written."""
        return (job, attempt) in self._open

    async def finish(self, job: JobId, attempt: int) -> None:
        """It is complete."""
        if (job, attempt) in self._open:
            await self.kept[job, attempt].finish()
            self._open.discard((job, attempt))

    def close(self) -> None:
        """Stop writing all of them."""
        self._open.clear()
