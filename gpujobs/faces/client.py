"""The client of the HTTP API: what a program asks a gpujobs server.

Standard library only, so that commands start fast.

    client = Client(find_host(os.environ))
    for job in client.submit(["train.yaml"])["jobs"]:
        for row in client.watch(str(job["id"])):
            print(row["state"], row["message"])

Every method raises :class:`~gpujobs.core.errors.GpujobsError` with the server's own words. Watching and
following go on where they were when the server is restarted.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from gpujobs.core.errors import GpujobsError, InvalidInput, Unavailable
from gpujobs.faces.transport import ANSWER_SECONDS, Host, Stream, Transport, find_host
from gpujobs.logwire import GAP, LogRecord, decode_frames

__all__ = ["Client", "Host", "Row", "exit_code_of", "find_host", "id_of"]

Row: TypeAlias = dict[str, Any]
"""A job as the API tells it: the contract's keys of ``ps``, and more in ``show``."""

ENDED = ("succeeded", "failed", "cancelled")
"""The states of jobs that will not run any more."""

PATIENCE_SECONDS = 30.0
"""How long a server may be away before watching and following give up: a restart takes a few seconds."""

FIRST_PAUSE_SECONDS = 0.05
STEADY_SECONDS = 5.0
"""A connection that held so long was a good one: what comes after it is a new absence."""

FIRST_RECORD = "gpujobs-first-record"
"""The header of a log's answer: the number, from 0, of its first record within the attempt's log, our own
marks not counted. It lets a log that was asked for with ``tail`` or ``since`` be continued with ``skip``."""


def id_of(row: Mapping[str, Any]) -> str:
    """A row's full id: ``12``, or ``12_3`` for an element of an array."""
    name, index = str(row.get("id")), row.get("index")
    return name if index is None or "_" in name else f"{name}_{index}"


def has_ended(row: Mapping[str, Any]) -> bool:
    """Whether a job will not run any more."""
    return row.get("state") in ENDED


def exit_code_of(row: Mapping[str, Any]) -> int:
    """A job's exit code for a shell: the container's own, but never 0 unless it succeeded."""
    code = row.get("exit_code")
    if row.get("state") == "succeeded":
        return int(code or 0)
    return int(code) if isinstance(code, int) and 0 < code < 256 else 1


class Client:
    """One server's client.

    Args:
        host: Which server.
        tell: Told, in a sentence, when the server is away and when it is back.
        patience: Seconds that watching and following wait for a server that is away.
        answer: Seconds that one answer may take.
    """

    def __init__(
        self, host: Host, *, tell: Callable[[str], None] = lambda _: None, patience: float = PATIENCE_SECONDS,
        answer: float = ANSWER_SECONDS,
    ) -> None:  # fmt: skip
        self.host = host
        self._tell = tell
        self._patience = patience
        self._transport = Transport(host, answer)
        self._met = False
        self._away = False
        self._telling = threading.Lock()

    def require(self) -> None:
        """Return where a server answers; raises as :meth:`~gpujobs.faces.transport.Transport.require`."""
        self._transport.require()

    def server(self) -> dict[str, Any]:
        """Who answers: its version, uid, name, whether its GPUs are simulated."""
        return self._call("GET", "/server")

    def submit(self, files: Sequence[str], *, run_as: str | None = None) -> dict[str, Any]:
        """Submit job files (``-`` is the standard input): all of them or, where one has a mistake, none.

        Returns:
            ``{"jobs": [{"id"}], "count", "message"}``, with one id for each file.
        """
        from gpujobs.faces import jobfiles

        return self._call("POST", "/jobs", body=jobfiles.submission(files, os.environ, run_as=run_as))

    def plan(self, files: Sequence[str], *, run_as: str | None = None) -> dict[str, Any]:
        """What the first job of the files would get now; nothing is done."""
        from gpujobs.faces import jobfiles

        body = jobfiles.submission(files, os.environ, run_as=run_as, secrets=False)
        return self._call("POST", "/plan", body=body)

    def rerun(self, job: str) -> dict[str, Any]:
        """Submit a job or an array again as it was."""
        return self._call("POST", f"/jobs/{_path(job)}/rerun")

    def send_context(
        self, entry: Mapping[str, Any], told: Callable[[int, int], None] = lambda _packed, _all: None
    ) -> None:
        """Pack a directory and send it as the build context that a submission's answer asks for.

        Args:
            entry: One of the answer's ``contexts``.
            told: Told now and then how many bytes of files are packed, and of how many.

        Raises:
            InvalidInput: It cannot be packed; nothing was taken by the server.
            GpujobsError: The server did not take it.
        """
        from gpujobs.buildcontext import pack

        path = f"/jobs/{_path(str(entry['id']))}/context/{quote(str(entry['key']), safe='')}"
        for attempt in self._attempts():
            try:
                self._transport.upload(
                    path, lambda sink: pack(Path(entry["context"]), entry["dockerfile"], sink, told=told)
                )
            except Unavailable as error:
                attempt.failed(error)
            else:
                return

    def jobs(self, *, everything: bool = False, limit: int | None = None) -> list[Row]:
        """The jobs that are to run or running; with ``everything`` those that ended too."""
        return _rows(self.listing(everything=everything, limit=limit))

    def listing(self, *, everything: bool = False, limit: int | None = None) -> Row:
        """As :meth:`jobs`, with ``others`` where others' jobs are only counted: how many are in each state."""
        query = {"all": "1" if everything else "0"}
        if limit is not None:
            query["limit"] = str(limit)
        return self._call("GET", "/jobs", query)

    def job(self, job: str) -> list[Row]:
        """A job in full; of an array all elements by index."""
        return _rows(self._call("GET", f"/jobs/{_path(job)}"))

    def cancel(self, job: str) -> list[Row]:
        """Cancel a job or a whole array; returns once it is recorded."""
        return _rows(self._call("POST", f"/jobs/{_path(job)}/cancel"))

    def gpus(self) -> dict[str, Any]:
        """The machine's GPUs and who has what."""
        return self._call("GET", "/gpus")

    def watch(self, job: str) -> Iterator[Row]:
        """A job's row (of an array: each element's) now and at every change, until all have ended."""
        last: dict[str, Row] = {}
        for attempt in self._attempts():
            try:
                stream = self._stream(f"/jobs/{_path(job)}/watch", {})
                attempt.opened()
                for line in _lines(stream.chunks):
                    attempt.made_progress()
                    row = json.loads(line)
                    if last.get(id_of(row)) != row:
                        last[id_of(row)] = row
                        yield row
            except Unavailable as error:
                attempt.failed(error)
                continue
            if last and all(has_ended(row) for row in last.values()):
                return
            attempt.failed(None)

    def logs(
        self, job: str, *, follow: bool = False, tail: int | None = None, since: float | None = None,
        attempt: int | None = None,
    ) -> Iterator[LogRecord]:  # fmt: skip
        """The records of one job's log.

        Args:
            job: One job or one element; not a whole array.
            follow: Go on until the attempt has ended and all of its output was given.
            tail: Only the last so many lines.
            since: Only from this time on, in seconds since the epoch.
            attempt: Which attempt; the last by default.
        """
        for batch in self.log_batches(job, follow=follow, tail=tail, since=since, attempt=attempt):
            yield from batch

    def log_batches(
        self, job: str, *, follow: bool = False, tail: int | None = None, since: float | None = None,
        attempt: int | None = None,
    ) -> Iterator[list[LogRecord]]:  # fmt: skip
        """As :meth:`logs`, with the records that came together."""
        query = {"follow": "1" if follow else "0"}
        if tail is not None:
            query["tail"] = str(tail)
        if since is not None:
            query["since"] = f"{since:.6f}"
        if attempt is not None:
            query["attempt"] = str(attempt)
        first: int | None = None
        received = 0
        for trial in self._attempts():
            try:
                stream = self._stream(f"/jobs/{_path(job)}/logs", query)
                trial.opened()
                if first is None:
                    first = _first_record(stream.headers, whole=tail is None and since is None)
                for batch in _batches(stream.chunks):
                    trial.made_progress()
                    received += sum(record.stream != GAP for record in batch)
                    yield batch
            except Unavailable as error:
                trial.failed(error)
            else:
                if not follow or self._is_over(job, attempt):
                    return
                trial.failed(None)
            # What was given is not asked for again, however the log has grown in the meantime.
            if first is None and received:
                raise Unavailable("the log broke off and its server cannot continue it", hint="Ask for it again.")
            if first is not None:
                query.pop("tail", None)
                query.pop("since", None)
                query["skip"] = str(first + received)

    def _is_over(self, job: str, attempt: int | None) -> bool:
        """Whether a followed log that ended had reason to: a server that stops may end it early."""
        try:
            (row, *others) = self.job(job)
        except Unavailable:
            return False
        return bool(others) or has_ended(row) or (attempt is not None and int(row.get("attempt") or 0) > attempt)

    def _attempts(self) -> Iterator[_Attempt]:
        """Attempts at one exchange, with pauses between them; a server never met is not waited for."""
        attempt = _Attempt(lambda: self._patience if self._met else 0.0, self._tell_away)
        while True:
            yield attempt

    def _tell_away(self, away: bool, sentence: str) -> None:
        """Tell once that the server is away, and once that it is back, however many threads notice."""
        with self._telling:
            if self._away != away:
                self._away = away
                self._tell(sentence)

    def _call(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: object = None
    ) -> dict[str, Any]:
        answer = self._transport.call(method, path, query, body)
        self._met = True
        return answer

    def _stream(self, path: str, query: Mapping[str, str]) -> Stream:
        stream = self._transport.stream(path, query)
        self._met = True
        return stream


class _Attempt:
    """Trying again: how long a server has been away."""

    def __init__(self, patience: Callable[[], float], tell: Callable[[bool, str], None]) -> None:
        self._patience = patience
        self._tell = tell
        self._opened: float | None = None
        self._deadline: float | None = None
        self._pause = FIRST_PAUSE_SECONDS

    def opened(self) -> None:
        """The server answers; whether it goes on to do so is still to be seen."""
        self._opened = time.monotonic()
        self._tell(False, "the server is back")

    def made_progress(self) -> None:
        """Something came: from here the patience is whole again."""
        self._deadline = None
        self._pause = FIRST_PAUSE_SECONDS

    def failed(self, error: GpujobsError | None) -> None:
        """Pause before the next attempt; None for a stream that ended in good order but too early.

        Raises:
            GpujobsError: ``error``, when the patience is over.
        """
        now = time.monotonic()
        if self._opened is not None and now - self._opened > STEADY_SECONDS:
            self.made_progress()
        self._opened = None
        if error is not None:
            if self._deadline is None:
                self._deadline = now + self._patience()
            if now >= self._deadline:
                raise error
            if self._pause > 0.3:
                patience = f"{self._patience():.0f}"
                self._tell(True, f"the server is away; waiting up to {patience} s for it (jobs go on)")
        time.sleep(self._pause)
        self._pause = min(2.0, self._pause * 2)


def _rows(answer: Mapping[str, Any]) -> list[Row]:
    return list(answer.get("jobs") or [])


def _path(job: str) -> str:
    """An id as a part of a path; whether it is one is the server's to say, who knows what ids look like."""
    if not job:
        raise InvalidInput("a job's id is empty", hint="`gpujobs ps` lists them.")
    return quote(job, safe="", errors="backslashreplace")


def _first_record(headers: Mapping[str, str], *, whole: bool) -> int | None:
    """Which record an answer begins with; None where its server does not say."""
    for name, value in headers.items():
        if name.lower() == FIRST_RECORD and value.isdecimal():
            return int(value)
    return 0 if whole else None


def _batches(chunks: Iterable[bytes]) -> Iterator[list[LogRecord]]:
    """Whole records; a part of a record that a broken connection left is dropped.

    Raises:
        GpujobsError: It is no log.
    """
    rest = b""
    for chunk in chunks:
        try:
            records, rest = decode_frames(rest + chunk)
        except ValueError as error:
            raise GpujobsError(f"the log cannot be read: {error}") from error
        if records:
            yield records


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines; a part of a line that a broken connection left is dropped."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line for line in lines if line.strip())
