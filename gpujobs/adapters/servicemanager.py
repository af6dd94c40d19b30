"""The service manager's side of the server: the socket that it passes on, and what it is told of our state.

systemd's protocols, which other managers speak too, by the standard library alone: sd_listen_fds(3) for the socket,
sd_notify(3) and sd_watchdog_enabled(3) for the rest. Where no manager started the process, everything here does
nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Self

from gpujobs.core.errors import Refused

logger = logging.getLogger("gpujobs")

FIRST_FD = 3
"""SD_LISTEN_FDS_START of sd-daemon.h."""

_MOST_FDS = 1024

_PATIENCE = 1.0
"""Seconds for which a manager that is busy may hold us up, who has a queue for such messages."""


class ServiceManager:
    """Who started this process, if it was a service manager.

    Args:
        address: Its notification socket: a path, or ``@`` and an abstract name; empty for none.
        watchdog: Seconds within which it wants to hear that we live; None where it does not.
    """

    def __init__(self, address: str = "", watchdog: float | None = None) -> None:
        self.watchdog = watchdog
        self._address = b"\0" + os.fsencode(address[1:]) if address.startswith("@") else os.fsencode(address)
        self._heard = True

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> Self:
        """The manager that the environment tells of.

        Its variables are taken out, so that no process that we start thinks it is meant.
        """
        address, every, pid = (environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
        if address and not address.startswith(("/", "@")):
            logger.warning("NOTIFY_SOCKET %r is no path and no abstract name: the service manager is not told", address)
            address = ""
        ours = address and (not pid or pid == str(os.getpid()))
        watchdog = int(every) / 1e6 if ours and every.isdecimal() and int(every) > 0 else None
        return cls(address, watchdog)

    def ready(self, status: str) -> None:
        """It serves, for the first time or again after :meth:`reloading`."""
        self._tell(f"READY=1\nSTATUS={_one_line(status)}")

    def reloading(self) -> None:
        """It reads its settings; :meth:`ready` ends that."""
        # The time belongs to the message since systemd 253, and does not hurt before.
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It ends."""
        self._tell("STOPPING=1\nSTATUS=stopping; containers go on")

    def alive(self) -> None:
        """It makes progress."""
        self._tell("WATCHDOG=1")

    def status(self, text: str) -> None:
        """A line for people, as `systemctl status` shows it."""
        self._tell(f"STATUS={_one_line(text)}")

    def _tell(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(_PATIENCE)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            if self._heard:  # once: what it does not hear every few seconds need not fill the log
                logger.warning("the service manager was not told %r: %s", message.partition("\n")[0], error.strerror)
            self._heard = False
        else:
            self._heard = True


def passed_socket(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The listening socket that a service manager passed on, not blocking and not inherited; None where none was.

    Its variables are taken out, as above.

    Raises:
        Refused: What was passed is no single listening stream socket in the file system.
    """
    count, pid, _ = (environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal() or not 0 < int(count) <= _MOST_FDS:
        return None
    for number in range(FIRST_FD, FIRST_FD + int(count)):
        os.set_inheritable(number, False)
    if int(count) != 1:
        raise Refused(
            f"the service manager passed {count} sockets, and the server listens at one",
            hint="Write one ListenStream= into gpujobs.socket, with an absolute path.",
        )
    try:
        passed = socket.socket(fileno=FIRST_FD)
        fits = passed.family == socket.AF_UNIX and passed.type == socket.SOCK_STREAM
        listens = bool(passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        address = passed.getsockname()
    except OSError as error:
        told = f"descriptor {FIRST_FD}, which the service manager passed, is no socket: {error.strerror}"
        raise Refused(told) from error
    if not (fits and listens and isinstance(address, str) and address.startswith("/")):
        passed.close()
        raise Refused(
            "the socket that the service manager passed is no listening unix stream socket with an absolute path",
            hint="gpujobs.socket needs ListenStream=/run/gpujobs/gpujobs.sock and Accept=no.",
        )
    passed.setblocking(False)
    return passed


def _one_line(text: str) -> str:
    return " ".join(text.split())
