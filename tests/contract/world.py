"""The whole service on a virtual clock: the real loop and ledger, an Engine in memory, and all that can befall them.

Nothing here knows how the service works. What is checked is what the Engine and the ledger's file show.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from gpujobs.core.accounts import Account
from gpujobs.core.decide import Host
from gpujobs.core.errors import GpujobsError, Unavailable
from gpujobs.core.inventory import Health, Process
from gpujobs.core.job import JobId, Owner
from gpujobs.core.ports import EngineAway, EngineError, Paths
from gpujobs.core.secrets import Secret
from gpujobs.core.spec import GpuRequest, JobSpec, Volume
from gpujobs.service import api, attempts, loop, tidy
from gpujobs.service.access import Asker, Directory
from gpujobs.service.loop import Service
from gpujobs.settings import Settings
from gpujobs.testing import FakeGpus, dgx_a100
from gpujobs.testing.engine import FakeContainer, FakeEngine, FakeRunner
from gpujobs.testing.logs import MemoryLog, MemoryLogs
from gpujobs.testing.parts import FakeImages
from gpujobs.testing.time import VirtualClock, VirtualLoop
from tests.contract.mortal import Accounts, Complaints, Died, MortalMounts, WatchedStore

Key = tuple[int, int]

GIB = 2**30
ENDED = ("succeeded", "failed", "cancelled")
HOST = Host(cpus=8.0, memory=256 * GIB)
KNOWN = 5.0
"""Virtual seconds in which what happens in an Engine that answers quickly must be known."""
KEEP_ENDED = 600.0
SERVER = "5eed0001"


@dataclass
class Submission:
    """What a client sent, and what it was told."""

    specs: int
    answered: list[Key] | None = None
    refused: str = ""


@dataclass
class Stranger:
    """A container made by hand."""

    container: FakeContainer
    since: float


@dataclass
class Fate:
    """What happened to a job that may decide how it ends."""

    excuses: set[str] = field(default_factory=set)
    code: int | None = None


class World:
    """One server, killed and started as often as wanted, and its surroundings."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.loop = VirtualLoop()
        self.clock = VirtualClock(self.loop)
        self.directory = Path(tempfile.mkdtemp(prefix="gjmachine-", dir="/dev/shm"))
        inventory = dgx_a100()
        self.uuids = tuple(gpu.uuid for gpu in inventory.gpus)
        self.machine = inventory
        self.gpus = FakeGpus(inventory)
        self.engine = FakeEngine(self.clock, {gpu.uuid: gpu.index for gpu in inventory.gpus})
        self.engine.latency = self._latency
        self.lag: Callable[[], float] = lambda: self.random.choice((0.0, 0.0, 0.001, 0.02))
        self.engine.death = lambda: self.random.choice((0.0, 0.01, 0.3, 2.0))
        self.engine.on_signal = self._on_signal
        self.engine.on_start = self._on_start
        self.engine.on_create = self._on_create
        self.engine.on_release = self._on_release
        self.people = [
            Owner(uid=5001 + n, gid=5001 + n, groups=(5001 + n,), name=f"gjlab{n + 1}", home=f"/home/gjlab{n + 1}")
            for n in range(5)
        ]
        self.accounts = Accounts({owner.uid: Account(owner=owner) for owner in self.people})
        self.logs: dict[tuple[JobId, int], MemoryLog] = {}
        self.pins: set[str] = set()
        self.there, self.registry = {"local"}, {"remote"}
        self.held: set[str] = set()
        self.settings = Settings(keep_ended=KEEP_ENDED)
        self.submissions: list[Submission] = []
        self.fates: dict[Key, Fate] = {}
        self.strangers: list[Stranger] = []
        self.troubled = self.loop.time()
        self.wrong: list[str] = []
        self.slow = False
        self.accounts_troubled = False  # ever
        self.stuck_pins = False
        self.full = False
        self.gpu_troubles: dict[str, tuple[float, str]] = {}
        self.armed: tuple[str, int] | None = None
        self.deaths = 0
        self.service: Service | None = None
        self.open = False  # clients can connect
        self.serving: asyncio.Task[None] | None = None
        self._parts: list[Any] = []
        self._handler = Complaints(self.wrong)
        logging.getLogger("gpujobs").addHandler(self._handler)
        logging.getLogger("gpujobs").propagate = False
        self.loop.set_exception_handler(self._complain)
        for module in (loop, attempts, tidy):
            module.fault = self._fault  # type: ignore[attr-defined]
        self.paths = self._make_paths()
        self.boot()
        file = f"file:{self.paths.state}/state.sqlite?mode=ro"
        self.ledger = sqlite3.connect(file, uri=True, isolation_level=None)
        self.ledger_rows = sqlite3.connect(file, uri=True, isolation_level=None)
        self.ledger_rows.row_factory = sqlite3.Row

    def _make_paths(self) -> Paths:
        state = self.directory / "state"
        for name in ("attempts", "logs", "pins", "nodes"):
            (state / name).mkdir(parents=True)
        init = state / "init"
        init.write_bytes(b"init")
        return Paths(state=state, attempts=state / "attempts", logs=state / "logs", pins=state / "pins",
                     nodes=state / "nodes", init=init)  # fmt: skip

    # -- behaviour of the surroundings -------------------------------------------------------------------------

    def _latency(self) -> float:
        return self.random.choice((0.0, 0.001, 0.01, 0.05) if not self.slow else (0.1, 0.5, 2.0))

    @staticmethod
    def _on_signal(container: FakeContainer, signal: str) -> int | None:
        del signal
        words = container.request.get("Cmd") or [""]
        return {"obeys": 143, "handles": 7}.get(words[-1])

    def _attempt(self, container: FakeContainer, columns: str) -> tuple[Any, ...] | None:
        """What the ledger's file says of the attempt that a container was made for."""
        found: tuple[Any, ...] | None = self.ledger.execute(
            f"SELECT {columns} FROM attempts WHERE name = ? AND nonce = ?",
            (container.name, container.labels.get("gpujobs.nonce")),
        ).fetchone()
        return found

    def _on_create(self, container: FakeContainer) -> None:
        """Decisions are on disk before the Engine is touched."""
        if container.made_by != "server":
            return
        recorded = self._attempt(container, "allocation")
        if recorded is None:
            self.wrong.append(f"{container.name} is made before the decision is on disk")
        elif container.gpus != frozenset(json.loads(recorded[0]).get("gpus") or ()):
            self.wrong.append(f"{container.name} is made for {set(container.gpus)}, decided was {recorded[0]}")

    def _on_release(self, container: FakeContainer) -> None:
        """So is that a program runs, before it does: else it could be let run again."""
        if container.made_by == "server" and self._attempt(container, "1") is not None:
            (number, index) = key_of(container)
            state, started = self.ledger.execute(
                "SELECT state, started_at FROM jobs WHERE (number, idx) = (?, ?)", (number, index)
            ).fetchone()
            if started is None:
                self.wrong.append(f"the program of {container.name} runs, and the ledger says {state}")

    def _on_start(self, container: FakeContainer) -> None:
        if container.made_by != "server":
            return
        if self._attempt(container, "container") != (container.id,):
            self.wrong.append(f"{container.name} starts before the ledger has it")
        just_now = {s.container.id for s in self.strangers if self.loop.time() < max(s.since, self.troubled) + KNOWN}
        for other in self.engine.containers.values():
            ours = other is not container and other.made_by == "server" and other.id not in just_now
            if ours and other.running and other.gpus & container.gpus:
                self.wrong.append(f"{container.name} starts on GPUs on which {other.name} runs")

    def _complain(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), Died):
            self.wrong.append(f"the loop: {context}")

    def _fault(self, name: str) -> None:
        if self.armed is None or self.armed[0] != name:
            return
        if self.armed[1] > 1:
            self.armed = (name, self.armed[1] - 1)
            return
        self.armed = None
        self._cut()
        self.loop.stop()
        raise Died

    # -- the server --------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start a server on the same state."""
        runner = FakeRunner(self.engine)
        images = FakeImages(self.engine, self.there, self.registry)
        mounts = MortalMounts(self.pins)
        mounts.held, mounts.stuck = self.held, self.stuck_pins
        store = WatchedStore(self.paths.state / "state.sqlite", self.loop, lambda: self.lag())  # noqa: PLW0108 - it changes
        store.full = self.full
        self._parts = [runner, images, mounts, store]
        self.dead = False
        self.service = Service(
            server_id=SERVER, settings=self.settings, paths=self.paths, store=store, engine=runner, images=images,
            logs=MemoryLogs(self.logs), gpus=self.gpus, mounts=mounts, directory=Directory(None, self.accounts),
            clock=self.clock, host=HOST, timezone="", still_alone=self._alone,
        )  # fmt: skip
        self.serving = self.loop.create_task(self._serve(self.service))

    async def _alone(self) -> bool:
        return True

    async def _serve(self, service: Service) -> None:
        await service.start()
        self.open = True
        await service.run()

    def _cut(self) -> None:
        if self.dead:
            return
        self.dead, self.open = True, False
        runner, images, mounts, store = self._parts
        runner.cut()
        images.cut()
        mounts.dead = True
        store.cut()

    def kill(self, *, lose: bool = False) -> None:
        """The server's process is gone at once; with ``lose`` what it has just handed to the ledger is not written."""
        self._cut()
        store: WatchedStore = self._parts[3]
        (self.loop.drop if lose else self.loop.hand_over)()
        self.deaths += 1
        self._end_tasks()
        store.close()
        self.service, self.serving = None, None
        self.armed = None
        self.troubled = self.loop.time()

    def _end_tasks(self) -> None:
        for _ in range(20):
            tasks = asyncio.all_tasks(self.loop)
            if not tasks:
                return
            for task in tasks:
                task.cancel()
            self.loop.run_turns(3)
        raise AssertionError(f"tasks that cannot be cancelled: {asyncio.all_tasks(self.loop)}")

    def stop(self) -> None:
        """End the server in order, as SIGTERM does."""
        assert self.service is not None
        self.open = False
        ending = self.loop.create_task(self.service.shut_down())
        self._run(lambda: self.loop.run_for(5.0))
        if self.service is None:
            return
        if not ending.done():
            self.wrong.append("the server does not end")
        self.kill()

    def _run(self, go: Callable[[], None]) -> None:
        """Let things happen, and see to a server that died or ended of itself."""
        go()
        self.engine.poll()
        if self.dead and self.service is not None:
            self.kill()
        if self.serving is not None and self.serving.done() and not self.dead:
            error = self.serving.exception()
            if isinstance(error, EngineAway | Unavailable):  # exit 4 in words; the service manager starts it again
                self.kill()
            elif error is not None:
                self.wrong.append(f"the server did not start: {error!r}")

    def run_for(self, seconds: float) -> None:
        if self.service is None:
            self.boot()
        self._run(lambda: self.loop.run_for(seconds))

    def run_turns(self, count: int) -> None:
        if self.service is None:
            self.boot()
        self._run(lambda: self.loop.run_turns(count))

    def _ask(self, work: Any, done: Callable[[asyncio.Task[Any]], None]) -> None:
        """A client's request: what comes of it is seen if the server lives to answer."""

        async def request() -> Any:
            return await work

        task = self.loop.create_task(request())

        def answered(task: asyncio.Task[Any]) -> None:
            if task.cancelled() or isinstance(task.exception(), Died):
                return
            if (error := task.exception()) is not None and not isinstance(error, GpujobsError):
                self.wrong.append(f"a request failed: {error!r}")
            done(task)

        task.add_done_callback(answered)

    # -- what people do ----------------------------------------------------------------------------------------

    def submit(
        self, *, user: int, gpus: int, elements: int, image: str, signal: str, time_limit: float | None, volume: bool,
        secret: bool = False,
    ) -> None:  # fmt: skip
        if not self.open:
            return
        assert self.service is not None
        owner = self.people[user]
        spec = JobSpec(
            name="job", image=image, command=("train", signal), gpus=GpuRequest(count=gpus, max_count=gpus),
            cpus=None if gpus else 1.0, mem_limit=None if gpus else GIB, time_limit=time_limit, stop_grace_period=5.0,
            volumes=(Volume(target="/data", source="/nfs/data"),) if volume else (),
            secrets=(Secret(name="key", target="key", environment=f"KEY{len(self.submissions)}"),) if secret else (),
        )  # fmt: skip
        values = [{"key": b"hunter2 of %s" % spec.secrets[0].environment.encode()}] if secret else []
        submission = Submission(elements)
        self.submissions.append(submission)
        specs = [(None if elements == 1 else index, spec) for index in range(elements)]

        def done(task: asyncio.Task[Any]) -> None:
            if (error := task.exception()) is not None:
                submission.refused = str(error)
                return
            submission.answered = [job.id.key for job in task.result()[0]]

        self._ask(self.service.submit(owner, [("f.yaml", "", specs)], values), done)
        self.run_turns(self.random.randrange(1, 12))

    def cancel(self, pick: int) -> None:
        rows = [row for row in self.jobs() if row[2] not in ENDED]
        if not rows or not self.open:
            return
        assert self.service is not None
        number, index = rows[pick % len(rows)][:2]
        self.fate((number, index)).excuses.add("cancelled")
        self._ask(self.service.stop(JobId.of_key(number, index), "cancelled", "cancelled"), lambda task: None)
        self.run_turns(2)

    def look(self, user: int) -> None:
        """Somebody asks for the queue: whatever happens meanwhile, every job in it has a reason."""
        if not self.open:
            return
        assert self.service is not None
        asker = Asker(self.people[user], admin=False)
        request = Request({"type": "http", "query_string": b""})

        async def listed() -> list[dict[str, Any]]:
            response = await api.listing(self.service, asker, request)
            found: list[dict[str, Any]] = json.loads(b"".join([part async for part in response.body_iterator]))["jobs"]
            return found

        def done(task: asyncio.Task[Any]) -> None:
            if task.exception() is None:
                self.wrong += [told for row in task.result() if (told := wrong_of_waiting(row))]

        self._ask(listed(), done)
        self.run_turns(self.random.randrange(1, 4))

    def running(self) -> list[FakeContainer]:
        """Our containers whose programs run."""
        return [c for c in self.engine.containers.values() if c.made_by == "server" and c.running and c.released]

    def finish(self, pick: int, code: int) -> None:
        if not (running := self.running()):
            return
        container = running[pick % len(running)]
        self.fate(key_of(container)).code = code
        self.engine.write(container, f"ends with {code}\n".encode())
        self.engine.end(container, code)

    def fate(self, key: Key) -> Fate:
        return self.fates.setdefault(key, Fate())

    # -- what befalls them -------------------------------------------------------------------------------------

    def fail_call(self, method: str, kind: str) -> None:
        error = EngineAway("timed out") if kind.startswith("away") else EngineError(f"{method}: server error")
        self.engine.fail(method, error, after=kind.endswith("after"))
        if method in ("create", "start") and kind.startswith("refused"):
            for key in self.starting():
                self.fate(key).excuses.add("refused")
            self.refused_next = True

    refused_next = False

    def starting(self) -> list[Key]:
        return [(row[0], row[1]) for row in self.jobs() if row[2] in ("starting", "pulling")]

    def engine_goes(self) -> None:
        self.engine.go_away()
        self.troubled = self.loop.time()

    def engine_returns(self, *, live_restore: bool) -> None:
        if self.engine.away and not live_restore:
            for container in self.engine.containers.values():
                if container.made_by == "server" and container.running:
                    self.fate(key_of(container)).excuses.add("engine")
        self.engine.come_back(live_restore=live_restore)
        self.troubled = self.loop.time()

    def engine_lags(self, *, hangs: bool, slow: bool) -> None:
        self.engine.hangs, self.slow = hangs, slow
        self.troubled = self.loop.time()

    def remove_container(self, pick: int) -> None:
        ours = [c for c in self.engine.containers.values() if c.made_by == "server"]
        if ours and not self.engine.away:
            container = ours[pick % len(ours)]
            self.fate(key_of(container)).excuses.add("removed")
            self.engine.remove(container)

    def start_ended(self, pick: int) -> None:
        """Somebody starts a container of ours by hand."""
        ours = [c for c in self.engine.containers.values() if c.made_by == "server" and c.status == "exited"]
        if ours and not self.engine.away:
            container = ours[pick % len(ours)]
            container_key = key_of(container)
            if self.row(container_key)[2] in ENDED:
                hook, self.engine.on_start = self.engine.on_start, lambda _: None
                self.engine.start(container)
                self.engine.on_start = hook
                self.strangers = [known for known in self.strangers if known.container is not container]
                self.strangers.append(Stranger(container, self.loop.time()))  # perhaps not for the first time

    def make_stranger(self, pick: int, forged: str, *, start: bool) -> None:
        if self.engine.away:
            return
        gpus = self.uuids[pick % len(self.uuids)]
        labels, name = {}, f"by-hand-{len(self.engine.history)}"
        rows = self.jobs()
        if forged == "labels":
            labels = {"gpujobs.server": SERVER, "gpujobs.job": "1", "gpujobs.attempt": "1", "gpujobs.nonce": "0" * 32}
        elif forged in ("name", "name and labels"):
            number = max((row[0] for row in rows), default=0) + 1 + pick % 3
            name = f"gpujobs-{SERVER}-{number}-1"
            self.fate((number, -1)).excuses.add("forged name")
            if forged != "name":
                labels = {"gpujobs.server": SERVER, "gpujobs.job": str(number), "gpujobs.attempt": "1",
                          "gpujobs.nonce": "0" * 32}  # fmt: skip
        elif forged in ("in its place", "copied"):
            ours = [c for c in self.engine.containers.values() if c.made_by == "server"]
            if not ours:
                return
            copied = ours[pick % len(ours)]
            labels = copied.labels
            if forged == "in its place":
                name, labels["gpujobs.nonce"] = copied.name, "0" * 32
                self.remove_container(pick)
        elif forged == "other server":
            labels = {"gpujobs.server": "0ther001", "gpujobs.job": "1"}
        if any(c.name == name for c in self.engine.containers.values()):
            return
        request = {"Image": "x", "Env": [f"NVIDIA_VISIBLE_DEVICES={gpus}"], "Labels": labels,
                   "HostConfig": {"Runtime": "nvidia"}}  # fmt: skip
        container = self.engine.create(name, request)
        if start:
            self.engine.start(container)
        self.strangers.append(Stranger(container, self.loop.time()))

    def end_stranger(self, pick: int, *, remove: bool) -> None:
        if self.strangers:
            container = self.strangers[pick % len(self.strangers)].container
            if container.made_by == "hand" and remove:
                self.engine.remove(container)
            else:
                self.engine.end(container, 0)
            self.strangers = [s for s in self.strangers if not s.container.gone and s.container.status != "exited"]

    def change_gpu(self, pick: int, how: str) -> None:
        uuid = self.uuids[pick % len(self.uuids)]
        if how in ("no driver", "driver"):
            self.driver(there=how == "driver")
        elif self.gpus.inventory.problem:
            return
        elif how == "lost":
            self.gpus.lose(uuid)
            self.gpu_troubles[uuid] = (self.loop.time(), how)
        elif how == "back":
            self.gpus.change(uuid, health=Health.OK)
            self.gpu_troubles.pop(uuid, None)
        elif how == "occupied":
            self.gpus.occupy(uuid, Process(pid=99, name="python", user="eve", memory_bytes=1 << 30))
            self.gpu_troubles[uuid] = (self.loop.time(), how)
        elif how == "free":
            self.gpus.occupy(uuid)
            self.gpu_troubles.pop(uuid, None)

    def driver(self, *, there: bool) -> None:
        if not there:
            self.gpus.unload_driver()
        elif self.gpus.inventory.problem:
            self.gpus.inventory = self.machine
            self.gpu_troubles.clear()

    def hold_mount(self, *, held: bool) -> None:
        (self.held.add if held else self.held.discard)("/nfs/data")

    def stick_pins(self, *, stuck: bool) -> None:
        self.stuck_pins = stuck
        self._parts[2].stuck = stuck

    def fill_disk(self, *, full: bool) -> None:
        self.troubled = self.loop.time() if self.full else self.troubled
        self.full = full
        self._parts[3].full = full

    def change_accounts(self, user: int, how: str) -> None:
        self.accounts_troubled = True
        if how in ("expires", "returns"):
            self.accounts.expire(self.people[user].uid, expired=how == "expires")
        else:
            self.accounts.silent = how == "silent"

    def recover(self) -> None:
        """The server and what it depends on are well again; who else is on the machine stays."""
        self.armed = None
        self.slow = False
        self.engine.heal()
        self.engine.hangs = False
        self.engine_returns(live_restore=True)
        self.driver(there=True)
        self.hold_mount(held=False)
        self.stick_pins(stuck=False)
        self.fill_disk(full=False)
        self.accounts.silent = False
        for person in self.people:
            self.accounts.expire(person.uid, expired=False)

    def heal(self) -> None:
        """Everything is well again, and nobody else is on the machine."""
        self.recover()
        self.gpus.inventory = self.machine
        self.gpu_troubles.clear()
        for container in list(self.engine.containers.values()):
            if container.made_by == "hand":
                self.engine.remove(container)
        for stranger in self.strangers:
            self.engine.end(stranger.container, 0)
        self.strangers.clear()

    # -- what is seen ------------------------------------------------------------------------------------------

    def jobs(self) -> list[tuple[Any, ...]]:
        """(number, index, state, attempt, exit code, reason, message) of every job in the ledger's file."""
        return self.ledger.execute(
            "SELECT number, idx, state, attempt, exit_code, reason, message FROM jobs ORDER BY number, idx"
        ).fetchall()

    def row(self, key: Key) -> tuple[Any, ...]:
        return next(row for row in self.jobs() if (row[0], row[1]) == key)

    def tasks(self) -> list[str]:
        """The names of all that is at work."""
        return [task.get_name() for task in asyncio.all_tasks(self.loop)]

    def close(self) -> None:
        """Take everything down."""
        logging.getLogger("gpujobs").removeHandler(self._handler)
        logging.getLogger("gpujobs").propagate = True
        if self.service is not None:
            self.kill()
        self.engine.close()
        self.ledger.close()
        self.ledger_rows.close()
        self.loop.close()
        for module in (loop, attempts, tidy):
            module.fault = FAULT  # type: ignore[attr-defined]
        shutil.rmtree(self.directory)


FAULT = loop.fault


def wrong_of_waiting(row: Mapping[str, Any]) -> str:
    """What is wrong with a row of ``ps``; empty for nothing: a job that waits has a reason, and a sentence."""
    if row["state"] != "queued" or (row["reason"] and row["message"]):
        return ""
    return f"{row['id']} waits for no reason: {row['reason']}, {row['message']}"


def key_of(container: FakeContainer) -> Key:
    """The job of one of our containers."""
    return JobId.parse(container.labels["gpujobs.job"]).key
