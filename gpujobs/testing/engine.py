"""An Engine in memory, and a :class:`gpujobs.core.ports.Runner` over it that behaves as the real one does.

What it does in each case is held to the real Engine by tests/contract/test_runner.py.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from gpujobs.core.container import CONTROL, Image
from gpujobs.core.errors import Unavailable
from gpujobs.core.ports import (
    Clock,
    Conflict,
    Disconnected,
    EngineAway,
    EngineError,
    EngineEvent,
    Gone,
    Log,
    LogEnd,
    Reconnected,
)
from gpujobs.core.reconcile import Seen
from gpujobs.core.secrets import DIRECTORY
from gpujobs.logwire import STDOUT, LogRecord
from gpujobs.testing.logs import MemoryLog
from gpujobs.testing.machine import IdleMachine

T = TypeVar("T")

REMEMBERED = 256
"""Events that an Engine keeps for who asks later."""

HANG_SECONDS = 60.0
"""After which a call of a hanging Engine is given up."""

LOG_CONFIG: Mapping[str, object] = {"Type": "local", "Config": {}}
NEVER = "0001-01-01T00:00:00Z"
_KILLED = 137


@dataclass(eq=False, kw_only=True)
class FakeContainer:
    """One container.

    Attributes:
        request: What it was made of, as of the Engine's create request.
        made_by: ``server`` through a runner, ``hand`` otherwise.
        status: Docker's word: ``created running exited``.
        released: Its program runs, or ran: nothing held it back, or the gate was opened.
        runs: How many times its program was let run.
        exits: The codes with which it has ended.
        output: What it wrote.
        secrets: What its init was handed of them; None where it asks for none.
    """

    id: str
    name: str
    request: Mapping[str, Any]
    made_by: str
    created_at: float
    status: str = "created"
    exit_code: int = 0
    oom: bool = False
    pid: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    released: bool = False
    runs: int = 0
    gone: bool = False
    exits: list[int] = field(default_factory=list)
    output: list[LogRecord] = field(default_factory=list)
    gate: int = -1
    secrets: bytes | None = None

    @property
    def running(self) -> bool:
        """Whether a process of it lives."""
        return self.status == "running"

    @property
    def environment(self) -> dict[str, str]:
        """Its variables."""
        return dict(entry.partition("=")[::2] for entry in self.request.get("Env") or [])

    @property
    def labels(self) -> dict[str, str]:
        """Its labels."""
        return dict(self.request.get("Labels") or {})

    @property
    def host(self) -> Mapping[str, Any]:
        """Its HostConfig."""
        return self.request.get("HostConfig") or {}

    @property
    def gpus(self) -> frozenset[str]:
        """The UUIDs that its environment makes visible under a GPU runtime."""
        host = self.host
        if host.get("Runtime", "runc") == "runc":
            return frozenset()
        return frozenset(self.environment.get("NVIDIA_VISIBLE_DEVICES", "void").split(",")) - {"void"}

    @property
    def control(self) -> Path | None:
        """The control directory with the FIFO at which its init waits; None where it has no init."""
        for mount in self.host.get("Mounts") or []:
            if str(mount["Target"]).startswith(f"{CONTROL}-"):
                return Path(mount["Source"])
        return None

    def take_secrets(self) -> None:
        """Read them as its init does, if there are to be any; an init that finds none refuses."""
        if self.control is not None and DIRECTORY in (self.host.get("Tmpfs") or {}):
            self.secrets = (self.control / "secrets").read_bytes()


@dataclass(kw_only=True)
class _Failure:
    method: str
    error: Exception
    after: bool


class FakeEngine:
    """Containers in memory, and all that can befall an Engine.

    Args:
        clock: The time that events bear.
        minors: The device number of each GPU by UUID.

    Attributes:
        latency: Seconds that a call waits before it takes effect, and again before it is answered.
        death: Seconds from a signal until the process that it ends has gone.
        on_signal: With which code a released program ends at a signal; None where it goes on.
        on_create: Called when a container is made.
        on_start: Called when a container starts.
        on_release: Called when a container's program is let run.
        greeting: What a program writes when it begins.
        extra: Device numbers that every container is granted besides its own.
        configs: What an image's configuration adds to that of its containers, by the image's id.
    """

    def __init__(self, clock: Clock, minors: Mapping[str, int] | None = None) -> None:
        self.clock = clock
        self.minors = dict(minors or {})
        self.latency: Callable[[], float] = lambda: 0.0
        self.death: Callable[[], float] = lambda: 0.0
        self.on_signal: Callable[[FakeContainer, str], int | None] = lambda _, signal: {"SIGTERM": 143}.get(signal)
        self.on_create: Callable[[FakeContainer], None] = lambda _: None
        self.on_start: Callable[[FakeContainer], None] = lambda _: None
        self.on_release: Callable[[FakeContainer], None] = lambda _: None
        self.extra: frozenset[int] = frozenset()
        self.configs: dict[str, Mapping[str, Any]] = {}
        self.greeting = b"begun\n"
        self.containers: dict[str, FakeContainer] = {}
        self.history: list[FakeContainer] = []
        self.events: list[EngineEvent] = []
        self.forgotten = 0
        self.outages = 0
        self.away = False
        self.hangs = False
        self.changed = asyncio.Event()
        self._failures: list[_Failure] = []
        self._ids = itertools.count(1)

    # -- containers --------------------------------------------------------------------------------------------

    def find(self, reference: str) -> FakeContainer:
        """A container by its id or name.

        Raises:
            Gone: There is none.
        """
        found = self.containers.get(reference)
        found = found or next((c for c in self.containers.values() if c.name == reference), None)
        if found is None:
            raise Gone(f"No such container: {reference}")
        return found

    def create(self, name: str, request: Mapping[str, Any], *, made_by: str = "hand") -> FakeContainer:
        """Make a container.

        Raises:
            Conflict: The name is taken.
        """
        for other in self.containers.values():
            if other.name == name:
                raise Conflict(f'Conflict. The container name "/{name}" is already in use by container "{other.id}".')
        request = {**self.configs.get(str(request.get("Image")), {}), **request}
        container = FakeContainer(
            id=f"{next(self._ids):064x}", name=name, request=request, made_by=made_by, created_at=self.clock.now()
        )
        self.containers[container.id] = container
        self.history.append(container)
        self._event("create", container)
        self.on_create(container)
        return container

    def start(self, container: FakeContainer) -> None:
        """Start it, or start it again; nothing happens where it runs."""
        if container.running:
            return
        container.status, container.pid = "running", 100_000 + len(self.events)
        container.started_at, container.released = self.clock.now(), False
        if (control := container.control) is not None:
            with suppress(FileNotFoundError):
                container.take_secrets()
                container.gate = os.open(control / "gate", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._event("start", container)
        self.on_start(container)
        if control is None:
            self._release(container)
        elif container.gate < 0:
            self.end(container, 125)

    def _release(self, container: FakeContainer) -> None:
        container.released = True
        container.runs += 1
        self.on_release(container)
        if self.greeting:
            self.write(container, self.greeting)

    def poll(self) -> None:
        """Let go the programs whose gates have been opened."""
        for container in self.containers.values():
            self._look_at_gate(container)

    def _look_at_gate(self, container: FakeContainer) -> None:
        if container.gate < 0 or container.released:
            return
        assert container.control is not None
        if container.host.get("Runtime") == "runsc":
            if (container.control / "word").exists():
                self._release(container)
            return
        with suppress(BlockingIOError):
            if os.read(container.gate, 1) == b"g":
                self._release(container)

    def write(self, container: FakeContainer, data: bytes, stream: int = STDOUT) -> None:
        """Its program writes something."""
        container.output.append(LogRecord(int(self.clock.now() * 1e9), stream, data))
        self._tell()

    def end(self, container: FakeContainer, code: int, *, oom: bool = False, told: bool = True) -> None:
        """Its first process ends; nothing happens where it does not run."""
        if not container.running:
            return
        self._look_at_gate(container)
        container.status, container.exit_code, container.oom, container.pid = "exited", code, oom, 0
        container.finished_at = self.clock.now()
        container.exits.append(code)
        if container.gate >= 0:
            os.close(container.gate)
            container.gate = -1
        if told:
            self._event("die", container, {"exitCode": str(code)})

    def signal(self, container: FakeContainer, signal: str) -> None:
        """Send its first process a signal: it takes effect after a while."""

        def ends() -> None:
            self._look_at_gate(container)
            if signal in ("SIGKILL", "KILL", "9"):
                self.end(container, _KILLED)
            elif not container.released and container.gate >= 0:
                self.end(container, 143)
            elif (code := self.on_signal(container, signal)) is not None:
                self.end(container, code)

        if container.running:
            asyncio.get_running_loop().call_later(self.death(), ends)

    def remove(self, container: FakeContainer) -> None:
        """Remove it, also while it runs."""
        self.end(container, _KILLED)
        if self.containers.pop(container.id, None) is not None:
            container.gone = True
            self._event("destroy", container)

    def _event(self, action: str, container: FakeContainer, attributes: Mapping[str, str] | None = None) -> None:
        attributes = {**container.labels, "name": container.name, **(attributes or {})}
        self.events.append(
            EngineEvent(int(self.clock.now() * 1e9), "container", action, container.id, attributes)
        )
        self.forgotten = max(self.forgotten, len(self.events) - REMEMBERED)
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    # -- what can befall it ------------------------------------------------------------------------------------

    def fail(self, method: str, error: Exception, *, after: bool = False) -> None:
        """The next call of that method fails, before it takes effect or ``after`` it."""
        self._failures.append(_Failure(method=method, error=error, after=after))

    def failing(self, method: str) -> _Failure | None:
        """The failure that is due, once."""
        found = next((failure for failure in self._failures if failure.method == method), None)
        if found is not None:
            self._failures.remove(found)
        return found

    def heal(self) -> None:
        """No call is to fail any more."""
        self._failures.clear()

    def go_away(self) -> None:
        """It is killed: no call is answered; its containers stay as they are."""
        self.away = True
        self._tell()

    def come_back(self, *, live_restore: bool = True) -> None:
        """It is started again, knows nothing of what was, and without live restore ends what runs."""
        if not self.away:
            return
        if not live_restore:
            for container in list(self.containers.values()):
                self.end(container, _KILLED, told=False)
        self.forgotten = len(self.events)
        self.outages += 1
        self.away = False
        self._tell()

    def close(self) -> None:
        """Let go of all gates."""
        for container in self.containers.values():
            if container.gate >= 0:
                os.close(container.gate)
                container.gate = -1


class FakeRunner(IdleMachine):
    """A Runner over an Engine in memory.

    Args:
        engine: The Engine; several runners may use one.
    """

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self._cut = False

    def cut(self) -> None:
        """Its process is dead: nothing that it has begun goes on."""
        self._cut = True

    async def _alive(self) -> None:
        if self._cut:
            await asyncio.get_running_loop().create_future()

    async def _reach(self) -> None:
        """Wait as a call does until it takes effect.

        Raises:
            EngineAway: It does not.
        """
        await asyncio.sleep(self.engine.latency())
        if self.engine.hangs:
            await asyncio.sleep(HANG_SECONDS)
        await self._alive()
        if self.engine.away or self.engine.hangs:
            raise EngineAway("the Docker Engine does not answer")

    async def _call(self, method: str, action: Callable[[], T]) -> T:
        await self._reach()
        failure = self.engine.failing(method)
        if failure is not None and not failure.after:
            raise failure.error
        result = action()
        await asyncio.sleep(self.engine.latency())
        await self._alive()
        if failure is not None:
            raise failure.error
        if self.engine.away:
            raise EngineAway("the Docker Engine does not answer")
        return result

    @property
    def log_config(self) -> Mapping[str, object]:
        """A LogConfig."""
        return LOG_CONFIG

    def ceilings(self) -> dict[str, int]:
        """None."""
        return {}

    async def network(self) -> str:
        """It is there."""
        return await self._call("network", lambda: "gpujobs")

    async def image(self, reference: str) -> Image:
        """Every image is there."""
        return await self._call("image", lambda: Image(id=f"sha256:{reference}", reference=reference))

    async def create(self, name: str, request: Mapping[str, Any]) -> str:
        """Make a container."""
        return (await self._call("create", lambda: self.engine.create(name, request, made_by="server"))).id

    async def start(self, container: str) -> None:
        """Start it."""
        await self._call("start", lambda: self.engine.start(self.engine.find(container)))

    async def inspect(self, container: str) -> dict[str, Any]:
        """Everything that is known of it."""
        return await self._call("inspect", lambda: inspected(self.engine.find(container)))

    async def seen(self, container: str) -> Seen:
        """What reconciliation needs of it."""
        return await self._call("inspect", lambda: _seen(self.engine.find(container)))

    async def containers(self) -> list[Seen]:
        """All of them."""
        return await self._call("containers", lambda: [_seen(c) for c in self.engine.containers.values()])

    async def kill(self, container: str, signal: str) -> None:
        """Send it a signal."""

        def send() -> None:
            with suppress(Gone):
                self.engine.signal(self.engine.find(container), signal)

        await self._call("kill", send)

    async def unthrottle(self, container: str) -> None:
        """It has no limit."""
        del container
        await self._call("unthrottle", lambda: None)

    async def remove(self, container: str) -> None:
        """Remove it."""

        def drop() -> None:
            with suppress(Gone):
                self.engine.remove(self.engine.find(container))

        await self._call("remove", drop)

    async def granted(self, container: str, pid: int, minors: Iterable[int]) -> frozenset[int]:
        """The device numbers of the GPUs that it asked for."""
        del minors

        def look() -> frozenset[int]:
            found = self.engine.find(container)
            if not found.running or found.pid != pid:
                raise Unavailable(f"the container's first process (pid {pid}) is gone")
            return frozenset(self.engine.minors[uuid] for uuid in found.gpus) | self.engine.extra

        return await self._call("granted", look)

    async def events(self, since: float) -> AsyncIterator[EngineEvent | Disconnected | Reconnected]:
        """What happens from a time on."""
        engine = self.engine
        outages = engine.outages
        # As with the real one, the time chooses among those that were before, and what comes is told in any case.
        old = [event.time_ns >= int(since * 1e9) for event in engine.events]
        position = old.index(True) if True in old else len(old)
        while True:
            await self._alive()
            if engine.away or outages != engine.outages:
                yield Disconnected("the Engine ended the connection")
                while engine.away:
                    await engine.changed.wait()
                await asyncio.sleep(engine.latency())
                outages = engine.outages
                await self._alive()
                yield Reconnected()
            position = max(position, engine.forgotten)
            changed = engine.changed
            while position < len(engine.events) and not engine.away and outages == engine.outages:
                event = engine.events[position]
                position += 1
                await asyncio.sleep(engine.latency())
                await self._alive()
                yield event
            if changed is engine.changed:
                await changed.wait()

    async def follow(self, container: str, log: Log) -> LogEnd:
        """Copy what it writes."""
        if not isinstance(log, MemoryLog):
            raise TypeError("only a log in memory can be followed into")
        engine = self.engine
        while True:
            changed = engine.changed
            await self._alive()
            if not engine.away:
                found = engine.containers.get(container)
                if found is None:
                    return LogEnd(gone=True, gaps=0)
                log.records += found.output[len(log.records) :]
                if found.status == "exited":
                    return LogEnd(gone=False, gaps=0)
            if changed is engine.changed:
                await changed.wait()


def inspected(container: FakeContainer) -> dict[str, Any]:
    """A container as the Engine's inspect answers."""
    request = container.request
    return {
        "Id": container.id,
        "Name": f"/{container.name}",
        "Image": request.get("Image", ""),
        "Config": {key: value for key, value in request.items() if key != "HostConfig"},
        "HostConfig": {"Runtime": "runc", **(request.get("HostConfig") or {})},
        "State": {
            "Status": container.status,
            "Running": container.running,
            "OOMKilled": container.oom,
            "Pid": container.pid,
            "ExitCode": container.exit_code,
            "StartedAt": _rfc3339(container.started_at),
            "FinishedAt": _rfc3339(container.finished_at),
        },
    }


def _rfc3339(seconds: float | None) -> str:
    return NEVER if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def _seen(container: FakeContainer) -> Seen:
    host, variables = container.request.get("HostConfig") or {}, container.environment
    return Seen(
        id=container.id,
        name=container.name,
        state=container.status,
        labels=container.labels,
        runtime=str(host.get("Runtime") or "runc"),
        visible=variables.get("NVIDIA_VISIBLE_DEVICES"),
        cuda_image="CUDA_VERSION" in variables,
        image=str(container.request.get("Image") or ""),
    )


__all__ = ["EngineError", "FakeContainer", "FakeEngine", "FakeRunner", "inspected"]
