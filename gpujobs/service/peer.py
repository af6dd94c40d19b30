"""Who is at the other end of a connection: what the kernel says, never what the client says."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SO_PEERGROUPS = 59
SO_PEERPIDFD = 77
"""Numbers of asm-generic/socket.h; the second since Linux 6.5."""

GROUPS_MAX = 65536
"""NGROUPS_MAX of linux/limits.h."""

Whereabouts = Literal["here", "contained", "gone"]


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a connection, as it was when it connected (SO_PEERCRED).

    Attributes:
        gid: Its effective gid.
        groups: Its supplementary groups.
        whereabouts: ``here``, in our PID namespace; ``contained``, in another; ``gone``, ended since.
    """

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    whereabouts: Whereabouts = "here"


def peer_of(connection: socket.socket) -> Peer:
    """The peer of a unix socket."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    pid, uid, gid = struct.unpack("iII", data)
    return Peer(pid, uid, gid, _groups(connection), _whereabouts(connection, pid, uid))


def _groups(connection: socket.socket) -> frozenset[int]:
    """The supplementary groups; by the C library's call, since Python's has room for 256 of them alone."""
    buffer = (ctypes.c_uint32 * GROUPS_MAX)()
    length = ctypes.c_uint32(ctypes.sizeof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(connection.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(length)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return frozenset(buffer[: length.value // 4])


def _whereabouts(connection: socket.socket, pid: int, uid: int) -> Whereabouts:
    """Where the process that connected is.

    A pid alone could be another process's by now: who connects from a container, leaves the connection to a child
    and ends would pass for whoever gets the number next. The kernel's descriptor for the process cannot be mistaken:
    its fdinfo lists the process's pid in each PID namespace from ours down, all of it from one moment.
    """
    if pid <= 0:
        return "contained"  # it is in none of our namespaces: one that we are in ourselves holds it
    try:
        pidfd = struct.unpack("i", connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4))[0]
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            return "gone"
        return _by_number(pid, uid)
    try:
        return _by_pidfd(pidfd)
    finally:
        os.close(pidfd)


def _by_pidfd(pidfd: int) -> Whereabouts:
    found = re.search(r"^NSpid:((?:\s+-?\d+)+)$", Path(f"/proc/self/fdinfo/{pidfd}").read_text(), re.MULTILINE)
    numbers = [] if found is None else [int(word) for word in found[1].split()]
    if not numbers or numbers[0] <= 0:
        return "gone"
    return "here" if len(numbers) == 1 else "contained"


def _by_number(pid: int, uid: int) -> Whereabouts:
    """The same on a kernel before 6.5: the number must be held by a process of the same uid, before and after."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return "gone"
    try:
        if Path(f"/proc/{pid}").stat().st_uid not in (uid, 0):  # root's where it may not be looked at: proc(5)
            return "gone"
        return _by_pidfd(pidfd)
    except OSError:
        return "gone"
    finally:
        os.close(pidfd)
