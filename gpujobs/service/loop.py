"""The one loop that owns the state: events come in, ``decide`` says what to do, it is committed, then done.

    wake (a submission, an end, a GPU's change, a deadline)
      → look at the GPUs, if a job waits for some
      → decide                              pure
      → commit                              the ledger, before anything is touched
      → act                                 a task for each attempt

Nothing here polls the queue. All of it runs in one asyncio thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpujobs.core import job as jobs
from gpujobs.core.container import Image
from gpujobs.core.cuda import needs_newer_driver
from gpujobs.core.decide import (
    Decision,
    Host,
    Policy,
    Start,
    Stop,
    View,
    check_possible,
    decide,
    next_deadline,
    shape_of,
)
from gpujobs.core.diagnose import command_hint, diagnose
from gpujobs.core.endings import Ending
from gpujobs.core.errors import GpujobsError, Refused, Unavailable, UnknownId
from gpujobs.core.explain import Explainer
from gpujobs.core.inventory import Inventory
from gpujobs.core.job import Allocation, Job, JobId, Owner
from gpujobs.core.planning import as_row, plan
from gpujobs.core.ports import (
    BuildLimits,
    Clock,
    EngineAway,
    EngineError,
    Gone,
    GpuSource,
    Images,
    Ledger,
    Logs,
    MountSource,
    Paths,
    Runner,
    Store,
)
from gpujobs.core.pulls import Layer, Progress
from gpujobs.core.queue import QueueState
from gpujobs.core.reconcile import foreign
from gpujobs.core.rules import check as check_rules
from gpujobs.core.rules import discreet as without_names
from gpujobs.core.spec import JobSpec
from gpujobs.service.access import Directory
from gpujobs.service.attempts import Attempt, follow_to_end, name_of, starting_state
from gpujobs.service.broadcast import Broadcast
from gpujobs.service.contexts import WAIT_SECONDS, Contexts
from gpujobs.service.enginewatch import AGAIN_SECONDS, EngineWatch
from gpujobs.service.faults import fault
from gpujobs.service.gpuwatch import GpuWatch
from gpujobs.service.holds import Holds
from gpujobs.service.layers import Layers
from gpujobs.service.quotas import Quotas
from gpujobs.service.secretstore import SecretStore
from gpujobs.service.tidy import Tidy
from gpujobs.settings import Settings, after_reload

logger = logging.getLogger("gpujobs")

RECHECK_SECONDS = 2.0
"""While GPUs are kept from a waiting job by their state or by processes of others: no event tells when that ends."""

WRITE_AGAIN_SECONDS = 2.0
"""Between tries to write an end when the ledger's disk is full."""

DIAGNOSED_LINES = 200
DIAGNOSED_BYTES = 64 * 1024


class Service:
    """The server's state and everything that changes it."""

    def __init__(
        self, *, server_id: str, settings: Settings, paths: Paths, store: Store, engine: Runner, images: Images,
        logs: Logs, gpus: GpuSource, mounts: MountSource, directory: Directory, clock: Clock, host: Host,
        timezone: str, still_alone: Callable[[], Awaitable[bool]],
    ) -> None:  # fmt: skip
        self.id = server_id
        self.settings = settings
        self.paths = paths
        self.store = store
        self.engine = engine
        self.mounts = mounts
        self.directory = directory
        self.clock = clock
        self.timezone = timezone
        self.images = images
        self.logs = logs
        self.still_alone = still_alone
        self.contexts = Contexts(store, paths.state / "contexts", clock)
        self.secrets = SecretStore(store, paths.state / "secrets")
        self.holds = Holds(directory, self.spawn, self._hold_changed)
        self.quotas = Quotas(clock)
        self.ceilings = engine.ceilings()
        self.active: dict[JobId, Job] = {}
        self.attempts: dict[JobId, Attempt] = {}
        self.by_container: dict[str, JobId] = {}
        self.gpus = GpuWatch(gpus, self.locate)
        self.engine_watch = EngineWatch(self)
        self.tidy = Tidy(self)
        self.layers = Layers(self)
        self.watchers = Broadcast()
        self.stopped = asyncio.Event()
        self.notes: list[str] = [] if mounts.read_only_itself else [mounts.note]
        self._host = host
        self._policy = Policy(memory_reserve=settings.memory_reserve)
        self._queue = QueueState()
        self._notes: dict[JobId, str] = {}
        self._progress: dict[JobId, tuple[Layer, ...]] = {}
        self._writing = asyncio.Lock()
        self._woken = asyncio.Event()
        self._turned = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_started: Attempt | None = None
        self._settings_changed()

    # -- start-up and the loop ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read the ledger, compare it with the Engine, take up what runs. Nothing new starts before that."""
        await self.gpus.look(force=True)
        await self.contexts.start()
        await self.secrets.start()
        for job in await self.store.read(lambda ledger: ledger.active()):
            self._apply(job)
        # Those of attempts that had ended: the reconciliation ends others, which finish their logs themselves.
        unfinished = await self.store.read(lambda ledger: ledger.open_logs())
        since = self.clock.now()  # what happens from now on is told by events: nothing between the two is missed
        try:
            await self.engine_watch.reconcile()
        except EngineError as error:
            raise Unavailable(f"the Docker Engine does not tell what containers it has: {error}") from error
        await self.tidy.drop_pins()
        for row in unfinished:
            self.spawn(self._finish_log(row), "log of an ended attempt")
        self.spawn(self.engine_watch.run(since), "engine events")
        self.spawn(self.tidy.run(), "tidy")
        self.spawn(self.layers.run(), "layers")
        self.spawn(self._give_up_contexts(), "build contexts")
        for number in self.contexts.numbers():
            self.spawn(self._drop_contexts(number), f"build contexts of {number}")
        for number in self.secrets.numbers():
            self.spawn(self._drop_secrets(number), f"secrets of {number}")
        self.wake()

    async def run(self) -> None:
        """Decide whenever something has happened, until :meth:`shut_down`."""
        while not self.stopped.is_set():
            await self._wait()
            self._woken.clear()
            if self.stopped.is_set():
                return
            try:
                await self._step()
            except Unavailable as error:
                logger.error("nothing was decided: %s", error)
                await self._rest(WRITE_AGAIN_SECONDS)
                self.wake()
            self._turned.set()

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.stopped.wait()
        except TimeoutError:
            return

    async def turn(self) -> None:
        """Wait until the loop has gone round once more: who gets an answer knows that it makes progress."""
        self._turned.clear()
        self.wake()
        await self._turned.wait()

    async def _wait(self) -> None:
        deadlines = [next_deadline(self._queue)]
        if self._gpu_jobs_wait() and (self.gpus.ailing or self.gpus.occupied(self._queue.active)):
            deadlines.append(self.clock.now() + RECHECK_SECONDS)
        due = min((deadline for deadline in deadlines if deadline is not None), default=None)
        try:
            async with asyncio.timeout(None if due is None else max(0.0, due - self.clock.now())):
                await self._woken.wait()
        except TimeoutError:
            return

    async def shut_down(self) -> None:
        """Let go of everything; containers go on."""
        self.stopped.set()
        self.wake()
        while self._tasks:  # one that ends may have begun another; nothing writes to a log once it is closed
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        self.logs.close()
        await self.gpus.close()

    def reload(self, wanted: Settings) -> tuple[str, ...]:
        """Take other settings; returns the names of those whose change has to wait for a restart."""
        self.settings, waiting = after_reload(self.settings, wanted)
        self._settings_changed()
        self.holds.look_again()
        self.tidy.settings_changed()
        self.wake()
        return waiting

    def _settings_changed(self) -> None:
        self.directory.apply(self.settings)
        self.quotas.apply(self.settings)

    def wake(self) -> None:
        """Something has happened that decisions may depend on."""
        self._woken.set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Do something beside the loop, until the server ends."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s ended: %r", task.get_name(), error, exc_info=error)

    # -- deciding ----------------------------------------------------------------------------------------------

    @property
    def inventory(self) -> Inventory:
        """The GPUs as they were last seen."""
        return self.gpus.inventory

    def near(self, allocation: Allocation) -> tuple[int, ...]:
        """The CPUs near an allocation's GPUs."""
        return self.gpus.near(allocation, int(self._host.cpus))

    def locate(self, container: str) -> str | None:
        """The job that a container belongs to."""
        job = self.by_container.get(container)
        return None if job is None else str(job)

    def view(self) -> View:
        """All that a decision may look at, now."""
        avoid = self.gpus.occupied(self._queue.active)
        ours = frozenset(a.container for a in self.attempts.values() if a.container is not None)
        avoid.update(foreign(self.id, self.engine_watch.strange.values(), ours, self.inventory, self.settings.runtime))
        return View(queue=self._queue, inventory=self.inventory, host=self._host, policy=self._policy, avoid=avoid)

    def _gpu_jobs_wait(self) -> bool:
        return any(shape.gpus.count for shape in self._queue.lanes)

    async def _step(self) -> None:
        if self._gpu_jobs_wait():
            await self.gpus.look(force=True)
        async with self._writing:
            decisions = decide(self.clock.now(), self.view())
            if not decisions:
                return
            fault("decision-made")
            ids = [d.job for d in decisions if isinstance(d, Start)]
            waiting = await self.store.read(lambda ledger: {i: ledger.job(i) for i in ids})
            if self._were_not_waiting(waiting):
                self.wake()
                return
            decisions = self._startable(decisions, waiting)
            begun: list[tuple[Job, dict[str, Any]]] = []
            stops = [d for d in decisions if isinstance(d, Stop)]
            now = self.clock.now()

            def commit(ledger: Ledger) -> None:
                begun.clear()
                for decision in decisions:
                    if isinstance(decision, Start):
                        job = waiting[decision.job]
                        assert job is not None
                        begun.append(self._begin(ledger, job, decision, now))

            await self.store.change(commit)
            fault("decision-committed")
            for job, row in begun:
                self._apply(job)
                self.begin_attempt(job, row)
        for stop in stops:
            await self.stop(stop.job, stop.reason, stop.message)

    def _were_not_waiting(self, found: dict[JobId, Job | None]) -> bool:
        """Whether jobs in the queue had ended already: they were looked up before, and put there after that."""
        gone = [job_id for job_id, job in found.items() if job is None or not isinstance(job.state, jobs.Queued)]
        for job_id in gone:
            self._queue = self._queue.dequeue(job_id)
        return bool(gone)

    def _startable(self, decisions: tuple[Decision, ...], waiting: dict[JobId, Job | None]) -> tuple[Decision, ...]:
        """The decisions without the starts behind the first one whose account has to be looked at: nobody passes it."""
        kept: list[Decision] = []
        in_turn = True
        for decision in decisions:
            if isinstance(decision, Start):
                job = waiting[decision.job]
                in_turn = job is not None and self.holds.may_start(job.owner.uid) and in_turn
                if not in_turn:
                    continue
            kept.append(decision)
        return tuple(kept)

    def _hold_changed(self, uid: int) -> None:
        self._queue = self.holds.filter(uid, self._queue)
        self.wake()

    def _begin(self, ledger: Ledger, job: Job, decision: Start, now: float) -> tuple[Job, dict[str, Any]]:
        attempt = getattr(job.state, "attempt", 0) + 1
        started = starting_state(job, decision.allocation, attempt)
        name, nonce = name_of(self.id, job, attempt), secrets.token_hex(16)
        choices = json.dumps([[c.uuid, c.chosen, c.reason] for c in decision.choices])
        ledger.set_state(started)
        ledger.add_attempt(started, name, nonce, decision.allocation, choices, now)
        return started, {"attempt": attempt, "name": name, "nonce": nonce, "container": None, "image": ""}

    def begin_attempt(self, job: Job, row: dict[str, Any]) -> Attempt:
        """Go through an attempt's steps, in a task of its own; the row is the ledger's."""
        before = None
        if job.spec.gpus.count:
            before, self._last_started = self._last_started, None
        attempt = Attempt(self, job, row, before)
        if job.spec.gpus.count:
            self._last_started = attempt
        self.attempts[job.id] = attempt
        if attempt.container is not None:
            self.by_container[attempt.container] = job.id
        self.spawn(attempt.run(), f"attempt {attempt.name}")
        return attempt

    # -- changes of state --------------------------------------------------------------------------------------

    def _apply(self, job: Job) -> None:
        if isinstance(job.state, jobs.Active):
            self.active[job.id] = job
        else:
            self.active.pop(job.id, None)
        if not (isinstance(job.state, jobs.Queued) and self.contexts.awaits(job)):
            shape = shape_of(job.spec)
            self.holds.apply(job, shape)
            if not (isinstance(job.state, jobs.Queued) and self.holds.reason(job)):
                self._queue = self._queue.apply(job, shape)
        if isinstance(job.state, jobs.Ended) and self.contexts.keeps(job.id.number):
            self.spawn(self._drop_contexts(job.id.number), f"build contexts of {job.id.number}")
        if isinstance(job.state, jobs.Ended) and self.secrets.keeps(job.id.number):
            self.spawn(self._drop_secrets(job.id.number), f"secrets of {job.id.number}")
        self.watchers.tell(job.id.number)

    async def _change(
        self, job_id: JobId, to: Callable[[Job], jobs.State | None], also: Callable[[Ledger], None] | None = None
    ) -> Job:
        """Bring a job into another state, on disk first; ``to`` answers None where it should stay as it is."""
        async with self._writing:
            job = self.active.get(job_id) or await self.job(job_id)
            state = to(job)
            if state is None:
                return job
            changed = job.to(state)

            def commit(ledger: Ledger) -> None:
                ledger.set_state(changed)
                if also is not None:
                    also(ledger)

            await self.store.change(commit)
            self._apply(changed)
        return changed

    async def _must(self, work: Callable[[], Any]) -> None:
        """Write what has happened already, however long the ledger's disk is full."""
        while True:
            try:
                await work()
            except Unavailable as error:
                logger.error("%s; it will be tried again", error)
                await asyncio.sleep(WRITE_AGAIN_SECONDS)
            else:
                return

    async def pulling(self, job_id: JobId) -> None:
        """Its image is being fetched."""

        def to(job: Job) -> jobs.State | None:
            state = job.state
            if not isinstance(state, jobs.Starting):
                return None
            return jobs.Pulling(allocation=state.allocation, attempt=state.attempt)

        await self._must(lambda: self._change(job_id, to))

    async def starting(self, job_id: JobId) -> None:
        """Its image is there."""

        def to(job: Job) -> jobs.State | None:
            state = job.state
            if not isinstance(state, jobs.Pulling):
                return None
            return jobs.Starting(allocation=state.allocation, attempt=state.attempt)

        self._notes.pop(job_id, None)
        self._progress.pop(job_id, None)
        await self._must(lambda: self._change(job_id, to))

    async def made(self, job_id: JobId, attempt: int, container: str, config: str, image: Image) -> None:
        """Its container exists."""
        self.by_container[container] = job_id
        self.engine_watch.strange.pop(container, None)
        await self._must(
            lambda: self.store.change(
                lambda ledger: ledger.on_attempt(
                    "set_attempt_container",
                    job_id,
                    attempt,
                    config=config,
                    container=container,
                    image=image.id,
                    digest=image.digest,
                )
            )
        )

    async def released(self, job_id: JobId, attempt: int) -> bool:
        """Its program is about to run; False where its end was recorded first: then it must not."""
        now = self.clock.now()

        def to(job: Job) -> jobs.State | None:
            state = job.state
            if not isinstance(state, jobs.Starting):
                return None
            return jobs.Running(allocation=state.allocation, attempt=state.attempt, started_at=now)

        await self._must(
            lambda: self._change(
                job_id, to, lambda ledger: ledger.on_attempt("set_attempt_started", job_id, attempt, started_at=now)
            )
        )
        self.wake()  # a time limit began
        return not isinstance((await self.job(job_id)).state, jobs.Stopping)

    async def end(self, job_id: JobId, ending: Ending, exit_code: int | None) -> None:
        """It is over; what it held is free."""
        now = self.clock.now()
        attempt = self.attempts[job_id]

        def to(job: Job) -> jobs.State | None:
            state = job.state
            if not isinstance(state, jobs.Active):
                return None
            return jobs.Ended(
                outcome=ending.outcome, attempt=state.attempt, started_at=getattr(state, "started_at", None),
                ended_at=now, exit_code=exit_code, gpus=state.allocation.gpus, reason=ending.reason,
                message=ending.message,
            )  # fmt: skip

        await self._must(
            lambda: self._change(
                job_id,
                to,
                lambda ledger: ledger.on_attempt(
                    "set_attempt_ended",
                    job_id,
                    attempt.number,
                    ended_at=now,
                    exit_code=exit_code,
                    reason=ending.reason,
                    message=ending.message,
                ),
            )
        )
        self.attempts.pop(job_id, None)
        self._notes.pop(job_id, None)
        self._progress.pop(job_id, None)
        self.wake()

    async def explain_end(self, job_id: JobId, attempt: int, exit_code: int) -> None:
        """Say what the end of a failed job's log tells."""
        lines = bytearray()
        if (found := self.logs.reader(job_id, attempt)) is not None:
            async for batch in found[0].batches(tail=DIAGNOSED_LINES):
                lines += b"".join(record.payload for record in batch)
                del lines[:-DIAGNOSED_BYTES]
        job = await self.job(job_id)
        if not isinstance(job.state, jobs.Ended) or job.state.reason != "exit" or job.state.attempt != attempt:
            return
        words = job.state.message
        if exit_code == 127 and (argv := (*(job.spec.entrypoint or ()), *(job.spec.command or ()))):
            words += f": {argv[0]}: {command_hint(argv[0])}"
        elif (finding := diagnose(bytes(lines), exit_code)) is not None:
            words = f"exit {exit_code}: {finding.cause}: {finding.hint}"
        else:
            return
        explained = replace(job, state=replace(job.state, message=words))
        await self._must(lambda: self.store.change(lambda ledger: ledger.set_state(explained)))
        self._apply(explained)

    def note(self, job_id: JobId, message: str) -> None:
        """What an active job is waiting for, shown with its row; empty for nothing."""
        if message:
            self._notes[job_id] = message
        else:
            self._notes.pop(job_id, None)

    def progress(self, job_id: JobId, progress: Progress) -> None:
        """How far its image is, shown with its row; who watches is told a few times a second at most."""
        self._notes[job_id] = progress.text
        self._progress[job_id] = progress.layers
        self.watchers.tell_soon(job_id.number)

    def layers_of(self, job_id: JobId) -> tuple[Layer, ...]:
        """The layers of the image that an active job waits for; empty where none is pulled."""
        return self._progress.get(job_id, ())

    def build_limits(self) -> BuildLimits:
        """What a build may use on this machine."""
        settings, host = self.settings, self._host
        return BuildLimits(
            memory=min(settings.build_memory, int(host.memory * (1 - settings.memory_reserve))),
            cpus=min(settings.build_cpus, host.cpus),
            seconds=settings.build_time,
        )

    # -- what people ask for -----------------------------------------------------------------------------------

    async def submit(
        self,
        owner: Owner,
        files: list[tuple[str, str, list[tuple[int | None, JobSpec]]]],
        values: Sequence[Mapping[str, bytes]] = (),
    ) -> list[list[Job]]:
        """Take the jobs of files (name, text, specifications) in: all are on disk when this returns, or none.

        Args:
            owner: Whose jobs they are.
            files: The files.
            values: Those of each file's secrets, by the secrets' names; none where no file has any.

        Raises:
            Refused: One of them can never run here, or there are more than one account may have.
            Unavailable: The ledger could not be written.
        """
        self._check_numbers(owner, [specs for _, _, specs in files])
        await self.gpus.look()
        view = self.view()
        for shape in {shape_of(spec) for _, _, specs in files for _, spec in specs}:
            check_possible(shape, view)
        images = {spec.image for _, _, specs in files for _, spec in specs if spec.gpus.count and spec.image}
        await self._check_drivers(owner, images)
        fault("submission-received")
        kept: list[str | None] = []
        try:
            for position, (_, _, specs) in enumerate(files):
                given = values[position] if values else {}
                kept.append(await self.secrets.write([spec for _, spec in specs], given))
            return await self._take_in(owner, files, kept)
        except GpujobsError:  # who is cancelled does not know whether it was committed: the next start knows it
            for name in filter(None, kept):
                self.secrets.drop(name)
            raise

    async def _take_in(
        self, owner: Owner, files: list[tuple[str, str, list[tuple[int | None, JobSpec]]]], kept: list[str | None]
    ) -> list[list[Job]]:
        """Commit the jobs of files, with the names of their secrets' files; returns them, in the queue."""
        now = self.clock.now()
        asked: list[tuple[int, list[tuple[str, str, str]]]] = []

        def commit(ledger: Ledger) -> list[list[Job]]:
            made = [ledger.submit(owner, now, file, text, specs) for file, text, specs in files]
            numbers = [group[0].id.number for group in made]
            asked[:] = [
                (number, self.contexts.ask(ledger, number, [job.spec for job in group], now))
                for number, group in zip(numbers, made, strict=True)
            ]
            for number, name in zip(numbers, kept, strict=True):
                if name is not None:
                    ledger.add_secrets(number, name)
            return made

        made = await self.store.change(commit)
        fault("submission-committed")
        for number, contexts in asked:
            self.contexts.asked(number, contexts, now)
        for group, name in zip(made, kept, strict=True):
            if name is not None:
                self.secrets.committed(group[0].id.number, name)
            for job in group:
                self._apply(job)
        self.wake()
        return made

    def _check_numbers(self, owner: Owner, files: list[list[tuple[int | None, JobSpec]]]) -> None:
        """Refuse more jobs than one submission, one array or one account may have."""
        settings, count = self.settings, sum(map(len, files))
        longest = max((len(specs) for specs in files if specs[0][0] is not None), default=0)
        for found, most, what in (
            (longest, settings.array_elements, "elements of one array"),
            (count, settings.submission_jobs, "jobs of one submission"),
            (count + self.holds.queued(owner.uid), settings.queued_jobs, f"jobs of {owner.name} that wait"),
        ):
            if found > most:
                raise Refused(f"these would be {found} {what}; the limit is {most}",
                              hint="Submit fewer at a time, or ask the administrator.")  # fmt: skip

    async def check_allowed(self, owner: Owner, specs: Iterable[JobSpec]) -> None:
        """Refuse jobs that use what the settings do not allow their owner.

        Raises:
            Refused: With the rule's name.
        """
        gids, rules = await self.directory.gids(), self.settings.rules
        runtimes: tuple[str, ...] | None = None
        for spec in specs:
            if spec.runtime is not None and runtimes is None:
                runtimes = await self.engine.runtimes()
            check_rules(spec, owner, rules, gids, runtimes or ())

    async def _check_drivers(self, owner: Owner, references: set[str]) -> None:
        """Refuse images that are here already and need a newer driver; of others it is told before their start.

        Raises:
            Refused: One does.
        """
        for reference in sorted(references):
            try:
                image = await self.images.local(reference, owner)
            except (EngineError, GpujobsError):
                continue  # whatever it is, the attempt says it in its own words
            if (problem := needs_newer_driver(image, self.inventory)) is not None:
                raise Refused(problem, hint="Use an image with an older CUDA, or ask for a newer driver.")

    async def context_came(self, number: int) -> None:
        """A build context of a submission is here: the jobs that waited for it take their places in the queue."""
        for job in await self.store.read(lambda ledger: ledger.submission(number)):
            if isinstance(job.state, jobs.Queued):
                self._apply(job)
        self.wake()

    async def _give_up_contexts(self) -> None:
        """Fail the jobs whose build contexts nobody sends."""
        while True:
            self.contexts.changed.clear()
            for number in self.contexts.overdue():
                for job in await self.store.read(lambda ledger, number=number: ledger.submission(number)):  # type: ignore[misc]
                    if isinstance(job.state, jobs.Queued) and self.contexts.awaits(job):
                        words = f"its build context did not come within {WAIT_SECONDS / 60:g} minutes"
                        await self._must(lambda job=job, words=words: self.stop(job.id, "image", words))  # type: ignore[misc]
                await self._drop_contexts(number)
            due = self.contexts.next_deadline()
            try:
                async with asyncio.timeout(None if due is None else max(0.1, due - self.clock.now())):
                    await self.contexts.changed.wait()
            except TimeoutError:
                continue

    async def _drop_contexts(self, number: int) -> None:
        """Remove what is kept for a submission whose jobs have all ended."""
        if await self._all_ended(number):
            await self._must(lambda: self.contexts.forget(number))

    async def _drop_secrets(self, number: int) -> None:
        """Remove the secrets of a submission whose jobs have all ended."""
        if await self._all_ended(number):
            await self._must(lambda: self.secrets.forget(number))

    async def _all_ended(self, number: int) -> bool:
        found = await self.store.read(lambda ledger: ledger.submission(number))
        return all(isinstance(job.state, jobs.Ended) for job in found)

    async def rerun(self, found: list[Job], owner: Owner) -> list[Job]:
        """Take the jobs of one submission in again, each with the image that its last attempt ran.

        Args:
            found: The jobs.
            owner: Their owner, with the groups that they are to have at most.

        Raises:
            Refused: One of them can never run here any more, is not allowed any more, or had secrets.
            Unavailable: The account database did not answer in time.
        """
        first = found[0]
        if any(job.spec.secrets for job in found):
            raise Refused(
                f"job {first.id.number} has secrets, which are not kept for another job",
                hint="Submit its file again: they are read anew then.",
            )
        owner = await self.directory.present(owner)
        await self.check_allowed(owner, [job.spec for job in found])
        specs: list[tuple[int | None, JobSpec]] = []
        for job in found:
            attempts = await self.store.read(lambda ledger, job=job: ledger.attempts(job.id))  # type: ignore[misc]
            ran = next((row for row in reversed(attempts) if row["image"]), None)
            image = job.spec.image if ran is None else ran["digest"] or ran["image"]
            specs.append((job.id.index, replace(job.spec, image=image, build=None if image else job.spec.build)))
        made = await self.submit(owner, [(f"rerun of {first.id.number}", "", specs)])
        return made[0]

    async def plan(self, owner: Owner, spec: JobSpec, *, discreet: bool = False) -> dict[str, Any]:
        """What would happen to a job now; discreetly, without names of others.

        Raises:
            Refused: It can never run here.
        """
        await self.gpus.look()
        reference = spec.image or f"(built from {spec.build.context if spec.build else ''})"
        try:
            image = await self.images.local(reference, owner) if spec.image else Image(id="", reference=reference)
        except Gone:
            image = Image(id="", reference=reference)
        found = plan(
            spec, owner, image, self._shown_view(discreet=discreet), runtime=self.settings.runtime,
            ceilings=self.ceilings, defaults=self.settings.environment,
        )  # fmt: skip
        return as_row(found)

    async def stop(self, job_id: JobId, reason: str, message: str) -> Job:
        """End a job, waiting or active; answered once that is recorded."""

        def to(job: Job) -> jobs.State | None:
            state = job.state
            if isinstance(state, jobs.Queued):
                return jobs.Ended(
                    outcome="cancelled" if reason == "cancelled" else "failed", attempt=0, started_at=None,
                    ended_at=self.clock.now(), exit_code=None, reason=reason, message=message,
                )  # fmt: skip
            if isinstance(state, jobs.Pulling | jobs.Starting | jobs.Running):
                return jobs.Stopping(
                    allocation=state.allocation, attempt=state.attempt, started_at=getattr(state, "started_at", None),
                    reason=reason, message=message,
                )  # fmt: skip
            return None

        job = await self._change(job_id, to)
        fault("cancel-committed")
        if (attempt := self.attempts.get(job_id)) is not None and isinstance(job.state, jobs.Stopping):
            attempt.stop(job.state.reason, job.state.message)
        self.wake()
        return job

    async def job(self, job_id: JobId) -> Job:
        """One job.

        Raises:
            UnknownId: There is none of that id.
        """
        job = self.active.get(job_id) or await self.store.read(lambda ledger: ledger.job(job_id))
        if job is None:
            raise UnknownId(f"there is no job {job_id}", hint="`gpujobs ps --all` lists all of them.")
        return job

    async def named(self, text: str) -> list[Job]:
        """The jobs that an id stands for: itself, or all elements of an array.

        Raises:
            UnknownId: There are none.
        """
        job_id = JobId.parse(text)
        if job_id.index is not None:
            return [await self.job(job_id)]
        found = await self.store.read(lambda ledger: ledger.submission(job_id.number))
        if not found:
            raise UnknownId(f"there is no job {job_id}", hint="`gpujobs ps --all` lists all of them.")
        return found

    def explainer(self, *, discreet: bool = False) -> Explainer:
        """Why jobs wait, as things are now; discreetly, without names of others."""
        return Explainer(self._shown_view(discreet=discreet))

    def _shown_view(self, *, discreet: bool) -> View:
        view = self.view()
        return replace(view, avoid=without_names(view.avoid)) if discreet else view

    def note_of(self, job_id: JobId) -> str:
        """What an active job is waiting for; empty for nothing."""
        return self._notes.get(job_id, "")

    def settled(self, job: Job) -> bool:
        """Whether a job has ended and all that it wrote is stored."""
        return isinstance(job.state, jobs.Ended) and not self.logs.is_open(job.id, job.state.attempt)

    # -- logs --------------------------------------------------------------------------------------------------

    async def close_log(self, job_id: JobId, attempt: int) -> None:
        """All that the container wrote is stored."""
        await self.logs.finish(job_id, attempt)
        await self._must(lambda: self.store.change(lambda ledger: ledger.on_attempt("close_log", job_id, attempt)))
        self.tidy.ended()
        self.watchers.tell(job_id.number)

    async def _finish_log(self, row: dict[str, Any]) -> None:
        job_id = JobId.of_key(row["number"], row["idx"])
        if row["container"] is not None and await self._has_run(row["container"]):
            await follow_to_end(self.engine, row["container"], self.logs.log(job_id, row["attempt"]))
        await self.close_log(job_id, row["attempt"])

    async def _has_run(self, container: str) -> bool:
        """Whether there is output to wait for: a container that was never started has none, and does not end."""
        while True:
            try:
                return bool((await self.engine.inspect(container))["State"]["Status"] != "created")
            except Gone:
                return True  # reading its log tells the same
            except (EngineError, EngineAway) as error:
                logger.warning("container %s was not looked at: %s", container[:12], error)
                await asyncio.sleep(AGAIN_SECONDS)
