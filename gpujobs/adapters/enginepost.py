"""Long POSTs to the Docker Engine, pulls and builds: a connection of their own on the event loop.

Leaving the block closes the connection, upon which the Engine stops what it was doing: it looks for that
throughout a pull, and kills the container of a build's step.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, BinaryIO
from urllib.parse import urlencode

from gpujobs.adapters.engine import unreachable
from gpujobs.adapters.enginesocket import api_of, parse_host
from gpujobs.core.errors import Unavailable
from gpujobs.core.ports import Conflict, EngineError, Gone

Event = Mapping[str, Any]
"""One line of the answer, such as ``{"status": …}``, ``{"stream": …}`` or ``{"error": …}``."""

_CHUNK = 256 << 10
_MAX_LINE = 16 << 20
_ANSWER_SECONDS = 60.0


@asynccontextmanager
async def posted(
    host: str, path: str, query: Mapping[str, str | int], *, body: BinaryIO | bytes = b"",
    kind: str = "application/json", silence: float | None = None,
) -> AsyncIterator[AsyncIterator[Event]]:  # fmt: skip
    """Send a request; gives the answer's lines as they come.

    Args:
        host: ``DOCKER_HOST``.
        path: Such as ``/build``.
        query: The parameters.
        body: What is sent: bytes, or an open file from its start.
        kind: The body's media type.
        silence: Seconds without a line after which it is given up.

    Raises:
        EngineError: The Engine refused; its own sentence. ``Gone`` and ``Conflict`` as for short calls.
        Unavailable: The Engine does not answer, or went away.
    """
    connection = _Connection()
    try:
        try:
            await connection.open(host)
        except OSError as error:
            raise unreachable(host, error) from error
        sending = asyncio.create_task(connection.send(path, query, body, kind), name=f"send {path}")
        try:
            # The answer to a refused request comes before all of it has been read.
            yield _answered(host, connection, silence)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    finally:
        connection.close()


class _Connection:
    """A socket whose answer is read by lines.

    asyncio's own streams would not do: the Engine resets a connection on which it has not read everything, as where
    it refuses what is being sent, and a stream that was reset gives nothing of what had come before.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._api = ""
        self._rest = b""
        self._ended = False

    async def open(self, host: str) -> None:
        address = parse_host(host)
        self._api = api_of(address)  # known since the server follows its events, which is before it pulls or builds
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_ANSWER_SECONDS):
            if isinstance(address, str):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                target: Any = address
            else:
                found = (await loop.getaddrinfo(*address, type=socket.SOCK_STREAM))[0]
                self._socket = socket.socket(found[0], socket.SOCK_STREAM)
                target = found[4]
            self._socket.setblocking(False)
            await loop.sock_connect(self._socket, target)

    async def send(self, path: str, query: Mapping[str, str | int], body: BinaryIO | bytes, kind: str) -> None:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        size = len(body) if isinstance(body, bytes) else await asyncio.to_thread(body.seek, 0, os.SEEK_END)
        target = f"{self._api}{path}?{urlencode(query)}"
        head = f"POST {target} HTTP/1.0\r\nHost: docker\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n"
        await loop.sock_sendall(self._socket, head.encode())
        if isinstance(body, bytes):
            await loop.sock_sendall(self._socket, body)
            return
        body.seek(0)
        while chunk := await asyncio.to_thread(body.read, _CHUNK):
            await loop.sock_sendall(self._socket, chunk)

    async def line(self, seconds: float | None) -> bytes:
        """The next line with its end; what is left at the end of the answer; then nothing."""
        async with asyncio.timeout(seconds):
            while (end := self._rest.find(b"\n")) < 0 and not self._ended:
                await self._receive()
        end = end + 1 if end >= 0 else len(self._rest)
        line, self._rest = self._rest[:end], self._rest[end:]
        return line

    async def all(self) -> bytes:
        """The rest of the answer."""
        async with asyncio.timeout(_ANSWER_SECONDS):
            while not self._ended:
                await self._receive()
        return self._rest

    async def _receive(self) -> None:
        assert self._socket is not None
        try:
            data = await asyncio.get_running_loop().sock_recv(self._socket, _CHUNK)
        except ConnectionResetError:
            data = b""
        self._ended = not data
        self._rest += data
        if len(self._rest) > _MAX_LINE:
            raise ConnectionError("the Engine's answer has no end of line")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


async def _answered(host: str, connection: _Connection, silence: float | None) -> AsyncIterator[Event]:
    try:
        status = (await connection.line(None)).split(b" ", 2)
        while (await connection.line(_ANSWER_SECONDS)).strip():
            pass
        if status[1:2] not in ([b"200"], [b"204"]):
            raise _refusal(int(status[1]), await connection.all())
        while line := await connection.line(silence):
            if line.strip():
                yield json.loads(line)
    except TimeoutError as error:
        raise Unavailable(
            f"nothing was heard of it for {silence or _ANSWER_SECONDS:g} s", hint="Try again."
        ) from error
    except (OSError, IndexError, ValueError) as error:
        raise unreachable(host, error) from error


def _refusal(status: int, body: bytes) -> EngineError:
    try:
        words = str(json.loads(body)["message"]).strip()
    except (ValueError, KeyError, TypeError):
        words = body.decode(errors="replace").strip() or f"status {status}"
    return {404: Gone, 409: Conflict}.get(status, EngineError)(words)
