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
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from gpujobs.adapters.store import Ledger, Store
from gpujobs.core.accounts import Account
from gpujobs.core.decide import Host
from gpujobs.core.errors import GpujobsError, Unavailable
from gpujobs.core.inventory import Health, Process
from gpujobs.core.job import JobId, Owner
from gpujobs.core.ports import EngineAway, EngineError, Paths
from gpujobs.core.secrets import Secret
from gpujobs.core.spec import GpuRequest, JobSpec, Volume
from gpujobs.service import attempts, loop, tidy
from gpujobs.service import rows as rows_of_api
from gpujobs.service.access import Asker, Directory
from gpujobs.service.loop import Service
from gpujobs.settings import Settings
from gpujobs.testing import FakeGpus, dgx_a100
from gpujobs.testing.engine import FakeContainer, FakeEngine, FakeRunner
from gpujobs.testing.logs import MemoryLog, MemoryLogs
from gpujobs.testing.parts import AnyAccounts, FakeImages, FakeMounts
from gpujobs.testing.time import VirtualClock, VirtualLoop

T = TypeVar("T")
Key = tuple[int, int]

GIB = 2**30
ENDED = ("succeeded", "failed", "cancelled")
HOST = Host(cpus=8.0, memory=256 * GIB)
SLOW = 90.0
"""Virtual seconds in which whatever is due must have been done; the longest hold of a mount is 30."""
KNOWN = 5.0
"""Virtual seconds in which what happens in an Engine that answers quickly must be known."""
KEEP_ENDED = 600.0
SERVER = "5eed0001"


class Died(BaseException):
    """The server was killed at a fault point."""


class WatchedStore(Store):
    """The real store, on a loop that waits for its writer, and which dies with its server."""

    def __init__(self, path: Path, virtual: VirtualLoop) -> None:
        super().__init__(path)
        self._virtual = virtual
        self._dead = False
        self.full = False

    async def change(self, action: Callable[[Ledger], T]) -> T:
        await self._alive()
        if self.full:
            await asyncio.sleep(0)
            raise Unavailable("nothing was written: the disk is full")
        future: Future[T] = Future()
        answer, told = asyncio.wrap_future(future), Future[None]()
        future.add_done_callback(lambda _: told.set_result(None))  # after the one that wakes the loop
        self._virtual.await_thread(lambda: self._inbox.put((action, future)), told)
        return await answer

    async def read(self, query: Callable[[Ledger], T]) -> T:
        await self._alive()
        return await super().read(query)

    async def _alive(self) -> None:
        if self._dead:
            await asyncio.get_running_loop().create_future()

    def cut(self) -> None:
        """Its process is dead; what has been handed over is written or not."""
        self._dead = True


class MortalMounts(FakeMounts):
    """Mounts whose caller can die."""

    def __init__(self, pins: set[str]) -> None:
        super().__init__(pins)
        self.dead = False

    def _check(self, path: str) -> None:
        if self.dead:
            raise asyncio.CancelledError
        super()._check(path)

    async def unpin(self, name: str) -> None:
        if not self.dead:
            await super().unpin(name)


class Accounts(AnyAccounts):
    """Accounts that expire, in a database that may not answer."""

    silent = False

    def by_uid(self, uid: int) -> Account:
        self._check()
        return super().by_uid(uid)

    def group_names(self, owner: Owner) -> list[tuple[int, str]]:
        self._check()
        return super().group_names(owner)

    def _check(self) -> None:
        if self.silent:
            raise Unavailable("the account database did not answer")

    def expire(self, uid: int, *, expired: bool) -> None:
        self.known[uid] = replace(self.known[uid], expired=expired)


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
        self.engine.death = lambda: self.random.choice((0.0, 0.01, 0.3, 2.0))
        self.engine.on_signal = self._on_signal
        self.engine.on_start = self._on_start
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
        self.ended: dict[Key, tuple[Any, ...]] = {}
        self.decided: set[tuple[int, int, int]] = set()
        self.armed: tuple[str, int] | None = None
        self.deaths = 0
        self.service: Service | None = None
        self.open = False  # clients can connect
        self._idle_since: float | None = None
        self._serving: asyncio.Task[None] | None = None
        self._parts: list[Any] = []
        self._handler = _Complaints(self.wrong)
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

    def _on_start(self, container: FakeContainer) -> None:
        if container.made_by != "server":
            return
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
        store = WatchedStore(self.paths.state / "state.sqlite", self.loop)
        store.full = self.full
        self._parts = [runner, images, mounts, store]
        self.dead = False
        self.service = Service(
            server_id=SERVER, settings=self.settings, paths=self.paths, store=store, engine=runner, images=images,
            logs=MemoryLogs(self.logs), gpus=self.gpus, mounts=mounts, directory=Directory(None, self.accounts),
            clock=self.clock, host=HOST, timezone="", still_alone=self._alone,
        )  # fmt: skip
        self._serving = self.loop.create_task(self._serve(self.service))

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
        self.service, self._serving = None, None
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
        if self._serving is not None and self._serving.done() and not self.dead:
            error = self._serving.exception()
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
            self._refused_next = True

    _refused_next = False

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
                self.strangers.append(Stranger(container, self.loop.time()))

    def make_stranger(self, pick: int, forged: str, *, start: bool) -> None:
        if self.engine.away:
            return
        gpus = self.uuids[pick % len(self.uuids)]
        labels, name = {}, f"by-hand-{len(self.engine.history)}"
        rows = self.jobs()
        if forged == "labels":
            labels = {"gpujobs.server": SERVER, "gpujobs.job": "1", "gpujobs.attempt": "1", "gpujobs.nonce": "0" * 32}
        elif forged == "name":
            number = max((row[0] for row in rows), default=0) + 1 + pick % 3
            name = f"gpujobs-{SERVER}-{number}-1"
            self.fate((number, -1)).excuses.add("forged name")
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
        elif how == "back":
            self.gpus.change(uuid, health=Health.OK)
        elif how == "occupied":
            self.gpus.occupy(uuid, Process(pid=99, name="python", user="eve", memory_bytes=1 << 30))
        elif how == "free":
            self.gpus.occupy(uuid)

    def driver(self, *, there: bool) -> None:
        if not there:
            self.gpus.unload_driver()
        elif self.gpus.inventory.problem:
            self.gpus.inventory = self.machine

    def hold_mount(self, *, held: bool) -> None:
        (self.held.add if held else self.held.discard)("/nfs/data")

    def stick_pins(self, *, stuck: bool) -> None:
        self.stuck_pins = stuck
        self._parts[2].stuck = stuck

    def fill_disk(self, *, full: bool) -> None:
        self.full = full
        self._parts[3].full = full

    def change_accounts(self, user: int, how: str) -> None:
        self.accounts_troubled = True
        if how in ("expires", "returns"):
            self.accounts.expire(self.people[user].uid, expired=how == "expires")
        else:
            self.accounts.silent = how == "silent"

    def heal(self) -> None:
        """Everything is well again, and nobody else is on the machine."""
        self.armed = None
        self.slow = False
        self.engine.heal()
        self.engine.hangs = False
        self.engine_returns(live_restore=True)
        self.gpus.inventory = self.machine
        self.hold_mount(held=False)
        self.stick_pins(stuck=False)
        self.fill_disk(full=False)
        self.accounts.silent = False
        for person in self.people:
            self.accounts.expire(person.uid, expired=False)
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

    def check(self) -> None:
        """Everything that must hold at any moment."""
        assert not self.wrong, "\n".join(self.wrong)
        rows = self.jobs()
        known = {(row[0], row[1]) for row in rows}
        for submission in self.submissions:
            assert submission.answered is None or known.issuperset(submission.answered), "an accepted job is lost"
        self._check_ended(rows)
        self._check_gpus()
        self._check_programs()
        self._check_secrets()
        if self.open and self.service is not None:
            self._check_reasons(rows)
        else:
            self._idle_since = None
        if self._serving is not None and self._serving.done() and not self._serving.cancelled():
            assert self._serving.exception() is None, repr(self._serving.exception())

    def _check_ended(self, rows: list[tuple[Any, ...]]) -> None:
        for number, index, state, attempt, code, reason, _ in rows:
            if state in ENDED:
                now = (state, attempt, code, reason)
                assert self.ended.setdefault((number, index), now) == now, f"{number}_{index} ended twice"
                assert attempt <= 1, "a job was started again"
            else:
                assert (number, index) not in self.ended, f"{number}_{index} had ended and is {state}"

    def _check_gpus(self) -> None:
        """No GPU is given twice by the ledger, nor one that somebody else was seen to have."""
        held: dict[str, Any] = {}
        waiting = self._waiting_for_gpus()
        for number, index, attempt, allocation, decided in self.ledger.execute(
            "SELECT number, idx, a.attempt, allocation, decided_at FROM attempts a JOIN jobs j USING (number, idx) "
            "WHERE j.active = 1 AND j.state <> 'queued' AND a.attempt = j.attempt"
        ):
            gpus = json.loads(allocation).get("gpus") or ()
            if gpus and (number, index, attempt) not in self.decided:
                passed = [key for key in waiting if key < (number, index)]
                assert not passed, f"{number}_{index} has passed {passed}"
            for uuid in gpus:
                assert uuid not in held, f"{uuid} is given to {number}_{index} and to {held[uuid]}"
                held[uuid] = f"{number}_{index}"
            if (number, index, attempt) in self.decided:
                continue
            self.decided.add((number, index, attempt))
            at = decided - self.clock.offset
            for stranger in self.strangers:
                prompt = not (self.engine.away or self.engine.hangs or self.slow)
                known = prompt and at > max(stranger.since, self.troubled) + KNOWN
                taken = stranger.container.gpus & set(gpus)
                if known and taken and not stranger.container.gone and stranger.container.status != "exited":
                    raise AssertionError(f"{number}_{index} was given {taken}, which {stranger.container.name} has")

    def _waiting_for_gpus(self) -> list[Key]:
        """The accepted jobs with GPUs that wait, and whose accounts are well."""
        if self.accounts_troubled:
            return []
        accepted = {key for submission in self.submissions for key in submission.answered or ()}
        found = self.ledger.execute(
            "SELECT number, idx FROM jobs WHERE state = 'queued' AND json_extract(spec, '$.gpus.count') > 0"
        ).fetchall()
        return [key for key in found if key in accepted]

    def _check_programs(self) -> None:
        ran: dict[Key, int] = {}
        for container in self.engine.history:
            if container.made_by == "server":
                key = key_of(container)
                ran[key] = ran.get(key, 0) + container.runs
                assert ran[key] <= 1, f"the program of {key} ran twice"

    def _check_secrets(self) -> None:
        """A program that ran was handed its own submission's secrets, and no request to the Engine had any."""
        for container in self.engine.history:
            if container.made_by == "server" and container.runs:
                (text,) = self.ledger.execute(
                    "SELECT spec FROM jobs WHERE number = ? AND idx = ?", key_of(container)
                ).fetchone()
                named = [secret["environment"] for secret in json.loads(text).get("secrets", ())]
                value = b"hunter2 of %s" % named[0].encode() if named else b""
                assert container.secrets == (b"key\0\0%d\0%s\0" % (len(value), value) if named else None)
                assert "hunter2 of" not in json.dumps(container.request)

    def _check_reasons(self, rows: list[tuple[Any, ...]]) -> None:
        waiting = [JobId.of_key(row[0], row[1]) for row in rows if row[2] == "queued"]
        if not waiting:
            self._idle_since = None
            return
        assert self.service is not None
        explainer = self.service.explainer()
        next_one = False
        for job_id in (waiting[0], waiting[-1]):
            job = Ledger(self.ledger_rows).job(job_id)
            assert job is not None
            if job_id.key not in self.service.view().queue.shapes and not self.service.holds.reason(job):
                continue  # its submission is not answered yet
            told = rows_of_api.row(self.service, job, explainer, Asker(job.owner, admin=False))
            assert told["reason"], f"{job_id} waits for no reason"
            assert told["message"], f"{job_id} waits without a sentence"
            next_one = next_one or told["message"] == "it starts next"
        if not next_one or self.full:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = self.loop.time()
        else:
            assert self.loop.time() < self._idle_since + SLOW, f"{waiting[0]} could start, and nothing happens"

    # -- the end -----------------------------------------------------------------------------------------------

    def finish_all(self) -> None:
        """When all is well, everything ends as it should."""
        self.heal()
        for _ in range(400):
            self.run_for(2.0)
            self.check()
            while self.running():
                self.finish(0, self.random.choice((0, 0, 3, 255)))
            if self.open and all(row[2] in ENDED for row in self.jobs()):
                break
        self.run_for(40.0)
        self.check()
        left = [row for row in self.jobs() if row[2] not in ENDED]
        assert not left, f"these never end: {left}, {[self._note(row) for row in left]}"
        alive = [c.name for c in self.engine.containers.values() if c.made_by == "server" and c.running]
        assert not alive, f"these run although their jobs have ended: {alive}"
        for row in self.jobs():
            self._check_outcome(row)
        self._check_turns()
        self._check_logs()
        self._check_whole_machine()
        self.run_for(KEEP_ENDED + 3700.0)
        self.run_for(3700.0)
        self.check()
        assert not self.engine.containers, f"left behind: {[c.name for c in self.engine.containers.values()]}"
        assert not self.pins, f"pins left behind: {self.pins}"
        assert not list(self.paths.attempts.iterdir()), "control directories are left behind"
        assert not list((self.paths.state / "secrets").iterdir()), "secrets of jobs that have ended are left behind"

    def _tasks(self) -> list[str]:
        return [task.get_name() for task in asyncio.all_tasks(self.loop)]

    def _note(self, row: tuple[Any, ...]) -> str:
        return "" if self.service is None else self.service.note_of(JobId.of_key(row[0], row[1]))

    def _check_outcome(self, row: tuple[Any, ...]) -> None:
        number, index, state, _, code, reason, message = row
        fate = self.fate((number, index))
        containers = [c for c in self.engine.history if c.made_by == "server" and key_of(c) == (number, index)]
        ran = next((c for c in containers if c.runs), None)
        told = f"{row}, {fate}"
        if code is not None:
            assert ran is not None or message.startswith("its program never ran") or reason != "", told
            assert any(code in c.exits[:1] for c in containers), told
        if state == "succeeded":
            assert ran is not None, told
            assert (code, reason) == (0, ""), told
            assert ran.exits[0] == 0, told
        if not fate.excuses and not self._excused(row):
            assert ran is not None, f"it never ran: {told}"
            assert code == ran.exits[0] == fate.code, told
            assert state == ("succeeded" if code == 0 else "failed"), told
            assert reason == ("" if code == 0 else "exit"), told

    def _check_turns(self) -> None:
        """Of those decided at once, programs begin in the order of the queue, where nothing of their own holds them."""
        if self.accounts_troubled:
            return
        begun = self.ledger.execute(
            "SELECT decided_at, number, idx, a.started_at FROM attempts a JOIN jobs j USING (number, idx) "
            "WHERE a.started_at IS NOT NULL AND json_extract(j.spec, '$.gpus.count') > 0 "
            "AND json_extract(j.spec, '$.image') = 'local' AND json_array_length(j.spec, '$.volumes') IS NOT 1 "
            "ORDER BY decided_at, number, idx"
        ).fetchall()
        for first, second in pairwise(begun):
            if first[0] == second[0]:
                assert first[3] <= second[3], f"{second} began before {first}"

    def _excused(self, row: tuple[Any, ...]) -> bool:
        reason, message = row[5], row[6]
        if reason == "time-limit" or (reason == "image" and "no image missing" in message):
            return True
        if "the Docker Engine was stopped or restarted" in message and self.engine.outages:
            return row[4] in (137, 143, 255)  # how Engines end containers: by the code alone it cannot be told apart
        words = ("server error", "the Engine did not make its container", "its container did not start")
        return (self._refused_next and any(word in message for word in words)) or reason == "gpu-lost"

    def _check_logs(self) -> None:
        """What programs wrote is stored, where the container was there to be read."""
        for container in self.engine.history:
            key = key_of(container) if container.made_by == "server" else None
            if key is None or not container.runs or "removed" in self.fate(key).excuses:
                continue
            log = self.logs.get((JobId.of_key(*key), 1))
            assert log is not None, f"{container.name} has no log"
            written = [record for record in container.output if record in log.records]
            assert written == container.output, f"{container.name}: {log.records} of {container.output}"
        still = self.ledger.execute("SELECT number, idx FROM attempts WHERE log_closed = 0").fetchall()
        assert not still, f"logs that are never closed: {still}, {self._tasks()}"

    def _check_whole_machine(self) -> None:
        """A job that needs every GPU runs: nothing is held by anybody any more."""
        self.submit(user=0, gpus=len(self.uuids), elements=1, image="local", signal="obeys", time_limit=None,
                    volume=False)  # fmt: skip
        self.run_for(SLOW)
        running = self.running()
        assert len(running) == 1, f"{self.jobs()[-1]}, {self.service and self.service.view().avoid}"
        assert running[0].gpus == frozenset(self.uuids)
        self.finish(0, 0)
        self.run_for(10.0)
        self.check()
        assert self.jobs()[-1][2] == "succeeded", self.jobs()[-1]

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


def key_of(container: FakeContainer) -> Key:
    """The job of one of our containers."""
    return JobId.parse(container.labels["gpujobs.job"]).key


class _Complaints(logging.Handler):
    """Takes note of tasks that died."""

    def __init__(self, wrong: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._wrong = wrong

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and not isinstance(record.exc_info[1], Died):
            self._wrong.append(logging.Formatter().format(record))
