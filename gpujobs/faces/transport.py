"""HTTP over a unix socket to a server that is whom we think: the one place where the client does I/O."""

from __future__ import annotations

import contextlib
import errno
import grp
import http.client
import json
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

from gpujobs import places, wire
from gpujobs.core.errors import GpujobsError, InvalidInput, Refused, Unavailable

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 120.0
"""How long one answer may take; streams have no limit, since a job may be silent for days."""

_CHUNK = 1 << 16


class NoServer(Unavailable):
    """Nobody listens there: nothing was sent, so a server may be started and asked the same."""


class Lost(Unavailable):
    """The server went away within an exchange: whether it had read the request is not known."""


@dataclass(frozen=True, slots=True)
class Host:
    """A server's address.

    Attributes:
        path: Its socket.
        given: ``GPUJOBS_HOST`` named it: no other server will do, and none is looked for.
    """

    path: Path
    given: bool = False

    def __str__(self) -> str:
        return f"unix://{self.path}"


def find_host(environ: Mapping[str, str]) -> Host:
    """Which server is meant: ``GPUJOBS_HOST``, then the system's socket, then this account's own.

    Where none of the sockets is there, it is the one a server would have: the system's where its settings
    are installed or this is uid 0.

    Raises:
        InvalidInput: ``GPUJOBS_HOST`` is no address.
    """
    if given := environ.get("GPUJOBS_HOST"):
        return Host(places.socket_of(given), given=True)
    system, own = places.system_socket(), places.user_socket(environ)
    if os.geteuid() == 0 or _there(system):
        return Host(system)
    if not _there(own) and _there(places.SYSTEM_SETTINGS):
        return Host(system)
    return Host(own)


def _there(path: Path) -> bool:
    """Whether something is at a path; what may not be looked at is there."""
    try:
        path.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True


class _Connection(http.client.HTTPConnection):
    """One connection to a unix socket, whose other end has been looked at."""

    def __init__(self, host: Host, timeout: float) -> None:
        super().__init__("gpujobs", timeout=timeout)
        self._place = host
        self._peer: socket.socket | None = None

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(min(CONNECT_SECONDS, self.timeout or CONNECT_SECONDS))
        try:
            with places.short_path(self._place.path) as name:
                sock.connect(name)
            _require_trusted(sock, self._place)
            sock.settimeout(self.timeout)
        except BaseException:
            sock.close()
            raise
        self.sock = self._peer = sock

    def wait_for_ever(self) -> None:
        """No limit for what is still to come (a response that takes the socket over leaves ``sock`` None)."""
        if self._peer is not None:
            self._peer.settimeout(None)


def _require_trusted(sock: socket.socket, host: Host) -> None:
    """A server is root's or our own: another account's would learn what we send and lie about what it did."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid not in (0, os.geteuid()):
        raise Refused(
            f"the server at {host} runs as uid {uid}, which is neither root nor you",
            hint="Nothing was sent. Set GPUJOBS_HOST to the right server.",
        )


def _unreachable(host: Host, error: OSError) -> GpujobsError:
    """Why nobody answered, and what to do about it."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return Refused(f"this account may not use the server at {host}", hint=_who_may(host.path))
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if host.path == places.system_socket() and os.geteuid() != 0:
            hint = "Ask the administrator to start it (`systemctl start gpujobs`)."
        else:
            hint = "`gpujobs serve` starts one; so do `gpujobs run` and `gpujobs submit` where this account may."
        return NoServer(f"no server is running at {host}", hint=hint)
    if error.errno == errno.ECONNREFUSED:
        return NoServer(
            f"a server was at {host} and ended uncleanly: its socket is there, nobody answers",
            hint="`gpujobs serve` starts it again and takes up its jobs where they are.",
        )
    if isinstance(error, TimeoutError) or error.errno == errno.EAGAIN:
        return Unavailable(f"the server at {host} does not answer", hint="It may be busy or stopped; try again.")
    return Unavailable(f"the server at {host} cannot be reached: {error.strerror or error}")


def _who_may(path: Path) -> str:
    """What opens a socket that is closed to this account."""
    try:
        there = path.stat()
        group = grp.getgrgid(there.st_gid).gr_name
    except (OSError, KeyError):
        return "It serves another account alone."
    if there.st_mode & stat.S_IWGRP and there.st_gid != 0:
        return f"Ask the administrator to add you to the group {group}, then log in again."
    if path == places.system_socket():
        return (f"It serves root alone. Ask the administrator to make the group {places.GROUP}, "
                "to add you to it, and to restart the server.")  # fmt: skip
    return "It serves another account alone."


class Sink:
    """The body of a request, sent in HTTP's chunks as it comes."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self._pending = bytearray()

    def write(self, data: bytes) -> None:
        """Send bytes."""
        self._pending += data
        if len(self._pending) >= _CHUNK:
            self._flush()

    def end(self) -> None:
        """Send the end."""
        self._flush()
        self._connection.send(b"0\r\n\r\n")

    def _flush(self) -> None:
        if self._pending:
            self._connection.send(b"%x\r\n%b\r\n" % (len(self._pending), bytes(self._pending)))
            self._pending.clear()


@dataclass(slots=True)
class Stream:
    """The answer to a request that goes on: its headers and its body as it comes."""

    headers: Mapping[str, str]
    chunks: Iterator[bytes]


class Transport:
    """Requests to one server; each has a connection of its own."""

    def __init__(self, host: Host, answer: float = ANSWER_SECONDS) -> None:
        self.host = host
        self._answer = answer

    def require(self) -> None:
        """Return where a trusted server answers.

        Raises:
            NoServer: Nobody listens.
            Refused: It is not ours to use, or not to be trusted.
        """
        connection = _Connection(self.host, self._answer)
        try:
            connection.connect()
        except OSError as error:
            raise _unreachable(self.host, error) from error
        finally:
            connection.close()

    def call(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: object = None
    ) -> dict[str, Any]:
        """One request, one JSON object.

        Raises:
            GpujobsError: What the server answered; or it was not there, went away, or is none of ours.
        """
        connection = _Connection(self.host, self._answer)
        try:
            response = self._ask(connection, method, path, query, body)
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(method, error) from error
        finally:
            connection.close()
        return self._object(data)

    def stream(self, path: str, query: Mapping[str, str]) -> Stream:
        """A request whose answer goes on.

        Its chunks end when the server ends them; a connection that breaks raises :class:`Lost`.

        Raises:
            GpujobsError: As :meth:`call`.
        """
        connection = _Connection(self.host, self._answer)
        try:
            response = self._ask(connection, "GET", path, query, None)
            connection.wait_for_ever()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._lost("GET", error) from error
        except GpujobsError:
            connection.close()
            raise
        return Stream(dict(response.headers), self._chunks(connection, response))

    def upload(self, path: str, produce: Callable[[Sink], object]) -> dict[str, Any]:
        """A PUT whose body is made while it is sent.

        Args:
            path: Below ``/v1``.
            produce: Writes the body; what it raises ends the request before its end, so the server takes nothing.

        Raises:
            GpujobsError: As :meth:`call`.
        """
        connection = _Connection(self.host, self._answer)
        try:
            try:
                connection.connect()
            except OSError as error:
                raise _unreachable(self.host, error) from error
            connection.putrequest("PUT", f"/v{wire.API}{path}")
            connection.putheader("Content-Type", "application/x-tar")
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            sink = Sink(connection)
            try:
                produce(sink)
                sink.end()
            except (BrokenPipeError, ConnectionResetError):
                pass  # a server that refuses does not read to the end; its answer says why
            response = connection.getresponse()
            data = response.read()
            if response.status >= 400:
                raise self._error(response.status, data)
        except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
            raise self._lost("PUT", error) from error
        finally:
            connection.close()
        return self._object(data)

    def _chunks(self, connection: _Connection, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while chunk := response.read1(_CHUNK):
                yield chunk
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        except (OSError, http.client.HTTPException) as error:
            raise self._lost("GET", error) from error
        finally:
            response.close()
            connection.close()

    def _ask(
        self, connection: _Connection, method: str, path: str, query: Mapping[str, str] | None, body: object
    ) -> http.client.HTTPResponse:
        try:
            connection.connect()
        except OSError as error:
            raise _unreachable(self.host, error) from error
        target = f"/v{wire.API}{path}" + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": "*/*"}
        payload = None
        if body is not None:
            payload = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
            if len(payload) > wire.MAX_REQUEST_BYTES:
                raise InvalidInput(f"the request is {len(payload)} bytes; at most {wire.MAX_REQUEST_BYTES} are taken")
        # A server that refuses does not read to the end; its answer says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, target, payload, headers)
        response = connection.getresponse()
        if response.status >= 400:
            raise self._error(response.status, response.read())
        return response

    def _error(self, status: int, data: bytes) -> GpujobsError:
        """The error that an answer tells of; an answer that is none of ours is told as such."""
        try:
            body = json.loads(data)
            if isinstance(body, dict) and "message" in body:
                return wire.error_of(body)
        except (ValueError, KeyError, TypeError):
            pass
        return GpujobsError(f"the server at {self.host} answered {status} without saying why",
                            hint="Its log may tell.")  # fmt: skip

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise GpujobsError(f"what answers at {self.host} is no gpujobs server")
        return cast(dict[str, Any], found)

    def _lost(self, method: str, error: Exception) -> Lost:
        hint = "Look with `gpujobs ps` whether it was done." if method == "POST" else "Try again."
        if isinstance(error, TimeoutError):
            return Lost(f"the server at {self.host} took longer than {self._answer:.0f} s to answer", hint=hint)
        return Lost(f"the server at {self.host} went away before it had answered", hint=hint)
