"""Following jobs: their output on the streams it came from, and, for ``run``, what becomes of them."""

from __future__ import annotations

import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import BinaryIO, TypeVar

from gpujobs.faces.cli.common import output_closed, tell
from gpujobs.faces.cli.pulls import PullView
from gpujobs.faces.client import Client, Row, has_ended, id_of
from gpujobs.faces.render import state_line
from gpujobs.faces.words import clean, harmless
from gpujobs.logwire import GAP, STDERR, LogRecord

T = TypeVar("T")

MAX_LINE = 8 << 20
"""A line longer than this is handled in parts, where lines are told apart at all."""


@dataclass(frozen=True, slots=True)
class Look:
    """How output is shown; with none of these it is passed on byte for byte.

    Attributes:
        timestamps: The time before each line.
        grep: Only lines in which this is found.
    """

    timestamps: bool = False
    grep: re.Pattern[bytes] | None = None


class Printer:
    """Puts the records of logs on our own streams.

    One's own job's output passes byte for byte. On a terminal, lines behind a prefix and those of somebody else's
    job are shown with what a terminal would act on escaped: they could pass for other jobs' lines, or do worse.

    Args:
        look: How output is shown.
        prefixed: The job's id is before each line.
        others: The job is somebody else's.
    """

    def __init__(self, look: Look | None = None, *, prefixed: bool = False, others: bool = False) -> None:
        self._look = look or Look()
        self.prefixed = prefixed
        self._others = others
        self._partial: dict[tuple[str, int], tuple[int, bytearray]] = {}
        self._last: BinaryIO | None = None

    def records(self, job: str, records: Iterable[LogRecord]) -> None:
        """Show records of a job's log.

        Raises:
            typer.Exit: Nobody reads us any more.
        """
        for record in records:
            self._record(job, record)

    def _record(self, job: str, record: LogRecord) -> None:
        if record.stream == GAP:
            self.flush()
            tell(f"job {job}: {clean(record.payload.decode(errors='replace').strip())}")
        elif not (self._guarded(record.stream) or self.prefixed or self._look.timestamps or self._look.grep):
            self._write(record.stream, record.payload)
        else:
            self._lines(job, record)

    def end(self, job: str) -> None:
        """Show what a log ended with that was no whole line."""
        for (name, stream), (time_ns, rest) in list(self._partial.items()):
            if name == job:
                del self._partial[name, stream]
                self._line(job, stream, time_ns, bytes(rest))

    def flush(self) -> None:
        """Let everything be seen."""
        try:
            if self._last is not None:
                self._last.flush()
        except BrokenPipeError as error:
            raise output_closed() from error

    def _lines(self, job: str, record: LogRecord) -> None:
        time_ns, rest = self._partial.pop((job, record.stream), (record.time_ns, bytearray()))
        first, newline, others = record.payload.partition(b"\n")
        rest += first
        if newline:
            self._line(job, record.stream, time_ns, bytes(rest))
            *lines, last = others.split(b"\n")
            for line in lines:
                self._line(job, record.stream, record.time_ns, line)
            time_ns, rest = record.time_ns, bytearray(last)
        if len(rest) > MAX_LINE:
            self._line(job, record.stream, time_ns, bytes(rest))
        elif rest:
            self._partial[job, record.stream] = (time_ns, rest)

    def _line(self, job: str, stream: int, time_ns: int, line: bytes) -> None:
        if self._look.grep is not None and not self._look.grep.search(line):
            return
        before = f"{job} | " if self.prefixed else ""
        if self._look.timestamps:
            before += f"{_time(time_ns)} "
        if self._guarded(stream):
            line = harmless(line)
        self._write(stream, before.encode() + line + b"\n")

    def _guarded(self, stream: int) -> bool:
        return (self.prefixed or self._others) and (sys.stderr if stream == STDERR else sys.stdout).isatty()

    def _write(self, stream: int, data: bytes) -> None:
        to = sys.stderr.buffer if stream == STDERR else sys.stdout.buffer
        try:
            if self._last is not to and self._last is not None:
                self._last.flush()
            to.write(data)
        except BrokenPipeError as error:
            raise output_closed() from error
        self._last = to


def _time(time_ns: int) -> str:
    """RFC 3339 in UTC to the microsecond."""
    seconds, rest = divmod(time_ns, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06}Z"


@dataclass(slots=True)
class Follower:
    """Follows jobs until all have ended and their output was shown.

    Each job is watched, and each attempt's log read, by a thread of its own; the main thread shows it all.

    Attributes:
        progress: Tell on standard error what becomes of the jobs.
        tail: For the logs of jobs that were running when they were first seen, only so many lines.
        since: Only output from this time on, in seconds since the epoch.
        attempt: Only this attempt's log.
    """

    client: Client
    printer: Printer
    progress: bool = False
    tail: int | None = None
    since: float | None = None
    attempt: int | None = None
    _events: queue.Queue[Callable[[], None]] = field(default_factory=lambda: queue.Queue(1024))
    _rows: dict[str, Row] = field(default_factory=dict)
    _told: dict[str, str] = field(default_factory=dict)
    _logs: set[tuple[str, int]] = field(default_factory=set)
    _named: set[str] = field(default_factory=set)
    _open: int = 0
    _pulls: PullView = field(default_factory=PullView)

    def follow(self, jobs: list[str]) -> list[Row]:
        """Follow them to their ends.

        Returns:
            The last rows, in the order of the arguments and of the indices within each.

        Raises:
            GpujobsError: What one of the threads met.
            typer.Exit: Nobody reads us any more.
        """
        self._named = set(jobs)
        for job in jobs:
            self._start(self.client.watch(job), self._row, lambda: None)
        try:
            self._until_all_ended()
        finally:
            self._pulls.pause()
        self.printer.flush()
        return in_order(self._rows, jobs)

    def _until_all_ended(self) -> None:
        while self._open:
            try:
                happened = self._events.get_nowait()
            except queue.Empty:
                self.printer.flush()
                happened = self._events.get()
            happened()

    def _row(self, row: Row) -> None:
        """A job is in a new state: tell of it, and read the log of an attempt that begins."""
        job = id_of(row)
        first = job not in self._rows
        self._rows[job] = row
        # An element of an array that was asked for as a whole is named, also where it is the only one.
        self.printer.prefixed = self.printer.prefixed or job not in self._named
        number = self.attempt or int(row.get("attempt") or 0)
        running = row.get("state") != "queued" and int(row.get("attempt") or 0) > 0  # a build's output comes before
        if running and (job, number) not in self._logs:
            self._logs.add((job, number))
            batches = self.client.log_batches(
                job, follow=True, attempt=number, since=self.since, tail=self.tail if first else None
            )
            self._start(batches, partial(self._records, job), partial(self.printer.end, job))
        if row.get("state") == "pulling":
            if self.progress and row.get("index") is None and self._pulls.show(job, row):
                return
        else:
            self._pulls.pause()
        if self.progress and not has_ended(row):
            line = state_line(row)
            if self._told.get(job) != line and (row.get("index") is None or row.get("state") == "running"):
                self._told[job] = line
                self.printer.flush()
                tell(f"job {clean(job)} {line}")

    def _records(self, job: str, records: list[LogRecord]) -> None:
        self._pulls.pause()
        self.printer.records(job, records)

    def _start(self, source: Iterable[T], show: Callable[[T], None], end: Callable[[], None]) -> None:
        """Read a source in a thread of its own; what comes, and its end, is shown by the main thread."""

        def read() -> None:
            failure: Exception | None = None
            try:
                for item in source:
                    self._events.put(partial(show, item))
            except Exception as error:  # noqa: BLE001 - it is raised again by the thread that follow() runs in
                failure = error
            self._events.put(partial(self._closed, failure, end))

        self._open += 1
        threading.Thread(target=read, daemon=True).start()

    def _closed(self, failure: Exception | None, end: Callable[[], None]) -> None:
        self._open -= 1
        if failure is not None:
            raise failure
        end()


def in_order(rows: dict[str, Row], jobs: list[str]) -> list[Row]:
    """Rows in the order of the arguments, and of the indices within each array; each once."""
    ordered: dict[str, Row] = {}
    for job in jobs:
        named = [name for name in rows if job in (name, name.partition("_")[0])]
        for name in sorted(named, key=lambda name: int(name.partition("_")[2] or 0)):
            ordered[name] = rows[name]
    return list(ordered.values())
