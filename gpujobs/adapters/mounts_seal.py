"""Sealed pins: read-only until the container is made up, so that its making writes nothing in the user's name.

Whatever a mount point or a working directory lacks, the container's runtime makes as root: a volume of a directory
that its owner can only read, and a second one mounted below it, or a symbolic link of the image that leads into it,
would leave root's own directories and files there (seen with runc 1.1.5: a job of an ordinary account made
directories in /etc). So a writable pin is read-only while the runtime works, and is opened in the container's own
mounts when nothing but the waiting init runs in there. Standard library only, like the helper that it belongs to.
"""
# The helper stays small: it does not load pathlib.
# ruff: noqa: PTH118, PTH123

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from gpujobs.adapters.mounts_kernel import (
    RESOLVE_BENEATH,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_SYMLINKS,
    MountError,
    enter_mounts_of,
    mount_id,
    mount_table,
    open_below,
    set_read_only,
)

_HERE = -100  # AT_FDCWD


def seal(target: str) -> list[str]:
    """Make a pin read-only with all mounts below it; returns those that were not, as paths below it (itself: "")."""
    by_point = {mount.point: mount for mount in mount_table()}  # one that covers another comes after it
    writable = [
        point[len(target) + 1 :]
        for point, mount in by_point.items()
        if (point == target or point.startswith(f"{target}/")) and "ro" not in mount.options
    ]
    set_read_only(_HERE, target, True, recursive=True)
    return writable


def keeper(pid: int) -> int:
    """The process that has a container's mounts: its first one, but under gVisor the one that opens files for it.

    gVisor's first process on the host, the sandbox, sees an empty directory; the gofer beside it has the mounts.

    Raises:
        MountError: A sandbox has no gofer.
    """
    if _name(pid) != b"runsc-sandbox":
        return pid
    parent = _parent(pid)
    # Not by the parent's list of children: what its threads have begun moves about in it while it is read.
    for other in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        try:
            if _name(other) == b"runsc-gofer" and _parent(other) == parent:
                return other
        except OSError:  # it has ended
            continue
    raise MountError("refused", "the gVisor sandbox has no gofer that its volumes could be opened in")


def _name(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().partition(b"\0")[0]


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def unseal(pid: int, doors: Iterable[dict[str, Any]]) -> None:
    """Make a container's mounts of pins as writable as they are meant to be.

    Args:
        pid: A process in the container; it must be our own init, which runs nothing of the user's yet.
        doors: For each pin its ``target`` in there, its ``device`` and ``inode``, and what :func:`seal` returned
            as ``writable``.

    Raises:
        MountError: Something else is at a target.
    """
    pid = keeper(pid)
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    points = {mount.id: mount.point for mount in mount_table(pid)}
    opened = []
    for door in doors:
        target = str(door["target"])
        top = open_below(root, target, RESOLVE_IN_ROOT)
        status = os.fstat(top)
        if (status.st_dev, status.st_ino) != (door["device"], door["inode"]):
            raise MountError("refused", f"{target} in the container is not what was mounted there")
        point = points.get(mount_id(top), "")
        for path in door["writable"]:
            place = open_below(top, path, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS) if path else top
            if points.get(mount_id(place)) != (os.path.join(point, path) if path else point):
                raise MountError("refused", f"{target} changed while its container was made")
            opened.append(place)
    enter_mounts_of(namespace)
    for place in opened:
        set_read_only(place, "", False, recursive=False)
