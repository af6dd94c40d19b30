"""A FUSE file system that goes silent: the nearest thing to a dead file server that needs no network.

It speaks just enough of the kernel's protocol (linux/fuse.h, version 7.31) to be mounted and to show an empty
root directory. From the moment that it is told to be silent it either reads no more requests, or reads and
answers none: a process that waits for the former can be killed, one that waits for the latter cannot, until
the connection ends.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self, TypeAlias

Mood: TypeAlias = Literal["answer", "ignore", "swallow"]

_LOOKUP, _GETATTR, _OPENDIR, _READDIR, _INIT = 1, 3, 27, 28, 26
_ENOENT, _ENOSYS = 2, 38
_libc = ctypes.CDLL(None, use_errno=True)


class Fuse:
    """A mounted FUSE file system with one empty directory; a context manager.

    Args:
        point: An existing directory to mount it at.
        mood: ``answer`` serves; ``ignore`` leaves requests unread; ``swallow`` reads and never answers.
        uid: The user who mounts it, and who alone may enter unless ``allow_other``.
        allow_other: Whether others may enter.

    Attributes:
        silent_to: The only user whose requests are swallowed; None means everybody's.
    """

    def __init__(self, point: Path, mood: Mood, *, uid: int = 0, allow_other: bool = True) -> None:
        self.point, self.uid, self.allow_other = point, uid, allow_other
        self.mood: Mood = mood
        self.silent_to: int | None = None
        self.swallowed = threading.Event()
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        if not Path("/dev/fuse").exists():
            os.mknod("/dev/fuse", 0o666 | stat.S_IFCHR, os.makedev(10, 229))
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id={self.uid},group_id={self.uid}"
        options += ",default_permissions" + (",allow_other" if self.allow_other else "")
        if _libc.mount(b"silent", os.fsencode(self.point), b"fuse", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"FUSE cannot be mounted at {self.point}")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
        _libc.umount2(os.fsencode(self.point), 2)  # MNT_DETACH
        for fd in (self._stop, self._stopped):
            os.close(fd)

    def abort(self) -> None:
        """End the connection, as the crash of a file server's client does; whoever waits gets an error."""
        if self._thread.is_alive():
            os.write(self._stopped, b"x")
            self._thread.join()
            os.close(self._fd)

    def _serve(self) -> None:
        import select

        while True:
            watched = [self._stop] if self.mood == "ignore" else [self._stop, self._fd]
            ready, _, _ = select.select(watched, [], [], 0.05)  # the mood may change
            if self._stop in ready:
                return
            if self._fd in ready and self.mood != "ignore":
                request = os.read(self._fd, 2**17 + 4096)
                opcode, unique, _node, uid = struct.unpack_from("=IQQI", request, 4)
                if self.mood == "swallow" and opcode != _INIT and self.silent_to in (None, uid):
                    self.swallowed.set()
                    continue
                error, body = self._reply(opcode)
                with suppress(FileNotFoundError):  # the asker was killed meanwhile
                    os.write(self._fd, struct.pack("=IiQ", 16 + len(body), -error, unique) + body)

    def _reply(self, opcode: int) -> tuple[int, bytes]:
        if opcode == _INIT:
            return 0, struct.pack("=IIIIHHIIHHI28x", 7, 31, 0, 0, 12, 9, 4096, 1, 1, 0, 0)
        if opcode == _GETATTR:  # fuse_attr_out: no caching, inode 1, a directory of mode 0755
            attributes = struct.pack(
                "=QQQQQQIIIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, self.uid, self.uid, 0, 512, 0
            )
            return 0, struct.pack("=QII", 0, 0, 0) + attributes
        if opcode == _OPENDIR:
            return 0, struct.pack("=QIi", 0, 0, 0)
        if opcode == _READDIR:
            return 0, b""
        return (_ENOENT if opcode == _LOOKUP else _ENOSYS), b""
