"""What an administrator does beside the server: check its state, back it up. Works whether or not it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from gpujobs import places
from gpujobs.adapters import ledgercheck
from gpujobs.adapters.ledgercheck import LedgerState
from gpujobs.core.errors import Refused, Unavailable

LEDGER = "state.sqlite"
_LOCKS = Path("/proc/locks")


def holder(state: Path) -> int | None:
    """The pid of the server that uses a state directory; None where none does, as the kernel's list of locks says.

    It is looked at and not tried: trying would make a server that starts at that moment refuse to.
    """
    try:
        found = (state / "lock").stat()
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        # By the inode's number first: the device that is listed differs from stat(2)'s on btrfs and overlayfs.
        if len(words) > 5 and words[1] == "FLOCK" and words[5].endswith(f":{found.st_ino}"):
            pid = int(words[4])
            if _has_open(pid, state / "lock"):
                return pid
    return None


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open; where that is not ours to see, it is taken to have."""
    try:
        return any(os.path.samestat(item.stat(), path.stat()) for item in Path(f"/proc/{pid}/fd").iterdir()
                   if item.exists())  # fmt: skip
    except PermissionError:
        return True
    except OSError:
        return pid <= 0  # of another PID namespace


def check_state(environ: Mapping[str, str]) -> str:
    """Look at the ledger of the server that this process would be; returns what was found, for a person.

    Raises:
        Refused: It is damaged, or a newer gpujobs wrote it; nothing was changed.
        Unavailable: It cannot be read.
    """
    state = places.server_state(environ)
    path = state / LEDGER
    try:
        found = ledgercheck.examine(path)
    except FileNotFoundError:
        return f"{path}: not there yet; a server that starts makes it\n"
    except OSError as error:
        raise Unavailable(f"the ledger {path} cannot be read: {error.strerror}") from error
    if found.found == "newer":
        raise Refused(
            f"{path} was written by a newer gpujobs ({found.detail}); it was left as it is",
            hint="Install that version, or restore a backup that was made before it.",
        )
    if found.found in {"damaged", "unknown"}:
        raise Refused(
            f"{path} is {'damaged' if found.found == 'damaged' else 'not to be read'}: {found.detail}",
            hint='Restore a backup: docs/operations.md, "Backup and restore".',
        )
    if found.found == "absent":
        return f"{path}: empty; a server that starts fills it\n"
    pid = holder(state)
    used = "no server uses it" if pid is None else f"the server with pid {pid} uses it"
    return f"{path}: whole\n{_schema(found)}\n{_jobs(found)}\n{used}\n"


def back_up(environ: Mapping[str, str], target: Path) -> str:
    """Copy that ledger into one file; returns what was done, for a person.

    Raises:
        Refused: The file is there, or the ledger is damaged.
        Unavailable: It could not be read or written.
    """
    path = places.server_state(environ) / LEDGER
    target = target.absolute()
    found = ledgercheck.back_up(path, target)
    return f"{target}: a copy of {path}, whole\n{_schema(found)}\n{_jobs(found)}\n"


def _schema(found: LedgerState) -> str:
    if found.schema < found.newest:
        return f"schema {found.schema}; a server that starts brings it to {found.newest}"
    return f"schema {found.schema}, the newest that this gpujobs knows"


def _jobs(found: LedgerState) -> str:
    return f"{found.jobs} job{'' if found.jobs == 1 else 's'}, {found.active} of them not ended"
