"""A server with simulated GPUs, started as a service manager would start it, and such a manager's end of the talk."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.e2e.harness import GPUJOBS, ROOT, Done, remove_leftovers, run, wait_for
from tests.lab.engine import Engine

LAUNCH = """
import os, sys
descriptors, argv = sys.argv[1].split(","), sys.argv[2:]
for number, descriptor in enumerate(filter(None, descriptors)):
    os.dup2(int(descriptor), 3 + number)
if sys.argv[1]:
    os.environ.setdefault("LISTEN_PID", str(os.getpid()))
    os.environ.update(LISTEN_FDS=str(len(descriptors)), LISTEN_FDNAMES=":".join(["gpujobs.socket"] * len(descriptors)))
os.execv(argv[0], argv)
"""
"""As a service manager starts a service: descriptors from 3 on, and the process's own id in the environment."""


class Receiver:
    """The notification socket of a service manager, which asks the kernel who sends."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.senders: set[int] = set()

    def close(self) -> None:
        self._socket.close()

    def next(self, timeout: float = 30.0) -> dict[str, str]:
        """The next message as its assignments; empty when none came in time."""
        ready, _, _ = select.select([self._socket], [], [], timeout)
        if not ready:
            return {}
        data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(struct.calcsize("3i")))
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                self.senders.add(struct.unpack("3i", content[: struct.calcsize("3i")])[0])
        return dict(line.split("=", 1) for line in data.decode().splitlines())

    def until(self, name: str, timeout: float = 30.0) -> dict[str, str]:
        """The next message that says this."""
        deadline = time.monotonic() + timeout
        while name not in (found := self.next(max(0.0, deadline - time.monotonic()))):
            assert time.monotonic() < deadline, f"no {name}"
        return found


class Server:
    """A server with simulated GPUs, started as a service manager would.

    Args:
        place: A directory for its state, settings, log and, where none is passed on, its socket.
        environ: DOCKER_HOST.
        command: The gpujobs that it is.
    """

    def __init__(self, place: Path, environ: Mapping[str, str], command: Path = GPUJOBS) -> None:
        self._command = command
        self._starts = 0
        self.state = place / "state"
        self.own = place / "own.sock"
        self.config = place / "server.yaml"
        self.config.write_text("")
        self._environ = {"PATH": os.environ["PATH"], "GPUJOBS_STATE": str(self.state),
                         "GPUJOBS_HOST": f"unix://{self.own}", **environ}  # fmt: skip
        self._log = place / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self, *passed: socket.socket | int, **environ: str) -> subprocess.Popen[bytes]:
        self._starts += 1
        numbers = [item if isinstance(item, int) else item.fileno() for item in passed]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, ",".join(map(str, numbers)), str(self._command), "serve", "--config",
                 str(self.config), "--simulate", str(ROOT / "configs/simulated/dgx-a100.yaml")],
                env={**self._environ, **environ}, pass_fds=numbers, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        return self.process

    @property
    def said(self) -> str:
        return self._log.read_text()

    def listens(self) -> None:
        assert self.process is not None
        process = self.process

        def look() -> bool:
            assert process.poll() is None, self.said
            return self.said.count("listening on") == self._starts

        wait_for(look, "it listens")

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(timeout=30)
        self.process = None
        return code

    def clean(self, lab: Engine) -> None:
        """End it however it is, and remove what is left of its containers and pins."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=10)
            self.process = None
        remove_leftovers(self.state, lab)


def ask(address: Path, *args: str, stdin: bytes = b"") -> Done:
    return run([str(GPUJOBS), *args], {"GPUJOBS_HOST": f"unix://{address}"}, stdin=stdin)
