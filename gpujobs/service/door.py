"""The socket that the server is reached at, and what is done with a connection before it makes a request."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import socket
from pathlib import Path

from uvicorn.protocols.http.h11_impl import H11Protocol

from gpujobs import places, wire
from gpujobs.core.errors import Refused, Unavailable
from gpujobs.core.rules import EVERYBODY
from gpujobs.service.peer import peer_of
from gpujobs.service.quotas import Quotas
from gpujobs.settings import Settings

HEAD_SECONDS = 20.0
"""For which a connection may be open without a whole request's head; what comes of it slowly does not count."""

FLUSH_SECONDS = 60.0
"""For which a closed connection may keep what its client has not read."""

BACKLOG = 4096
"""Connections that the kernel keeps until they are accepted; it allows net.core.somaxconn of them."""


def listen(address: Path) -> socket.socket:
    """Bind the server's socket, closed to others until :func:`open_to` says more.

    Raises:
        Refused: A server answers there.
        Unavailable: It cannot be made.
    """
    try:
        missing = [path for path in address.parents if not path.exists()]
        address.parent.mkdir(parents=True, exist_ok=True)
        for directory in missing:  # accounts come to root's socket through all of them
            directory.chmod(0o755 if os.geteuid() == 0 else 0o700)
        with places.short_path(address) as name:
            _refuse_answering(name, address)
            address.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            listener.bind(name)
        address.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError as error:
        raise Unavailable(f"the socket {address} cannot be made: {error.strerror}") from error
    return listener


def open_to(address: Path, settings: Settings) -> str:
    """Set who may connect: every account, or with the group ``gpujobs`` its members, or the server's own alone.

    Returns:
        What is at odds in the settings, for the log; empty for nothing.

    Raises:
        Unavailable: The socket is not there any more, or not ours.
    """
    everybody, root, group = EVERYBODY in settings.users, os.geteuid() == 0, _group()
    try:
        if root and group is not None:
            os.chown(address, 0, group)
        address.chmod(0o600 if not root else 0o666 if everybody else 0o600 if group is None else 0o660)
    except OSError as error:
        raise Unavailable(f"the socket {address} cannot be opened to others: {error.strerror}") from error
    if root and settings.users and not everybody and group is None:
        return (
            f"`users` names accounts, but there is no group {places.GROUP}: the socket is root's alone. "
            f"Make the group (groupadd --system {places.GROUP}) and put them into it, or write '*'"
        )
    return ""


def _group() -> int | None:
    try:
        return grp.getgrnam(places.GROUP).gr_gid
    except KeyError:
        return None


def _refuse_answering(name: str, address: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(name)
        except OSError:
            return
        peer = peer_of(probe)
    raise Refused(f"a server (pid {peer.pid}, uid {peer.uid}) answers at {address} already", hint="Use that one.")


class Connection(H11Protocol):
    """uvicorn's protocol, which knows whose connection it is, and closes those that are only kept open.

    The application finds in its state ``peer``, ``abort`` to close the connection at once, and ``gone`` to ask whether
    it is closed.
    """

    quotas: Quotas
    _uid: int | None = None
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Read the peer's credentials once, when it connects."""
        super().connection_made(transport)
        try:
            peer = peer_of(transport.get_extra_info("socket"))
        except OSError:  # no descriptor is free for it, or it is gone
            transport.abort()
            return
        self._uid = peer.uid
        if refusal := self.quotas.connected(peer.uid):
            self._refuse(refusal)
            return
        self.app_state = {**self.app_state, "peer": peer, "abort": transport.abort, "gone": self._is_gone}
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._disarm()
        if self._uid is not None:
            self.quotas.disconnected(self._uid)
            self._uid = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in part of a request."""
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        """Go through what has come; with the head of a request, the application decides how long it may take."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self.cycle is not None and not self.cycle.response_complete:
            self._disarm()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP; where it came behind a request that is being answered, that gets no answer either."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.transport.abort()
        else:
            super().send_400_response(msg)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._later(FLUSH_SECONDS)
        elif self.cycle is None or self.cycle.response_complete:
            self._await_head()

    def timeout_keep_alive_handler(self) -> None:
        """No next request came."""
        super().timeout_keep_alive_handler()
        self._later(FLUSH_SECONDS)

    def _is_gone(self) -> bool:
        return self.cycle is not None and self.cycle.disconnected

    def _refuse(self, why: str) -> None:
        error = Refused(why, hint="Close some, or end the programs that hold them.")
        body = json.dumps(wire.error_body(error)).encode()
        head = f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
        self._later(FLUSH_SECONDS)

    def _await_head(self) -> None:
        self._later(HEAD_SECONDS)

    def _later(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def protocol(counted: Quotas) -> type[Connection]:
    """The protocol of one server's connections."""

    class Counted(Connection):
        quotas = counted

    return Counted
