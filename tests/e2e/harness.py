"""What the end-to-end tests are written with: a server process, its command line, and looks from outside."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.lab import checkout
from tests.lab.accounts import Account, command_as
from tests.lab.engine import Daemon, Engine

T = TypeVar("T")
Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
GPUJOBS = checkout.program()
BUSYBOX = "gpujobs-lab/busybox:1"
CUDA_LIKE = "gpujobs-lab/cuda-like:1"
HOSTILE = "gpujobs-lab/hostile:1"
ENDED = ("succeeded", "failed", "cancelled")


def wait_for(what: Callable[[], T | None], why: str | Callable[[], str], timeout: float = 30.0) -> T:
    """Ask until the answer is something, and return it; fails with ``why`` when the time is over."""
    deadline = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < deadline, f"not in {timeout:g} s: {why() if callable(why) else why}"
        time.sleep(0.05)
    return found


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: bytes
    err: bytes

    @property
    def json(self) -> Any:
        """Its standard output as JSON."""
        assert self.code == 0, self
        return json.loads(self.out)

    @property
    def words(self) -> str:
        """Its standard error as text."""
        return self.err.decode()


def run(
    argv: list[str], env: Mapping[str, str], *, user: Account | None = None, stdin: bytes = b"", timeout: float = 60.0
) -> Done:
    """Run a command, as root or as an account, with this environment and a usual PATH and HOME alone."""
    if user is None:
        command, given = argv, {"PATH": os.environ["PATH"], "HOME": "/root", **env}
    else:
        command, given = command_as(user, argv, env), dict(os.environ)
    ended = subprocess.run(command, input=stdin, capture_output=True, env=given, cwd="/", timeout=timeout, check=False)
    return Done(ended.returncode, ended.stdout, ended.stderr)


class Place:
    """A short directory that accounts can enter, with directories for volumes in it; gone after the test."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="gje2e-", dir="/tmp"))
        self.path.chmod(0o755)

    def volume(self, owner: Account, name: str = "v") -> Path:
        """A directory of mode 0700 of an account's."""
        directory = self.path / name
        directory.mkdir()
        os.chown(directory, owner.uid, owner.gid)
        directory.chmod(0o700)
        return directory

    def remove(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.path)


class Server:
    """A real ``gpujobs serve``, which may be killed and started again on the same state.

    Args:
        directory: For its state, socket and output.
        environment: DOCKER_HOST and where NVML is.
        runner: The account that jobs run as unless told otherwise.
        settings: The text of its settings file.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str], runner: Account, settings: str = "") -> None:
        self.directory = directory
        self.state = directory / "state"
        self.socket = directory / "s.sock"
        self.runner = runner
        self.settings = directory / "server.yaml"
        self.settings.write_text(settings)
        self.environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._runs = 0

    # -- the process -------------------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        """Its GPUJOBS_HOST."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """The process id of the server that runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def said(self) -> str:
        """Its standard error since it was started last."""
        return (self.directory / f"err.{self._runs}").read_text()

    def spawn(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start the process and do not wait for anything."""
        self._runs += 1
        given = {"PATH": os.environ["PATH"], "GPUJOBS_HOST": self.host, "GPUJOBS_STATE": str(self.state),
                 **self.environment, **environment}  # fmt: skip
        out, err = (self.directory / f"{name}.{self._runs}" for name in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            self._process = subprocess.Popen(
                [GPUJOBS, "serve", "--config", self.settings], env=given, stdin=subprocess.DEVNULL, stdout=stdout,
                stderr=stderr, cwd="/",
            )  # fmt: skip
        return self._process

    def start(self, **environment: str) -> Server:
        """Start it and wait until it listens."""
        process = self.spawn(**environment)
        out = self.directory / f"out.{self._runs}"

        def listens() -> bool:
            assert process.poll() is None, f"the server ended with {process.returncode}:\n{self.said}"
            return b"listening on" in out.read_bytes()

        wait_for(listens, "the server listens")
        assert out.read_text() == f"listening on {self.host}\n"
        return self

    def reload(self, settings: str) -> None:
        """Give it other settings while it runs; returns when they hold."""
        read = "the settings were read again"
        before = self.said.count(read)
        self.settings.write_text(settings)
        os.kill(self.pid, signal.SIGHUP)
        wait_for(lambda: self.said.count(read) > before, lambda: f"the settings are read: {self.said[-2000:]}")

    def stop(self) -> int:
        """End it in order; returns its exit code."""
        if self._process is None:
            return 0
        self._process.terminate()
        code = self._process.wait(timeout=30)
        self._process = None
        return code

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=10)
        self._process = None

    def died(self, timeout: float = 30.0) -> None:
        """Wait until a fault point has killed it."""
        assert self._process is not None
        assert self._process.wait(timeout=timeout) == -signal.SIGKILL, self.said
        self._process = None

    def clean(self, engine: Engine) -> None:
        """Stop it, and remove what is left of its containers and pins."""
        self.stop()
        remove_leftovers(self.state, engine)

    # -- asking it ---------------------------------------------------------------------------------------------

    def cli(self, *args: str, user: Account | None = None, stdin: bytes = b"", timeout: float = 60.0) -> Done:
        """Run a command of the command line against it."""
        return run([str(GPUJOBS), *args], {"GPUJOBS_HOST": self.host}, user=user, stdin=stdin, timeout=timeout)

    def submit(self, user: Account | None = None, **keys: Any) -> str:
        """Submit a job, as root for the runner or as ``user``; returns its id."""
        run_as = () if user is not None else ("--run-as", self.runner.name)
        done = self.cli("submit", "--quiet", *run_as, "-", user=user, stdin=spec(**keys))
        assert done.code == 0, done
        return done.out.decode().strip()

    def run(self, *, user: Account | None = None, timeout: float = 60.0, **keys: Any) -> Done:
        """``gpujobs run`` a job."""
        run_as = () if user is not None else ("--run-as", self.runner.name)
        return self.cli("run", *run_as, "-", user=user, stdin=spec(**keys), timeout=timeout)

    def get(self, path: str) -> Any:
        """GET of the HTTP API, as root."""
        with connected(self.socket) as connection:
            connection.request("GET", f"/v1{path}")
            answer = connection.getresponse()
            body = json.loads(answer.read())
            assert answer.status == 200, body
            return body

    def job(self, job: str) -> Row:
        """Everything about one job."""
        (row,) = self.get(f"/jobs/{job}")["jobs"]
        return row

    def jobs(self) -> list[Row]:
        """All jobs that there ever were, oldest first."""
        return list(self.get("/jobs?all=1")["jobs"])

    def until(self, job: str, *states: str, timeout: float = 30.0) -> Row:
        """Wait until a job is in one of these states."""

        def look() -> Row | None:
            row = self.job(job)
            assert row["state"] in states or row["state"] not in ENDED, row
            return row if row["state"] in states else None

        return wait_for(look, lambda: f"job {job} is {states}: {self.job(job)}", timeout)

    def ended(self, job: str, timeout: float = 60.0) -> Row:
        """Wait for a job's end, and until its log is stored."""
        return wait_for(
            lambda: row if (row := self.job(job))["state"] in ENDED and _complete(row) else None,
            lambda: f"job {job} and its log have ended: {self.job(job)}",
            timeout,
        )


def _complete(row: Row) -> bool:
    return all(attempt["log_complete"] for attempt in row["attempts"] if attempt["started_at"])


def remove_leftovers(state: Path, engine: Engine) -> None:
    """Remove the containers and pins of the server, stopped, that has this state directory."""
    ledger = state / "state.sqlite"
    if not ledger.exists():
        return
    with closing(sqlite3.connect(ledger)) as connection:
        row = connection.execute("SELECT value FROM meta WHERE name = 'server'").fetchone()
    if row is None:
        return
    if left := engine.docker("ps", "--all", "--quiet", "--filter", f"name=^gpujobs-{row[0]}-").split():
        engine.docker("rm", "--force", "--volumes", *left)
    for pin in Path("/run/gpujobs/pins").glob(f"gpujobs-{row[0]}-*"):
        subprocess.run(["umount", "--recursive", "--lazy", pin], check=True)
        pin.rmdir() if pin.is_dir() else pin.unlink()


@contextmanager
def connected(path: Path) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.settimeout(30)
        connection.sock.connect(str(path))
        yield connection
    finally:
        connection.close()


def spec(**keys: Any) -> bytes:
    """A job file, in the part of YAML that is JSON; ``script`` is a shell's, in busybox unless said otherwise."""
    script = keys.pop("script", None)
    given: dict[str, Any] = {"name": "e2e", "image": BUSYBOX, "stop_grace_period": "2s", "mem_limit": "64m", **keys}
    if script is not None:
        given["command"] = ["sh", "-c", script]
    return json.dumps(given).encode()


def inspect(engine: Engine | Daemon, container: str) -> Row:
    """What the Engine knows of a container."""
    found = engine.engine if isinstance(engine, Daemon) else engine
    return dict(json.loads(found.docker("inspect", container))[0])


# Runs in the container's device cgroup, outside of its file system: what the kernel says of each node.
_OPENER = """
import errno, os, sys
open(sys.argv[1], "w").write("0")
for minor in range(int(sys.argv[2])):
    try:
        os.close(os.open(f"/dev/nvidia{minor}", os.O_RDWR))
        print(minor, "opened")
    except OSError as error:
        print(minor, errno.errorcode[error.errno])
"""


def cgroup_of(pid: int, controller: str) -> Path:
    """The directory of the cgroup in which a controller governs a process, v1's or the unified one."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if controller in controllers.split(","):
            return Path(f"/sys/fs/cgroup/{controllers}{path}")
    return next(Path("/sys/fs/cgroup" + path) for number, _, path in lines if number == "0")


def openings(pid: int, nodes: int = 8) -> dict[int, str]:
    """What comes of opening each ``/dev/nvidiaN`` in a process's device cgroup: ENXIO where it is allowed.

    There is no driver behind the lab's nodes: an allowed one answers ENXIO, one that the cgroup denies EPERM.
    """
    ended = subprocess.run(
        ["/usr/bin/python3", "-c", _OPENER, str(cgroup_of(pid, "devices") / "cgroup.procs"), str(nodes)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {int(minor): word for minor, word in (line.split() for line in ended.stdout.splitlines())}
