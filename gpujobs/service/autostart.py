"""Starting a server for an account whose command finds none, and what servers leave written about themselves."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpujobs import places
from gpujobs.adapters import enginelock
from gpujobs.adapters.engine import Engine, default_host
from gpujobs.core.errors import Unavailable

START_SECONDS = 30.0
"""In which a server that a command has started has to listen."""

LOOK_SECONDS = 0.05
"""Between looks at whether a server that is starting listens."""


def address_of(environ: Mapping[str, str]) -> Path:
    """Where a server that this process would be listens."""
    return places.socket_of(host) if (host := environ.get("GPUJOBS_HOST")) else places.server_socket(environ)


def not_made(state: Path, error: OSError) -> Unavailable:
    """The sentence for a state directory that cannot be made."""
    return Unavailable(
        f"the state directory {state} cannot be made: {error.strerror}: {error.filename}",
        hint="Set GPUJOBS_STATE to a directory that can be written.",
    )


def record_of(state: Path) -> dict[str, Any]:
    """What the last server of a state directory has written about itself; empty for nothing."""
    try:
        data = json.loads((state / "server.json").read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def record_of_this(address: Path) -> dict[str, Any]:
    """What this process writes about itself while it is a server."""
    me = enginelock.Holder.me()
    return {
        "pid": me.pid, "uid": me.uid, "boot": me.boot, "start": me.start, "namespace": me.namespace,
        "socket": str(address), "clean": False,
    }  # fmt: skip


def ensure_server(environ: Mapping[str, str] | None = None) -> str | None:
    """Start a server for this user where none answers; returns the sentence that says so, None where one came up.

    Only where no system server is installed, and this user may use Docker. A server that ended without saying so
    is not started again behind its user's back: its last words are shown instead.

    Raises:
        Unavailable: It may not, or did not, start.
    """
    environ = os.environ if environ is None else environ
    state, address, root = places.server_state(environ), address_of(environ), os.geteuid() == 0
    _require_absent(places.SYSTEM_SETTINGS)
    if not root:
        _require_absent(places.system_socket())
    while _ended_uncleanly(record := record_of(state)):  # or one lives that has not ended: the next look tells
        if _comes_up(state, address):
            return None
        if record_of(state) == record:
            raise Unavailable(
                f"the server (pid {record.get('pid')}) ended without being stopped. Its last lines:\n"
                f"{_last_lines(state)}",
                hint="Containers go on. Start it again and look at what it says: `gpujobs serve`.",
            )
    if root:  # one whose state was elsewhere, and which has not removed it
        _require_absent(places.system_socket())
    _may_use_docker(environ)
    with _in_turn(state):
        if _answers(address) or _comes_up(state, address):
            return None
        _spawn(state, environ)
    return f"started a server (state in {state}); it goes on after this command, `gpujobs show` and the others use it"


def _ended_uncleanly(record: Mapping[str, Any]) -> bool:
    """Whether a server, if it does not live any more, ended in this boot without saying so."""
    return record.get("clean") is False and record.get("boot") == enginelock.boot_id()


def _require_absent(installed: Path) -> None:
    """Refuse to start a server beside the machine's own."""
    if os.path.lexists(installed):
        root = os.geteuid() == 0
        raise Unavailable(
            f"the server of this machine does not answer ({installed} is there)",
            hint="Start it: `systemctl start gpujobs`, or `gpujobs serve`." if root
            else "Ask its administrator: `systemctl status gpujobs`.",
        )  # fmt: skip


def _answers(address: Path) -> bool:
    """Whether somebody listens there; who it is, the client looks at."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            with places.short_path(address) as name:
                probe.connect(name)
        except OSError:
            return False
    return True


def _comes_up(state: Path, address: Path) -> bool:
    """Whether the server that lives in a state directory answers at an address: one that is starting is waited for."""
    deadline = time.monotonic() + START_SECONDS
    while _lives(record := record_of(state)) and record.get("socket") == str(address) and time.monotonic() < deadline:
        if _answers(address):
            return True
        time.sleep(LOOK_SECONDS)
    return False


def _lives(record: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a record still is that server."""
    try:
        holder = enginelock.Holder(
            nonce="", pid=int(record["pid"]), uid=int(record["uid"]), start=int(record["start"]),
            boot=str(record["boot"]), namespace=str(record["namespace"]),
        )  # fmt: skip
    except (KeyError, ValueError, TypeError):
        return False
    return record.get("clean") is False and holder.alive()


@contextmanager
def _in_turn(state: Path) -> Iterator[None]:
    """One command at a time starts a server: those that come meanwhile find it started.

    Raises:
        Unavailable: The state directory cannot be made, or another command takes for ever.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        turn = os.open(state / "starting", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise not_made(state, error) from error
    try:
        deadline = time.monotonic() + 2 * START_SECONDS
        while not _locked(turn):
            if time.monotonic() > deadline:
                raise Unavailable(
                    "another command is starting a server, and is not done with it",
                    hint="Try again; `gpujobs serve` shows what keeps it.",
                )
            time.sleep(LOOK_SECONDS)
        yield
    finally:
        os.close(turn)


def _locked(descriptor: int) -> bool:
    """Take a lock; whether nobody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _may_use_docker(environ: Mapping[str, str]) -> None:
    async def ask() -> None:
        engine = Engine(default_host(environ))
        try:
            await engine.info()
        finally:
            engine.close()

    try:
        asyncio.run(ask())
    except Unavailable as error:
        raise Unavailable(
            f"no gpujobs server answers, and none was started: {error.message}", hint=error.hint
        ) from error


def _last_lines(state: Path, count: int = 10) -> str:
    try:
        lines = (state / "server.log").read_text(errors="backslashreplace").splitlines()
    except OSError:
        return "  (it left no log here)"
    return "\n".join(f"  {line}" for line in lines[-count:])


def _spawn(state: Path, environ: Mapping[str, str]) -> None:
    try:
        log = os.open(state / "server.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise not_made(state, error) from error
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpujobs", "serve"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            start_new_session=True, cwd="/", env=_for_elsewhere(environ),
        )  # fmt: skip
    finally:
        os.close(log)
    assert process.stdout is not None
    watchdog = signal.signal(signal.SIGALRM, lambda *_: process.kill())
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    try:
        line = process.stdout.readline()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, watchdog)
        process.stdout.close()
    if not line.startswith(b"listening on "):
        code = process.wait()
        raise Unavailable(f"the server did not start (exit {code}). Its last lines:\n{_last_lines(state)}")
    process.returncode = 0  # it stays: nobody here waits for it


def _for_elsewhere(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process in another directory: what is named from here on is named as a whole."""
    given = dict(environ)
    if state := given.get("GPUJOBS_STATE"):
        given["GPUJOBS_STATE"] = str(Path(state).absolute())
    if libraries := given.get("LD_LIBRARY_PATH"):
        given["LD_LIBRARY_PATH"] = ":".join(str(Path(part).absolute()) for part in libraries.split(":"))
    return given
