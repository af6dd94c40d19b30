"""Looks at a ledger from beside: for a check of the machine, whether or not a server uses it."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from pathlib import Path

from gpujobs.adapters.store import migrations


def check(path: Path) -> tuple[str, str]:
    """Whether a ledger is whole, without changing anything in its directory.

    With its log and that log's index beside it (a server runs or was killed), it is opened as any reader would,
    without writing. With the log alone, SQLite would have to write an index: a copy is looked at. With neither,
    nobody uses it: it is read as it lies.

    Args:
        path: The database.

    Returns:
        ``absent``, ``ok``, ``damaged``, ``newer`` (than this program knows) or ``unknown``; and what is wrong.

    Raises:
        OSError: It cannot be read.
    """
    if path.stat().st_size == 0:
        return "absent", ""
    log, index = Path(f"{path}-wal"), Path(f"{path}-shm")
    if not log.exists():
        return _checked(f"{path.as_uri()}?mode=ro&immutable=1")
    if index.exists():
        return _checked(f"{path.as_uri()}?mode=ro")
    with tempfile.TemporaryDirectory(prefix="gpujobs-doctor-") as directory:
        copy = Path(directory) / path.name
        shutil.copyfile(path, copy)
        shutil.copyfile(log, f"{copy}-wal")
        return _checked(f"{copy.as_uri()}?mode=rw")


def _checked(uri: str) -> tuple[str, str]:
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5)) as connection:
            said = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(5)")]
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        return ("damaged" if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) else "unknown"), str(error)
    if said != ["ok"]:
        return "damaged", "; ".join(said)[:300]
    newest = migrations()[-1][0]
    if version > newest:
        return "newer", f"schema {version}, this one knows {newest}"
    return "ok", ""
