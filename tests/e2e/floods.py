"""Programs of an account's that would keep others from a server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.harness import Server
from tests.lab.accounts import Account, command_as

FLOOD = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
kind, count, held = sys.argv[2], int(sys.argv[3]), []
for _ in range(count):
    s = socket.socket(socket.AF_UNIX)
    s.connect(sys.argv[1])
    if kind == "half":
        s.sendall(b"POST /v1/jobs HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 1000\\r\\n\\r\\n{")
    elif kind == "head":
        s.sendall(b"GET /v1/jobs HTTP/1.1\\r\\nX-Slow: ")
    elif kind == "deaf":
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.sendall(b"GET /v1/jobs?all=1 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n" * 20)
    held.append(s)
print("on", flush=True)
sys.stdin.read(1)
open_ = 0
for s in held:
    s.setblocking(False)
    try:
        if s.recv(1):
            open_ += 1
    except BlockingIOError:
        open_ += 1
    except OSError:
        pass
print(open_, flush=True)
"""
"""Opens so many connections and tells on its output how many of them are open when it is asked."""


@contextmanager
def asking(server: Server, user: Account, program: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A process of an account's that has the socket's path and does what the program says."""
    process = subprocess.Popen(
        command_as(user, [sys.executable, "-c", program, str(server.socket), *args]), cwd="/", text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
