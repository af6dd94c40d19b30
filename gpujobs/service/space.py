"""Room on the state's disk, for what clients send."""

from __future__ import annotations

import os
from pathlib import Path

from gpujobs.core.errors import Unavailable

DISK_FLOOR = 1 << 30
"""Bytes that stay free on the state's disk: the ledger and the logs need them."""


def check_space(directory: Path, what: str) -> None:
    """See that there is room.

    Raises:
        Unavailable: There is none.
    """
    free = os.statvfs(directory)
    if free.f_bavail * free.f_frsize < DISK_FLOOR:
        raise Unavailable(
            f"the server's disk has no space for {what}", hint="Ask the administrator to free some."
        )


def sync_directory(directory: Path) -> None:
    """Bring a directory's names to disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
