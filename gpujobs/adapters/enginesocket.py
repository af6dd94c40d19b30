"""One HTTP connection to the Docker Engine on the event loop, and the framing of its log streams."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import urlencode, urlsplit

from gpujobs.core import errors
from gpujobs.logwire import LogRecord

API = "/v1.41"
"""The oldest Engine API that has all we ask for: Engine 20.10."""

_OLDEST = re.compile(rb"[Mm]inimum supported API version is (\d+\.\d+)")
_spoken: dict[str | tuple[str, int], str] = {}

_RECEIVE = 256 << 10
_BUSY = 2 << 10
_PAUSE = 0.001
"""Seconds. The Engine sends each line by a write of its own; while it is busy, a pause before each read lets the
socket's buffer fill: one wake-up for some hundred lines instead of one for each."""
_ANSWER_SECONDS = 60.0


class NotFound(Exception):
    """The Engine knows no such container."""


def parse_host(host: str) -> str | tuple[str, int]:
    """Returns the socket's path or (name, port) of a ``DOCKER_HOST``.

    Raises:
        InvalidInput: It is neither ``unix:///path`` nor ``tcp://host:port``.
    """
    hint = "Use unix:///path or tcp://host:port (without TLS)."
    try:
        parts = urlsplit(host)
        port = parts.port
    except ValueError as error:
        raise errors.InvalidInput(f"DOCKER_HOST={host}: {error}", hint=hint) from error
    if parts.scheme == "unix" and not parts.netloc and parts.path:
        return parts.path
    if parts.scheme == "tcp" and parts.hostname and port and parts.path in ("", "/"):
        return parts.hostname, port
    raise errors.InvalidInput(f"DOCKER_HOST={host} is of a kind that is not supported here", hint=hint)


def api_of(address: str | tuple[str, int]) -> str:
    """The version of its API, as a path begins, in which an Engine is asked."""
    return _spoken.get(address, API)


def takes_newer(address: str | tuple[str, int], answer: bytes) -> bool:
    """Whether an Engine has refused because :data:`API` is too old for it; it is asked in its oldest version then."""
    oldest = _OLDEST.search(answer)
    if oldest is None:
        return False
    spoken = f"/v{oldest[1].decode()}"
    if api_of(address) == spoken:
        return False
    _spoken[address] = spoken
    return True


class Backoff:
    """Waits longer each time, up to 5 s."""

    def __init__(self) -> None:
        self._next = 0.1

    def reset(self) -> None:
        """All is well: the next wait is short."""
        self._next = 0.1

    async def wait(self) -> None:
        """Waits; the next time twice as long."""
        await asyncio.sleep(self._next)
        self._next = min(self._next * 2, 5.0)


class Answer:
    """One GET and its body as it comes; HTTP/1.0, so the body is not chunked and ends with the connection.

    Attributes:
        engine_major: Major version of the Engine, from the answer's head; 0 where it does not say.
    """

    def __init__(self, address: str | tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._first = b""
        self._pause = False
        self.engine_major = 0

    async def open(self, path: str, **query: str | int) -> None:
        """Sends the request and reads the answer's head.

        Raises:
            OSError: No connection, no answer in time, or another status than 200.
            NotFound: Status 404.
        """
        while await self._refuses_version(path, query):
            self.close()

    async def _refuses_version(self, path: str, query: Mapping[str, str | int]) -> bool:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_ANSWER_SECONDS):
            if isinstance(self._address, str):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.setblocking(False)
                await loop.sock_connect(self._socket, self._address)
            else:
                name, port = self._address
                found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
                self._socket = socket.socket(found[0][0], socket.SOCK_STREAM)
                self._socket.setblocking(False)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                await loop.sock_connect(self._socket, found[0][4])
            target = f"{api_of(self._address)}{path}" + (f"?{urlencode(query)}" if query else "")
            await loop.sock_sendall(self._socket, f"GET {target} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
            head = b""
            while b"\r\n\r\n" not in head:
                data = await loop.sock_recv(self._socket, _RECEIVE)
                if not data or len(head) > _RECEIVE:
                    raise ConnectionError("the Engine ended the connection without an answer")
                head += data
            head, _, self._first = head.partition(b"\r\n\r\n")
            version = re.search(rb"\r\nServer: Docker/(\d+)", head)
            self.engine_major = int(version[1]) if version else 0
            status = head.split(b" ", 2)[1:2]
            if status == [b"400"]:
                while data := await loop.sock_recv(self._socket, _RECEIVE):
                    self._first += data
                if takes_newer(self._address, self._first):
                    return True
            if status != [b"200"]:
                text = self._first.decode(errors="replace").strip()
                if status == [b"404"]:
                    raise NotFound(text)
                raise ConnectionError(f"the Engine answered {head.splitlines()[0]!r}: {text}")
        return False

    async def receive(self) -> bytes:
        """The next bytes of the body; empty at its end."""
        if self._first:
            data, self._first = self._first, b""
            return data
        assert self._socket is not None
        if self._pause:
            await asyncio.sleep(_PAUSE)
        data = await asyncio.get_running_loop().sock_recv(self._socket, _RECEIVE)
        self._pause = len(data) >= _BUSY
        return data

    def close(self) -> None:
        """Ends the connection, whatever is left of the body."""
        if self._socket is not None:
            self._socket.close()


class Demultiplexer:
    """Takes the Engine's framed log stream apart: 8 bytes (stream, three zeros, ``>I`` length), time, text.

    Attributes:
        broken: What the Engine, or this, says about the rest not being readable; empty while all is well.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._second = b""
        self._second_ns = 0
        self.broken = ""

    def feed(self, data: bytes) -> list[LogRecord]:
        """Returns the messages that are complete with these bytes."""
        buffer = self._rest + data if self._rest else data
        records: list[LogRecord] = []
        add, new, number = records.append, tuple.__new__, int.from_bytes
        position, size = 0, len(buffer)
        second, second_ns = self._second, self._second_ns
        while position + 8 <= size and not self.broken:
            stream = buffer[position]
            start = position + 8
            end = start + number(buffer[position + 4 : start], "big")
            if end > size:
                break
            try:
                if stream not in (1, 2) or buffer[start + 29 : start + 31] != b"Z ":
                    raise ValueError  # noqa: TRY301 - the same as a number that is none
                if buffer[start : start + 19] != second:
                    second = buffer[start : start + 19]
                    at = datetime.strptime(second.decode(), "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
                    second_ns = int(at.timestamp()) * 10**9
                time_ns = second_ns + int(buffer[start + 20 : start + 29])
            except ValueError:
                self.broken = buffer[start:end].decode(errors="replace").strip() or "the stream is not framed"
                break
            # The constructor of a named tuple takes three times as long, and this runs for every line.
            add(new(LogRecord, (time_ns, stream, buffer[start + 31 : end])))
            position = end
        self._rest = buffer[position:]
        self._second, self._second_ns = second, second_ns
        return records
