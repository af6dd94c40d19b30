"""Logs and events of a real Engine: byte for byte, whatever is killed on the way."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gpujobs.adapters.logfile import LogReader, LogWriter
from gpujobs.adapters.streams import LOG_CONFIG, engine_events, follow_log, parse_host
from gpujobs.core import errors
from gpujobs.core.ports import Disconnected, EngineEvent, LogEnd, Reconnected
from gpujobs.logwire import GAP, STDERR, STDOUT, LogRecord
from tests.lab import engine as lab
from tests.lab import images

LINE = "0123456789" * 8
FULL_SPEED = 100_000_000


@pytest.fixture(scope="module")
def engine() -> lab.Engine:
    engine = lab.ensure()
    images.ensure(engine, images.BUSYBOX)
    return engine


class Containers:
    """Starts containers with our log configuration and removes them."""

    def __init__(self, engine: lab.Engine) -> None:
        self.engine = engine
        self.names: list[str] = []

    def start(self, script: str, *options: str, **config: str) -> str:
        name = f"gpujobs-test-streams-{uuid.uuid4().hex[:8]}"
        settings = {**dict(LOG_CONFIG["Config"]), **config}  # type: ignore[call-overload]
        logs = [word for key, value in settings.items() for word in ("--log-opt", f"{key}={value}")]
        self.names.append(name)
        self.engine.docker(
            "run", "-d", "--name", name, "--network", "none", "--log-driver", str(LOG_CONFIG["Type"]), *logs, *options,
            images.BUSYBOX, "sh", "-c", script,
        )  # fmt: skip
        return name

    def go(self, name: str) -> None:
        self.engine.docker("exec", name, "touch", "/tmp/go")


@pytest.fixture
def containers(engine: lab.Engine) -> Iterator[Containers]:
    started = Containers(engine)
    yield started
    for name in started.names:
        engine.docker("rm", "-f", "-v", name)


WAIT = "while [ ! -e /tmp/go ]; do sleep 0.05; done; rm /tmp/go; "


async def stored(path: Path) -> list[LogRecord]:
    return [record for batch in [b async for b in LogReader(path).batches()] for record in batch]


async def digest(path: Path, stream: int = STDOUT) -> tuple[str, int, list[bytes]]:
    total, size, gaps = hashlib.sha256(), 0, []
    async for batch in LogReader(path).batches():
        for record in batch:
            if record.stream == stream:
                total.update(record.payload)
                size += len(record.payload)
            elif record.stream == GAP:
                gaps.append(record.payload)
    return total.hexdigest(), size, gaps


def expected_digest(line: str, size: int) -> str:
    chunk = (line + "\n").encode() * 10_000
    total = hashlib.sha256()
    for start in range(0, size, len(chunk)):
        total.update(chunk[: size - start])
    return total.hexdigest()


async def until(condition: Callable[[], object], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for is outside this process
            await asyncio.sleep(0.02)


def both(records: list[LogRecord]) -> tuple[bytes, bytes]:
    return tuple(b"".join(r.payload for r in records if r.stream == s) for s in (STDOUT, STDERR))  # type: ignore[return-value]


FOLLOW = """
import asyncio, sys
from pathlib import Path
from gpujobs.adapters.logfile import LogWriter
from gpujobs.adapters.streams import follow_log
asyncio.run(follow_log(sys.argv[1], sys.argv[2], LogWriter(Path(sys.argv[3]))))
"""


def test_100_megabytes_at_full_speed_with_the_follower_killed_midway_are_complete(
    containers: Containers, tmp_path: Path
) -> None:
    name = containers.start(f"yes {LINE} | head -c {FULL_SPEED}")
    log_path = tmp_path / "log"
    first = subprocess.Popen([sys.executable, "-c", FOLLOW, containers.engine.host, name, str(log_path)])

    def size() -> int:
        return sum(file.stat().st_size for file in log_path.glob("*.seg"))

    async def scenario() -> None:
        try:
            await until(lambda: size() > FULL_SPEED // 4 or first.poll() is not None)
            assert first.poll() is None, "the follower ended before it could be killed"
        finally:
            first.kill()
            first.wait()
        log = LogWriter(log_path)
        assert 0 < log.payload < FULL_SPEED
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert await follow_log(containers.engine.host, name, log) == LogEnd(gone=False, gaps=0)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80 << 10, "memory must be bounded"
        await log.finish()
        assert await digest(log_path) == (expected_digest(LINE, FULL_SPEED), FULL_SPEED, [])

    asyncio.run(scenario())


LONG = {
    "a long line without newline at the end": b"start\n" + b"w" * 100_000,
    "a long line with newline at the end": b"w" * 1_000_000 + b"\n",
    "exactly one buffer without newline": b"y" * 16384,
    "exactly one buffer with newline": b"y" * 16384 + b"\n",
    "one byte less than a buffer": b"z" * 16383 + b"\n" + b"z" * 16383,
    "a short end without newline": b"y" * 50_000 + b"\nend",
}


def test_long_lines_binary_junk_and_any_ending_are_stored_byte_for_byte(containers: Containers, tmp_path: Path) -> None:
    chance = random.Random(3)
    junk = b"\n".join([
        b"x" * (1 << 20), b"\0\r", b"\n\r\0\xff\xfe", chance.randbytes(300_000), b"\0" * 500_000, b"y" * 16384, b"",
        b"z" * 16383, b"w" * 32768 + chance.randbytes(100_000), b"no newline here",
    ])  # fmt: skip
    data = tmp_path / "data"
    data.mkdir()
    cases = [junk, *LONG.values()]
    names = []
    for n, out in enumerate(cases):
        (data / str(n)).write_bytes(out)
    for n in range(len(cases)):
        script = f"cat /data/{n} >&2 & cat /data/{(n + 1) % len(cases)}; wait"
        names.append(containers.start(script, "-v", f"{data}:/data:ro"))

    async def one(n: int) -> None:
        log = LogWriter(tmp_path / str(n))
        assert await follow_log(containers.engine.host, names[n], log) == LogEnd(gone=False, gaps=0)
        log.close()
        again = LogWriter(tmp_path / str(n))
        size = again.payload
        assert await follow_log(containers.engine.host, names[n], again) == LogEnd(gone=False, gaps=0)
        await again.finish()
        assert again.payload == size, "following a complete log again adds nothing"
        out, err = both(await stored(tmp_path / str(n)))
        assert err == cases[n]
        assert out == cases[(n + 1) % len(cases)]

    async def scenario() -> None:
        await asyncio.gather(*map(one, range(len(cases))))

    asyncio.run(scenario())


def test_crossing_streams_and_an_unfinished_line_survive_many_interruptions(
    containers: Containers, tmp_path: Path
) -> None:
    script = (
        "i=0; while [ $i -lt 60 ]; do head -c 5000 /dev/zero; echo warning $i >&2; echo again $i >&2; "
        "sleep 0.03; i=$((i+1)); done"
    )
    name = containers.start(script)

    async def scenario() -> None:
        end, tries = None, 0
        while end is None:
            log = LogWriter(tmp_path / "log")
            with suppress(TimeoutError):
                end = await asyncio.wait_for(follow_log(containers.engine.host, name, log), 0.1 + tries / 10)
            log.close()
            tries += 1
        assert tries > 3
        assert end == LogEnd(gone=False, gaps=0)
        out, err = both(await stored(tmp_path / "log"))
        assert out == b"\0" * 300_000
        assert err == b"".join(b"warning %d\nagain %d\n" % (i, i) for i in range(60))

    asyncio.run(scenario())


def test_what_the_engine_has_dropped_before_it_was_read_is_marked_as_a_gap(
    containers: Containers, tmp_path: Path
) -> None:
    script = f"seq 1 2000; {WAIT} seq 2001 400000; {WAIT} echo end"
    name = containers.start(script, **{"max-size": "1m", "max-file": "2"})

    async def scenario() -> None:
        log = LogWriter(tmp_path / "log")
        first = asyncio.create_task(follow_log(containers.engine.host, name, log))
        begun = "".join(f"{n}\n" for n in range(1, 2001)).encode()
        await until(lambda: log.payload == len(begun))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        containers.go(name)
        last = await asyncio.to_thread(_last_line, containers, name, "400000")
        assert last
        second = asyncio.create_task(follow_log(containers.engine.host, name, log))
        containers.go(name)
        assert await asyncio.wait_for(second, 60) == LogEnd(gone=False, gaps=1)
        await log.finish()
        records = await stored(tmp_path / "log")
        (at,) = (n for n, record in enumerate(records) if record.stream == GAP)
        assert records[at].payload.startswith(b"gap: output between 20")
        assert both(records[:at]) == (begun, b"")
        rest = both(records[at + 1 :])[0].split()
        numbers = [int(word) for word in rest[:-1]]
        assert rest[-1] == b"end"
        assert numbers == list(range(numbers[0], 400_001))
        assert numbers[0] > 2001

    asyncio.run(scenario())


def _last_line(containers: Containers, name: str, line: str) -> bool:
    for _ in range(600):
        if containers.engine.docker("logs", "--tail", "1", name).strip() == line:
            return True
        time.sleep(0.05)
    return False


def test_an_engine_restarted_midway_ends_the_container_and_its_log_is_complete(tmp_path: Path) -> None:
    daemon = lab.Engine.private(tmp_path)
    try:
        engine = daemon.engine
        images.ensure(engine, images.BUSYBOX)
        containers = Containers(engine)
        name = containers.start(
            "trap 'echo stopped; exit 5' TERM; i=0; while :; do echo $i; i=$((i+1)); usleep 2000; done"
        )

        async def scenario() -> None:
            log = LogWriter(tmp_path / "log")
            task = asyncio.create_task(follow_log(engine.host, name, log))
            events: list[object] = []

            async def watch() -> None:
                stream = engine_events(engine.host, time.time(), {"type": ["container"]})
                async for event in stream:
                    events.extend([event])

            watcher = asyncio.create_task(watch())
            await until(lambda: log.payload > 500)
            await asyncio.to_thread(daemon.stop)
            await until(lambda: any(isinstance(event, Disconnected) for event in events))
            assert not task.done(), "an Engine that is away is waited for"
            await asyncio.to_thread(daemon.start)
            assert await asyncio.wait_for(task, 60) == LogEnd(gone=False, gaps=0)
            await until(lambda: Reconnected() in events)
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            kinds = [type(e) for e in events if not isinstance(e, EngineEvent)]
            assert kinds == [Disconnected, Reconnected]
            await log.finish()
            lines = both(await stored(tmp_path / "log"))[0].split()
            assert lines[-1] == b"stopped"
            assert [int(line) for line in lines[:-1]] == list(range(len(lines) - 1))
            whole = await asyncio.to_thread(engine.docker, "logs", name)
            assert whole.encode().split() == lines

        asyncio.run(scenario())
    finally:
        daemon.destroy()


def test_a_container_that_is_removed_ends_its_log_as_gone(containers: Containers, tmp_path: Path) -> None:
    name = containers.start("echo hello; sleep 600")

    async def scenario() -> None:
        log = LogWriter(tmp_path / "log")
        task = asyncio.create_task(follow_log(containers.engine.host, name, log))
        await until(lambda: log.payload == 6)
        await asyncio.to_thread(containers.engine.docker, "rm", "-f", name)
        assert (await asyncio.wait_for(task, 30)).gone
        log.close()

    asyncio.run(scenario())


def test_events_of_a_container_arrive_once_and_in_order(containers: Containers) -> None:
    async def scenario() -> None:
        name = await asyncio.to_thread(containers.start, "exit 3", "--label", "gpujobs-test=events")
        identity = (await asyncio.to_thread(containers.engine.docker, "inspect", "-f", "{{.Id}}", name)).strip()
        events = []
        filters = {"type": ["container"], "label": ["gpujobs-test=events"]}
        async with asyncio.timeout(30):
            async for event in engine_events(containers.engine.host, time.time() - 60, filters):
                assert isinstance(event, EngineEvent)
                if event.id == identity:
                    events.append(event)
                if event.id == identity and event.action == "die":
                    break
        assert [event.action for event in events] == ["create", "start", "die"]
        assert events[-1].attributes["exitCode"] == "3"
        assert events == sorted(events, key=lambda event: event.time_ns)

    asyncio.run(scenario())


def test_an_engine_that_is_not_there_is_told_once_and_awaited_without_haste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        got: list[object] = []

        async def watch() -> None:
            async for event in engine_events(f"unix://{tmp_path}/none.sock", 0, {}):
                got.extend([event])

        task = asyncio.create_task(watch())
        await until(lambda: got)
        used = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - used < 0.2
        assert len(got) == 1
        assert isinstance(got[0], Disconnected)
        assert "No such file" in got[0].reason
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("host", ["ssh://me@there", "tcp://there", "npipe:////./pipe/x", "unix://", "tcp://a:b", ""])
def test_hosts_of_other_kinds_are_refused(host: str) -> None:
    with pytest.raises(errors.InvalidInput, match="DOCKER_HOST"):
        parse_host(host)


def test_hosts_that_are_supported_are_taken_apart() -> None:
    assert parse_host("unix:///run/my docker.sock") == "/run/my docker.sock"
    assert parse_host("tcp://127.0.0.1:2375") == ("127.0.0.1", 2375)


class Forgetful:
    """An Engine's API that gives logs as 20.10 does when it is slow: ``follow`` leaves messages out."""

    def __init__(self, messages: list[LogRecord], at_first: int, hole: range, *, broken: bytes = b"") -> None:
        self.messages, self.at_first, self.hole, self.broken = messages, at_first, hole, broken
        self.follows = 0
        self.live = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        writer.write(b"HTTP/1.0 200 OK\r\nServer: test\r\n\r\n")
        if target.endswith("/json"):
            writer.write(b'{"State": {"Status": "%s"}}' % (b"exited" if self.live.is_set() else b"running"))
        else:
            tail = target.partition("tail=")[2].partition("&")[0]
            known = self.messages if self.live.is_set() else self.messages[: self.at_first]
            for record in known if tail == "all" else known[-int(tail) :]:
                writer.write(self.frame(record))
            if "follow=1" in target and not self.live.is_set():
                self.follows += 1
                for n, record in enumerate(self.messages):
                    if n >= self.at_first and n not in self.hole:
                        writer.write(self.frame(record))
                self.live.set()
            elif self.broken:
                writer.write(b"\3\0\0\0" + len(self.broken).to_bytes(4, "big") + self.broken)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    @staticmethod
    def frame(record: LogRecord) -> bytes:
        second, ns = divmod(record.time_ns, 10**9)
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)) + f".{ns:09d}Z "
        body = text.encode() + record.payload
        return bytes([record.stream, 0, 0, 0]) + len(body).to_bytes(4, "big") + body


async def follow_forgetful(engine: Forgetful, path: Path, then: Callable[[LogWriter], Awaitable[None]]) -> LogEnd:
    server = await asyncio.start_unix_server(engine.serve, path / "sock")
    log = LogWriter(path / "log")
    watch = asyncio.ensure_future(then(log))
    try:
        end = await asyncio.wait_for(follow_log(f"unix://{path}/sock", "c", log), 30)
        await log.finish()
        await asyncio.wait_for(watch, 5)
    finally:
        server.close()
        await server.wait_closed()
    return end


def test_what_follow_skipped_is_found_and_put_in_its_place(tmp_path: Path) -> None:
    messages = [LogRecord(10**18 + n, STDOUT, b"line %d\n" % n) for n in range(20_000)]
    live: list[LogRecord] = []

    async def watch(log: LogWriter) -> None:
        async for batch in log.reader().batches(follow=True):
            live.extend(batch)

    async def scenario() -> None:
        engine = Forgetful(messages, 5000, range(9000, 12_000))
        assert await follow_forgetful(engine, tmp_path, watch) == LogEnd(gone=False, gaps=0)
        assert engine.follows == 1
        assert await stored(tmp_path / "log") == messages
        (note,) = [record for record in live if record.stream == GAP]
        missed = sum(len(record.payload) for record in messages[9000:12_000])
        assert note.payload.startswith(f"gap: {missed:,} bytes of output came late".encode())
        assert [r for r in live if r.stream != GAP] == messages[:9000] + messages[12_000:]

    asyncio.run(scenario())


def test_a_log_that_the_engine_cannot_read_to_its_end_is_marked(tmp_path: Path) -> None:
    messages = [LogRecord(10**18 + n, STDOUT, b"line %d\n" % n) for n in range(100)]

    async def nothing(log: LogWriter) -> None:
        await log.changed()

    async def scenario() -> None:
        engine = Forgetful(messages, 50, range(0), broken=b"Error grabbing logs: unexpected EOF\n")
        assert (await follow_forgetful(engine, tmp_path, nothing)).gaps == 1
        *records, gap = await stored(tmp_path / "log")
        assert records == messages
        assert gap.payload == b"gap: the Engine could not read the rest of its log: Error grabbing logs: unexpected EOF"

    asyncio.run(scenario())


def test_the_loop_stays_free_while_a_log_is_read_at_full_speed(containers: Containers, tmp_path: Path) -> None:
    """Measured in CPU time of this thread between two turns of the loop, which other processes cannot lengthen."""
    name = containers.start(f"yes {LINE} | head -c 10000000")
    worst = 0.0

    async def beat() -> None:
        nonlocal worst
        while True:
            begun = time.thread_time()
            await asyncio.sleep(0)
            worst = max(worst, time.thread_time() - begun)

    async def scenario() -> None:
        log = LogWriter(tmp_path / "log")
        task = asyncio.create_task(beat())
        await follow_log(containers.engine.host, name, log)
        task.cancel()
        log.close()

    gc.collect()
    gc.freeze()  # as the server does once it has loaded: a collection of all that pytest holds is not ours
    try:
        asyncio.run(scenario())
    finally:
        gc.unfreeze()
    assert worst < 0.02
