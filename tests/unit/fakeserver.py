"""A tiny server of the API on a unix socket in a thread, whose answers a test writes."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gpujobs import places
from gpujobs.logwire import LogRecord, encode_frame


class Drop(Exception):
    """Raised by a stream: the connection breaks off in the middle."""


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    body: Any


@dataclass
class Stream:
    """An answer that goes on."""

    chunks: Iterator[bytes]
    headers: dict[str, str] = field(default_factory=dict)


Answer = dict[str, Any] | tuple[int, Any] | Stream
Route = Callable[[Request], Answer]


class FakeServer:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[Request] = []
        self.routes: dict[tuple[str, str], Route | Answer] = {}
        self._server: socketserver.ThreadingUnixStreamServer | None = None

    @property
    def host(self) -> str:
        return f"unix://{self.path}"

    def on(self, method: str, path: str, answer: Route | Answer) -> None:
        self.routes[method, path] = answer

    def start(self) -> None:
        fake = self

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

            def server_bind(self) -> None:
                with places.short_path(fake.path) as name:
                    self.socket.bind(name)

            def handle_error(self, request: object, client_address: object) -> None:
                """Clients that go away are a part of the tests."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                fake._answer(self)

            do_POST = do_GET  # noqa: N815 - the base class calls it so

        self._server = Server(str(self.path), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self, *, uncleanly: bool = False) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            if not uncleanly:
                self.path.unlink(missing_ok=True)

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        length = int(handler.headers.get("Content-Length") or 0)
        body = json.loads(handler.rfile.read(length)) if length else None
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        request = Request(handler.command, url.path, query, body)
        self.requests.append(request)
        found = self.routes.get((request.method, request.path))
        if found is None:
            missing = {"code": "unknown", "exit": 2, "message": f"nothing at {request.path}", "problems": []}
            found = (404, missing)
        answer = found(request) if callable(found) else found
        handler.close_connection = True
        if isinstance(answer, Stream):
            self._stream(handler, answer)
            return
        status, value = answer if isinstance(answer, tuple) else (200, answer)
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    @staticmethod
    def _stream(handler: BaseHTTPRequestHandler, answer: Stream) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        try:
            for chunk in answer.chunks:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                handler.wfile.flush()
        except Drop:
            with contextlib.suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)
            return
        handler.wfile.write(b"0\r\n\r\n")


def row(job: int = 12, state: str = "running", **more: Any) -> dict[str, Any]:
    """A row of the contract."""
    started = None if state == "queued" else "2026-01-02T03:04:05.000000Z"
    ended = "2026-01-02T03:14:05.000000Z" if state in ("succeeded", "failed", "cancelled") else None
    plain: dict[str, Any] = {
        "id": job,
        "index": None,
        "name": "resnet",
        "owner": "alice",
        "state": state,
        "reason": None,
        "message": None,
        "gpus": [],
        "submitted_at": "2026-01-02T03:00:00.000000Z",
        "started_at": started,
        "ended_at": ended,
        "exit_code": 0 if state == "succeeded" else None,
        "attempt": 0 if state == "queued" else 1,
        "estimated_start": None,
    }
    return plain | more


def lines(*rows: dict[str, Any] | type[Drop]) -> Iterator[bytes]:
    """Rows as JSON lines; Drop breaks the connection off."""
    for item in rows:
        if not isinstance(item, dict):
            raise item
        yield json.dumps(item).encode() + b"\n"


def frames(*records: tuple[int, bytes] | type[Drop]) -> Iterator[bytes]:
    """Records (stream, payload) as frames; Drop breaks the connection off."""
    for number, item in enumerate(records):
        if not isinstance(item, tuple):
            raise item
        yield encode_frame(LogRecord(1_700_000_000_000_000_000 + number * 1_000_000, *item))
