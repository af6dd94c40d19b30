"""What runs containers: the fake in memory is held to what the real Engine does, in all that the service relies on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gpujobs import init
from gpujobs.adapters import streams
from gpujobs.adapters.logfile import LogWriter
from gpujobs.adapters.runner import DockerRunner
from gpujobs.core.ports import Conflict, EngineAway, EngineError, EngineEvent, Gone, Log, LogEnd, Runner
from gpujobs.testing.engine import FakeContainer, FakeEngine, FakeRunner
from gpujobs.testing.logs import MemoryLog
from tests.lab import engine as lab_engine
from tests.lab import images

T = TypeVar("T")

BUSYBOX = "gpujobs-lab/busybox:1"
SECONDS = 60.0
# docker-py leaves the sockets of connections that failed to the collector of garbage: see the fixture's end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

names = (f"gjcontract-{os.getpid()}-{number}" for number in itertools.count())


class SystemClock:
    def now(self) -> float:
        return time.time()


@dataclass
class Subject:
    """One runner, and what a test needs beside the port."""

    runner: Runner
    away: Runner
    log: Callable[[Path], Log]
    ends: Callable[[str], Awaitable[None]]
    made: list[str] = field(default_factory=list)

    async def create(self, name: str, script: str = "sleep 600", **request: Any) -> str:
        made = await self.runner.create(name, body(script, **request))
        self.made.append(made)
        return made


def body(script: str, **changes: Any) -> dict[str, Any]:
    return {
        "Image": BUSYBOX, "Entrypoint": ["sh", "-c"], "Cmd": [script], "User": "5001:5001",
        "Env": ["NVIDIA_VISIBLE_DEVICES=void", "A=b=c"], "Labels": {"gpujobs.server": "contract", "gpujobs.nonce": "n"},
        "HostConfig": {"Runtime": "runc", "NetworkMode": "none", "LogConfig": dict(streams.LOG_CONFIG)}, **changes,
    }  # fmt: skip


def run(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(limited())


@pytest.fixture(scope="module")
def engine() -> lab_engine.Engine:
    found = lab_engine.ensure()
    images.ensure(found, BUSYBOX)
    return found


def real(engine: lab_engine.Engine, tmp_path: Path) -> Subject:
    runner = DockerRunner(engine.host, init.binary(), tmp_path)

    async def ends(container: str) -> None:
        await asyncio.to_thread(engine.docker, "wait", container)

    return Subject(runner, DockerRunner(f"unix://{tmp_path}/nobody", init.binary(), tmp_path), LogWriter, ends)


def fake(_: lab_engine.Engine, __: Path) -> Subject:
    known = FakeEngine(SystemClock())
    gone = FakeEngine(SystemClock())
    gone.go_away()
    runner = FakeRunner(known)

    def behave(container: FakeContainer) -> None:
        """The few scripts of these tests, in memory."""
        script = container.request["Cmd"][0]
        if script.startswith("exit "):
            loop.call_soon(known.end, container, int(script.removeprefix("exit ")))
        elif script.startswith("echo "):
            loop.call_soon(known.write, container, script.split(";")[0].removeprefix("echo ").encode() + b"\n")
            loop.call_soon(known.end, container, 0)

    def on_start(container: FakeContainer) -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        behave(container)

    loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]
    known.on_start = on_start
    known.on_signal = lambda _, __: None  # a shell without a handler is PID 1: SIGTERM does nothing to it
    known.greeting = b""

    async def ends(container: str) -> None:
        while known.find(container).running:
            await known.changed.wait()

    return Subject(runner, FakeRunner(gone), memory, ends)


def memory(_: Path) -> MemoryLog:
    return MemoryLog()


@pytest.fixture(params=[fake, real], ids=["fake", "real"])
def subject(request: pytest.FixtureRequest, engine: lab_engine.Engine, tmp_path: Path) -> Iterator[Subject]:
    found: Subject = request.param(engine, tmp_path)
    yield found

    async def remove() -> None:
        for container in found.made:
            await found.runner.remove(container)

    run(remove())
    for runner in (found.runner, found.away):
        if isinstance(runner, DockerRunner):
            runner.close()
    for thread in threading.enumerate():
        if thread.name.startswith("engine"):
            thread.join()
    gc.collect()


def test_a_name_is_given_once_and_is_free_again_when_its_container_is_removed(subject: Subject) -> None:
    async def check() -> None:
        name = next(names)
        first = await subject.create(name)
        with pytest.raises(Conflict, match=name):
            await subject.create(name)
        assert (await subject.runner.inspect(name))["Id"] == first
        await subject.runner.remove(first)
        with pytest.raises(Gone):
            await subject.runner.inspect(name)
        assert await subject.create(name) != first

    run(check())


def test_inspect_tells_what_was_asked_for_and_what_became_of_it(subject: Subject) -> None:
    async def check() -> None:
        name = next(names)
        container = await subject.create(name, "exit 7")
        found = await subject.runner.inspect(container)
        assert (found["Id"], found["Name"]) == (container, f"/{name}")
        asked = body("exit 7")
        for key in ("Cmd", "Entrypoint", "User"):
            assert found["Config"][key] == asked[key]
        assert set(asked["Env"]) <= set(found["Config"]["Env"])
        assert found["Config"]["Labels"].items() >= asked["Labels"].items()
        assert found["HostConfig"]["Runtime"] == "runc"
        state = found["State"]
        assert (state["Status"], state["Running"], state["Pid"], state["OOMKilled"]) == ("created", False, 0, False)
        assert state["StartedAt"].startswith("0001")
        await subject.runner.start(container)
        await subject.ends(container)
        state = (await subject.runner.inspect(container))["State"]
        assert (state["Status"], state["Running"], state["ExitCode"], state["Pid"]) == ("exited", False, 7, 0)
        assert not state["FinishedAt"].startswith("0001")

    run(check())


def test_a_container_runs_from_its_start_until_it_is_killed(subject: Subject) -> None:
    async def check() -> None:
        container = await subject.create(next(names))
        await subject.runner.start(container)
        state = (await subject.runner.inspect(container))["State"]
        assert (state["Status"], state["Running"]) == ("running", True)
        assert state["Pid"] > 0
        await subject.runner.start(container)  # it runs already: no error
        await subject.runner.kill(container, "SIGTERM")
        assert (await subject.runner.inspect(container))["State"]["Running"], "PID 1 has no default actions"
        await subject.runner.kill(container, "SIGKILL")
        await subject.ends(container)
        state = (await subject.runner.inspect(container))["State"]
        assert (state["Running"], state["ExitCode"]) == (False, 137)

    run(check())


def test_what_is_not_there_is_gone_and_to_end_or_remove_it_is_no_error(subject: Subject) -> None:
    async def check() -> None:
        container = await subject.create(next(names))
        await subject.runner.kill(container, "SIGKILL")  # created only
        await subject.runner.start(container)
        await subject.runner.remove(container)  # also while it runs
        for call in (subject.runner.start, subject.runner.inspect, subject.runner.seen):
            with pytest.raises(Gone):
                await call(container)
        await subject.runner.kill(container, "SIGKILL")
        await subject.runner.remove(container)
        assert container not in {seen.id for seen in await subject.runner.containers()}

    run(check())


def test_the_ended_are_not_killed_and_keep_their_exit_code(subject: Subject) -> None:
    async def check() -> None:
        container = await subject.create(next(names), "exit 3")
        await subject.runner.start(container)
        await subject.ends(container)
        await subject.runner.kill(container, "SIGKILL")
        await subject.runner.kill(container, "SIGTERM")
        assert (await subject.runner.inspect(container))["State"]["ExitCode"] == 3

    run(check())


def test_what_is_seen_of_a_container_is_enough_to_tell_whose_it_is_and_what_it_holds(subject: Subject) -> None:
    async def check() -> None:
        name = next(names)
        container = await subject.create(name, Env=["NVIDIA_VISIBLE_DEVICES=GPU-1,GPU-2", "CUDA_VERSION=12.4"])
        seen = await subject.runner.seen(container)
        assert (seen.id, seen.name, seen.state, seen.runtime) == (container, name, "created", "runc")
        assert (seen.visible, seen.cuda_image) == ("GPU-1,GPU-2", True)
        assert (seen.labels["gpujobs.server"], seen.labels["gpujobs.nonce"]) == ("contract", "n")
        assert seen in await subject.runner.containers()
        await subject.runner.start(container)
        assert (await subject.runner.seen(name)).state == "running"

    run(check())


def test_events_come_in_order_and_those_of_before_are_not_told(subject: Subject) -> None:
    async def check() -> None:
        before = await subject.create(next(names))
        await asyncio.sleep(0.01)  # the times of events are the Engine's
        since = time.time()
        container = await subject.create(next(names), "exit 5")
        await subject.runner.start(container)
        await subject.ends(container)
        await subject.runner.remove(container)
        told = [event async for event in _until(subject.runner.events(since), container, "destroy")]
        assert before not in {event.id for event in told}
        mine = [event for event in told if event.id == container and event.action in SERVED]
        assert [event.action for event in mine] == ["create", "start", "die", "destroy"]
        assert {event.type for event in mine} == {"container"}
        assert [event.time_ns for event in mine] == sorted(event.time_ns for event in mine)
        assert mine[2].attributes["exitCode"] == "5"
        assert mine[0].attributes["gpujobs.nonce"] == "n"

    run(check())


SERVED = ("create", "start", "die", "destroy")


async def _until(events: AsyncIterator[Any], container: str, action: str) -> AsyncIterator[EngineEvent]:
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        async for event in events:
            assert isinstance(event, EngineEvent)
            yield event
            if (event.id, event.action) == (container, action):
                return


def test_following_stores_what_was_written_and_ends_with_the_container(subject: Subject, tmp_path: Path) -> None:
    async def check() -> None:
        container = await subject.create(next(names), "echo hello; sleep 0.2")
        log = subject.log(tmp_path / "log")
        following = asyncio.create_task(subject.runner.follow(container, log))
        await asyncio.sleep(0.3)
        assert not following.done(), "one that was never started has not ended"
        await subject.runner.start(container)
        assert await following == LogEnd(gone=False, gaps=0)
        batches = [batch async for batch in log.reader().batches()]
        assert b"".join(record.payload for batch in batches for record in batch) == b"hello\n"
        await subject.runner.remove(container)
        assert (await subject.runner.follow(container, log)).gone
        log.close()

    run(check())


def test_a_runner_without_an_engine_says_so_at_each_call(subject: Subject) -> None:
    async def check() -> None:
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: subject.away.create("x", body("true")),
            lambda: subject.away.start("x"),
            lambda: subject.away.inspect("x"),
            lambda: subject.away.seen("x"),
            subject.away.containers,
            lambda: subject.away.kill("x", "SIGKILL"),
            lambda: subject.away.remove("x"),
        ]
        for call in calls:
            with pytest.raises(EngineAway):
                await call()
        assert not issubclass(EngineAway, EngineError), "an Engine that is away has not refused"

    run(check())
