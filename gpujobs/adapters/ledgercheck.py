"""Looks at a ledger from beside, whether or not a server uses it: whole or damaged, its schema, its jobs; copies it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gpujobs.adapters.store import job_of, migrations
from gpujobs.core.errors import Refused, Unavailable

_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_UNREADABLE_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """What a ledger was found to be.

    Attributes:
        found: ``absent``, ``ok``, ``damaged``, ``newer`` (than this program knows) or ``unknown``.
        detail: What is wrong; empty where nothing is.
        schema: The schema's version in the file.
        newest: The one that this program knows, and brings an older one to at the next start.
        jobs: Jobs in it, every element of an array counted.
        active: Those of them that have not ended.
        server: The id of the server that it belongs to; empty where it has none yet.
    """

    found: str
    detail: str = ""
    schema: int = 0
    newest: int = 0
    jobs: int = 0
    active: int = 0
    server: str = ""


def check(path: Path) -> tuple[str, str]:
    """Whether a ledger is whole, without changing anything in its directory.

    Args:
        path: The database.

    Returns:
        ``absent``, ``ok``, ``damaged``, ``newer`` (than this program knows) or ``unknown``; and what is wrong.

    Raises:
        OSError: It cannot be read.
    """
    state = _looked(path, rows=False)
    return state.found, state.detail


def examine(path: Path) -> LedgerState:
    """As :func:`check`, and every reference and every job in it is read.

    Raises:
        OSError: It cannot be read.
    """
    return _looked(path, rows=True)


def _looked(path: Path, *, rows: bool) -> LedgerState:
    newest = migrations()[-1][0]
    if path.stat().st_size == 0:
        return LedgerState(found="absent", newest=newest)
    try:
        with _opened(path) as connection:
            said = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(5)")]
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            state = LedgerState(found="ok", schema=version, newest=newest)
            if said != ["ok"]:
                return replace(state, found="damaged", detail="; ".join(said)[:300])
            if version > newest:
                return replace(state, found="newer", detail=f"schema {version}, this one knows {newest}")
            return _with_rows(state, connection) if rows and version else state
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        return LedgerState(
            found="damaged" if name.startswith(_DAMAGED) else "unknown", detail=str(error), newest=newest
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that writes nothing into the ledger's directory.

    With its log and that log's index beside it (a server runs or was killed), it is opened as any reader would,
    without writing. With the log alone, SQLite would have to write an index: a copy is looked at. With neither,
    nobody uses it: it is read as it lies.
    """
    log, index = Path(f"{path}-wal"), Path(f"{path}-shm")
    with contextlib.ExitStack() as stack:
        if not log.exists():
            uri = f"{path.as_uri()}?mode=ro&immutable=1"
        elif index.exists():
            uri = f"{path.as_uri()}?mode=ro"
        else:
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpujobs-ledger-"))) / path.name
            shutil.copyfile(path, copy)
            shutil.copyfile(log, f"{copy}-wal")
            uri = f"{copy.as_uri()}?mode=rw"
        yield stack.enter_context(contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5)))


def _with_rows(state: LedgerState, connection: sqlite3.Connection) -> LedgerState:
    connection.row_factory = sqlite3.Row
    lost = [f"{row[0]} {row[1]} refers to no {row[2]}" for row in connection.execute("PRAGMA foreign_key_check")]
    jobs = active = 0
    for row in connection.execute("SELECT * FROM jobs"):
        jobs += 1
        active += row["active"]
        try:
            job_of(row)
        except (ValueError, KeyError, TypeError) as error:
            lost.append(f"job {row['number']} cannot be read: {type(error).__name__}: {error}")
    server = connection.execute("SELECT value FROM meta WHERE name = 'server'").fetchone()
    more = f"; and {len(lost) - _UNREADABLE_SHOWN} more" if len(lost) > _UNREADABLE_SHOWN else ""
    return replace(
        state, found="damaged" if lost else "ok", detail="; ".join(lost[:_UNREADABLE_SHOWN])[:300] + more,
        jobs=jobs, active=active, server="" if server is None else str(server[0]),
    )  # fmt: skip


def back_up(path: Path, target: Path) -> LedgerState:
    """Copy a ledger as it is at one moment into one file, whether or not a server writes to it meanwhile.

    The server is not held up: SQLite's backup reads what was committed when it began. The copy is checked, and is
    on disk, before it gets its name.

    Args:
        path: The database.
        target: The file that it is copied to, mode 0600; must not be there.

    Returns:
        What the copy was found to be.

    Raises:
        Refused: The target is there, or what was copied is damaged.
        Unavailable: The ledger could not be read or the copy not be written.
    """
    if os.path.lexists(target):
        raise Refused(f"{target} is there already", hint="Name a file that is not there; a date in it helps.")
    if not path.exists():
        raise Unavailable(f"there is no ledger at {path}", hint="Nothing was submitted yet, or set GPUJOBS_STATE.")
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with (
            contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=10)) as source,
            contextlib.closing(sqlite3.connect(fresh, timeout=10)) as copy,
        ):
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, whatever becomes of what lies beside it
        state = examine(fresh)
        if state.found != "ok":
            raise Refused(f"the ledger {path} is {state.found}: {state.detail}; it was not copied")
        _sync(fresh)
        os.link(fresh, target)  # refuses a name that has come into being meanwhile
        _sync(target.parent)
    except FileExistsError as error:
        raise Refused(f"{target} is there already", hint="Name a file that is not there.") from error
    except OSError as error:
        raise Unavailable(f"the backup {target} could not be written: {error.strerror}") from error
    except sqlite3.Error as error:
        raise Unavailable(f"the ledger {path} could not be copied to {target}: {error}") from error
    finally:
        for leftover in (fresh, Path(f"{fresh}-journal"), Path(f"{fresh}-wal"), Path(f"{fresh}-shm")):
            leftover.unlink(missing_ok=True)
    return state


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
