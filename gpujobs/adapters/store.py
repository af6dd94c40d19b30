"""The ledger: SQLite in WAL mode, one writer thread that commits what has come in as one group.

A change is a function of a :class:`Ledger`. It runs inside a transaction of its own (a savepoint); what it
returns comes back once the group is on disk (``synchronous=FULL``). Reads have a connection and a thread of
their own and never hold a transaction open.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from gpujobs.core import codec
from gpujobs.core import job as jobs
from gpujobs.core.errors import Refused, Unavailable
from gpujobs.core.job import Allocation, Job, JobId, Owner
from gpujobs.core.spec import JobSpec

T = TypeVar("T")

_NETWORK_FILE_SYSTEMS = {0x6969: "NFS", 0xFF534D42: "CIFS", 0xFE534D42: "SMB2", 0x517B: "SMB", 0x65735546: "FUSE",
                         0x01021997: "9p", 0x0BD00BD0: "Lustre", 0x47504653: "GPFS", 0x19830326: "BeeGFS",
                         0x00C36400: "Ceph", 0x5346414F: "AFS"}  # fmt: skip
"""File systems on which SQLite's WAL does not work: linux/magic.h, and the vendors' own numbers."""

_GROUP = 256
_FINISHED: dict[str, type] = {"queued": jobs.Queued, "pulling": jobs.Pulling, "starting": jobs.Starting,
                              "running": jobs.Running, "stopping": jobs.Stopping, "succeeded": jobs.Ended,
                              "failed": jobs.Ended, "cancelled": jobs.Ended}  # fmt: skip


def _package_text(folder: str) -> dict[str, str]:
    root = resources.files("gpujobs.adapters") / folder
    return {entry.name: entry.read_text() for entry in root.iterdir() if entry.name.endswith(".sql")}


def _queries() -> dict[str, str]:
    text = _package_text("sql")["queries.sql"]
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return {name: statement.strip().rstrip(";") for name, statement in zip(parts[1::2], parts[2::2], strict=True)}


QUERIES = _queries()


def migrations() -> list[tuple[int, str]]:
    """The numbered schema changes, in order: (version after it, SQL)."""
    return sorted((int(name[:4]), text) for name, text in _package_text("migrations").items())


_LAST = (2**63 - 1, 0)
"""A key after all jobs' keys: SQLite's largest number."""


class Ledger:
    """One connection's view of the tables, with every statement that there is."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def _run(self, statement: str, /, **values: Any) -> sqlite3.Cursor:
        return self._connection.execute(QUERIES[statement], values)

    def _rows(self, statement: str, /, **values: Any) -> list[sqlite3.Row]:
        return self._run(statement, **values).fetchall()

    def meta(self, name: str) -> str | None:
        """A named value."""
        row = self._run("get_meta", name=name).fetchone()
        return None if row is None else str(row["value"])

    def set_meta(self, name: str, value: str) -> None:
        """Set a named value."""
        self._run("set_meta", name=name, value=value)

    def pass_over(self, number: int) -> None:
        """Give no submission this number or one before it any more."""
        self._run("pass_over", number=number)
        self._run("begin_after", number=number)

    def submit(
        self, owner: Owner, now: float, file: str, text: str, specs: list[tuple[int | None, JobSpec]]
    ) -> list[Job]:
        """Write a submission and its jobs, all queued; returns them with their ids."""
        cursor = self._run("add_submission", uid=owner.uid, submitted_at=now, file=file, text=text, elements=len(specs))
        number = cursor.lastrowid
        assert number is not None
        owner_text = json.dumps(codec.encode(owner))
        made = []
        for index, spec in specs:
            job = Job(id=JobId(number, index), owner=owner, spec=spec, submitted_at=now, state=jobs.Queued())
            key = job.id.key
            self._run(
                "add_job", number=key[0], idx=key[1], uid=owner.uid, name=spec.name, state="queued",
                submitted_at=now, owner=owner_text, spec=json.dumps(codec.encode(spec)), data="{}",
            )  # fmt: skip
            made.append(job)
        return made

    def set_state(self, job: Job) -> None:
        """Write a job's state."""
        state = job.state
        number, index = job.id.key
        self._run(
            "set_state", number=number, idx=index, state=jobs.name_of(state),
            active=int(not isinstance(state, jobs.Ended)), started_at=getattr(state, "started_at", None),
            ended_at=getattr(state, "ended_at", None), exit_code=getattr(state, "exit_code", None),
            attempt=getattr(state, "attempt", 0), reason=getattr(state, "reason", ""),
            message=getattr(state, "message", ""), data=json.dumps(codec.encode(state)),
        )  # fmt: skip

    def add_attempt(self, job: Job, name: str, nonce: str, allocation: Allocation, choices: str, now: float) -> None:
        """Record a decision to start: what is held from now on."""
        number, index = job.id.key
        self._run(
            "add_attempt", number=number, idx=index, attempt=getattr(job.state, "attempt", 0), name=name, nonce=nonce,
            allocation=json.dumps(codec.encode(allocation)), choices=choices, decided_at=now,
        )  # fmt: skip

    def on_attempt(self, statement: str, job: JobId, attempt: int, /, **values: Any) -> None:
        """Run one of the statements that change an attempt."""
        number, index = job.key
        self._run(statement, number=number, idx=index, attempt=attempt, **values)

    def active(self) -> list[Job]:
        """Every job that has not ended, oldest first."""
        return [job_of(row) for row in self._rows("active_jobs")]

    def job(self, job_id: JobId) -> Job | None:
        """One job."""
        number, index = job_id.key
        row = self._run("one_job", number=number, idx=index).fetchone()
        return None if row is None else job_of(row)

    def submission(self, number: int) -> list[Job]:
        """The jobs of one submission: one, or an array's elements."""
        return [job_of(row) for row in self._rows("submission_jobs", number=number)]

    def page(self, *, every: bool, limit: int, before: JobId | None = None) -> list[Job]:
        """The jobs that have not ended, or the latest of all before that one; oldest first."""
        if not every:
            return [job_of(row) for row in self._rows("page_active", limit=limit)]
        number, index = _LAST if before is None else before.key
        return [job_of(row) for row in reversed(self._rows("page_all", number=number, idx=index, limit=limit))]

    def attempts(self, job_id: JobId) -> list[dict[str, Any]]:
        """A job's attempts as rows, oldest first."""
        number, index = job_id.key
        return [dict(row) for row in self._rows("job_attempts", number=number, idx=index)]

    def attempt(self, job_id: JobId, attempt: int) -> dict[str, Any] | None:
        """One attempt's row."""
        number, index = job_id.key
        row = self._run("one_attempt", number=number, idx=index, attempt=attempt).fetchone()
        return None if row is None else dict(row)

    def kept(self) -> list[dict[str, Any]]:
        """The attempts whose containers may still exist, with their jobs' ``state`` and ``active``."""
        return [dict(row) for row in self._rows("kept_attempts")]

    def expired(self, before: float) -> list[dict[str, Any]]:
        """The attempts that ended before that time and whose containers can go."""
        return [dict(row) for row in self._rows("expired_attempts", before=before)]

    def next_expiry(self) -> float | None:
        """When the first of the ended attempts that still have a container ended."""
        row = self._run("next_expiry").fetchone()
        return None if row["ended_at"] is None else float(row["ended_at"])

    def open_logs(self) -> list[dict[str, Any]]:
        """Ended attempts whose log was not read to its end."""
        return [dict(row) for row in self._rows("open_logs")]

    def add_context(self, number: int, key: str, context: str, dockerfile: str, deadline: float) -> None:
        """A build context that a submission's client is to send."""
        self._run("add_context", number=number, key=key, context=context, dockerfile=dockerfile, deadline=deadline)

    def contexts(self) -> list[dict[str, Any]]:
        """The build contexts that have not come yet, or whose files are still kept."""
        return [dict(row) for row in self._rows("kept_contexts")]

    def context_received(self, number: int, key: str) -> None:
        """A build context has come."""
        self._run("set_context_received", number=number, key=key)

    def context_removed(self, number: int, key: str) -> None:
        """A build context's file is gone."""
        self._run("set_context_removed", number=number, key=key)

    def add_build(self, number: int, build: str, image: str) -> None:
        """The image that came of a submission's build."""
        self._run("add_build", number=number, build=build, image=image)

    def builds(self, number: int) -> dict[str, str]:
        """The images that came of a submission's builds, by the builds' digests."""
        return {str(row["build"]): str(row["image"]) for row in self._rows("submission_builds", number=number)}

    def add_secrets(self, number: int, file: str) -> None:
        """The file with a submission's secrets."""
        self._run("add_secrets", number=number, file=file)

    def secrets(self) -> dict[int, str]:
        """The files with secrets, by their submissions."""
        return {int(row["number"]): str(row["file"]) for row in self._rows("kept_secrets")}

    def secrets_removed(self, number: int) -> None:
        """A submission's secrets are gone."""
        self._run("remove_secrets", number=number)


def job_of(row: sqlite3.Row) -> Job:
    """The job of a row."""
    return Job(
        id=JobId.of_key(row["number"], row["idx"]),
        owner=codec.decode(Owner, json.loads(row["owner"])),
        spec=codec.decode(JobSpec, json.loads(row["spec"])),
        submitted_at=row["submitted_at"],
        state=codec.decode(_FINISHED[row["state"]], json.loads(row["data"])),
    )


class Store:
    """The ledger's file and its two threads.

    Args:
        path: The database; made with mode 0600 where it is not there.

    Raises:
        Refused: It lies on a network file system, or a newer gpujobs wrote it.
        Unavailable: It cannot be opened or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _refuse_network(path.parent)
        with _in_words(path):
            if not path.exists():
                os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            connection = self._connect()
            try:
                migrate(connection)
            except BaseException:
                connection.close()
                raise
        self._inbox: queue.SimpleQueue[tuple[Callable[[Ledger], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, args=(connection,), name="ledger-writer", daemon=True)
        self._writer.start()
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="ledger-reader")
        self._read_connection: sqlite3.Connection | None = None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10)
        connection.row_factory = sqlite3.Row
        try:
            refuse_newer(connection)  # before the journal's mode, which would already change the file
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection

    async def change(self, action: Callable[[Ledger], T]) -> T:
        """Run a change and wait until it is on disk.

        Who is cancelled while waiting does not know whether it was done: it is done or not as a whole.

        Raises:
            Unavailable: It could not be written (a full disk): nothing of it is kept.
        """
        future: Future[T] = Future()
        self._inbox.put((action, future))
        return await asyncio.wrap_future(future)

    async def read(self, query: Callable[[Ledger], T]) -> T:
        """Run a query on what is committed."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, query)

    def _read(self, query: Callable[[Ledger], T]) -> T:
        with _in_words(self.path):
            if self._read_connection is None:
                self._read_connection = self._connect()
                self._read_connection.execute("PRAGMA query_only=ON")
            return query(Ledger(self._read_connection))

    def close(self) -> None:
        """Write what has come in and stop the threads."""
        self._inbox.put(None)
        self._writer.join()
        self._readers.shutdown()
        if self._read_connection is not None:
            self._read_connection.close()

    def _write(self, connection: sqlite3.Connection) -> None:
        ledger = Ledger(connection)
        while (group := self._next_group()) is not None:
            self._commit(connection, ledger, group)
        connection.close()

    def _next_group(self) -> list[tuple[Callable[[Ledger], Any], Future[Any]]] | None:
        first = self._inbox.get()
        if first is None:
            return None
        group = [first]
        while len(group) < _GROUP and not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                self._inbox.put(None)
                break
            group.append(item)
        return group

    def _commit(
        self, connection: sqlite3.Connection, ledger: Ledger, group: list[tuple[Callable[[Ledger], Any], Future[Any]]]
    ) -> None:
        done: list[tuple[Future[Any], Any]] = []
        # Who asked and has gone is left out; from here on nobody can cancel what is being written.
        group = [(action, future) for action, future in group if future.set_running_or_notify_cancel()]
        try:
            connection.execute("BEGIN IMMEDIATE")
            for action, future in group:
                connection.execute("SAVEPOINT one")
                try:
                    result = action(ledger)
                except Exception as error:
                    # A broken constraint, like any other mistake, belongs to whoever asked; what else SQLite
                    # says (a full disk, a damaged file) is about all of them.
                    if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError):
                        raise
                    connection.execute("ROLLBACK TO one")
                    connection.execute("RELEASE one")
                    future.set_exception(error)
                else:
                    connection.execute("RELEASE one")
                    done.append((future, result))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            words = _words(self.path, error)
            for _, future in group:
                if not future.done():
                    future.set_exception(words)
        else:
            for future, result in done:
                future.set_result(result)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the schema up to date, each step in a transaction of its own.

    Raises:
        Refused: A newer gpujobs wrote this database; it is left as it is.
    """
    version = refuse_newer(connection)
    for number, text in migrations():
        if number > version:
            connection.executescript(f"BEGIN IMMEDIATE;\n{text}\nPRAGMA user_version={number};\nCOMMIT;")


def refuse_newer(connection: sqlite3.Connection) -> int:
    """The schema's version in a database; 0 where it is empty.

    Raises:
        Refused: A newer gpujobs wrote this database; it is left as it is.
    """
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    newest = migrations()[-1][0]
    if version > newest:
        raise Refused(
            f"the state was written by a newer gpujobs (schema {version}, this one knows {newest}); "
            "it was left as it is",
            hint="Install that version, or use another state directory (GPUJOBS_STATE).",
        )
    return version


def _refuse_network(directory: Path) -> None:
    kind = _file_system_type(directory)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise Refused(
            f"the state directory {directory} is on {_NETWORK_FILE_SYSTEMS[kind]}, where the ledger would not be safe",
            hint="Set GPUJOBS_STATE to a directory on a local disk.",
        )


def _file_system_type(directory: Path) -> int:
    import ctypes

    class Statfs(ctypes.Structure):
        _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_byte * 256))

    libc = ctypes.CDLL(None, use_errno=True)
    buffer = Statfs()
    if libc.statfs(os.fsencode(directory), ctypes.byref(buffer)) != 0:
        raise Unavailable(f"the state directory {directory} cannot be used: {os.strerror(ctypes.get_errno())}")
    return int(buffer.f_type) & 0xFFFFFFFF


def _words(path: Path, error: sqlite3.Error) -> Unavailable:
    code = getattr(error, "sqlite_errorname", "")
    if code.startswith("SQLITE_FULL"):
        return Unavailable(
            f"nothing was written: the disk of {path.parent} is full", hint="Free some space; nothing else is needed."
        )
    return Unavailable(f"the ledger {path} could not be used: {error}")


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _words(path, error) from error
    except OSError as error:
        raise Unavailable(f"the ledger {path} could not be opened: {error.strerror}") from error
