"""One attempt of a job, from the decision to the end, as an ordered list of steps.

Every step may be repeated: the container's name follows from the job, a conflict means that it is there already,
the gate takes a second release. So a server that starts again goes through the same steps as one that starts the
attempt, from wherever the container is.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gpujobs.core import job as jobs
from gpujobs.core import secrets
from gpujobs.core.container import (
    INIT_REFUSED,
    Image,
    Mount,
    Order,
    asked_in_memory,
    checkpoints,
    container_name,
    control_file,
    create_request,
    differences,
    group_file,
    home_of,
    in_memory,
    passwd_file,
    runtime_hint,
    under_gvisor,
)  # fmt: skip
from gpujobs.core.cuda import needs_newer_driver
from gpujobs.core.endings import Ending, ending_of
from gpujobs.core.errors import GpujobsError, Refused, Unavailable
from gpujobs.core.job import Allocation, Job
from gpujobs.core.planning import source_of
from gpujobs.core.ports import Conflict, EngineAway, EngineError, Gone, Log, MountHeld, Pin, Runner
from gpujobs.service.faults import fault
from gpujobs.service.secretstore import hand_over

if TYPE_CHECKING:
    from gpujobs.service.loop import Service

logger = logging.getLogger("gpujobs")

T = TypeVar("T")

NOTICE_SECONDS = 2.0
"""In which the Engine tells that a container has ended."""

HOLD_SECONDS = 30.0
"""How long to wait before asking a file server again that did not answer."""

ACCOUNT_SECONDS = 5.0
"""How long to wait before asking an account database again that did not answer."""

TRIES = 5
"""What the Engine or the account database answered badly is tried again so often, after 1, 2, 4 … seconds."""

LOOK_SECONDS = 2.0
"""Between looks at GPUs that the driver does not tell of just now."""

KILL_SECONDS = 10.0
"""After which a container that has not ended is sent SIGKILL again: the first may have been lost."""


OUTPUT_LOST = "gap: the container was removed before its output had been read to the end"

BUILD_LINE = 16 << 10
"""Characters of one line of a build's output that are kept."""


class Failed(Exception):
    """The attempt cannot start: the reason's word and the sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.ending = Ending(outcome="failed", reason=reason, message=message)


class Again(Exception):
    """Its container is of no use and its program never ran: another can take its place, ``ending`` is it otherwise."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.message)
        self.ending = ending


class StopAsked(Exception):
    """Somebody wants the attempt ended before its program ran."""


class Attempt:
    """One container run.

    Args:
        service: The server it belongs to.
        job: The job, active.
        row: The ledger's row of the attempt.
        before: The attempt decided before this one, so that starts keep their order.
    """

    def __init__(self, service: Service, job: Job, row: dict[str, Any], before: Attempt | None) -> None:
        state = job.state
        assert isinstance(state, jobs.Active)
        self.job_id = job.id
        self.number: int = row["attempt"]
        self.allocation: Allocation = state.allocation
        self.container: str | None = row["container"]
        self.nonce: str = row["nonce"]
        self.name: str = row["name"]
        self._recorded_image: str = row["image"]
        self.gone = asyncio.Event()  # the container has ended, or is not there any more
        self.started = asyncio.Event()  # it is past the point where starts are ordered
        self.engine_was_away = False  # when it had ended, as this server saw it
        self._service = service
        self._job = job
        self._before = before
        self._stop: tuple[str, str] | None = None
        self._stopping = asyncio.Event()
        self._released = isinstance(state, jobs.Running) or getattr(state, "started_at", None) is not None
        if isinstance(state, jobs.Stopping):
            self.stop(state.reason, state.message)
        self._fresh = False  # this process made the container, and the Engine was there ever since
        self._useless = False  # its container is to be replaced
        self._stop_signal = "SIGTERM"  # or what its container says: the job file, else the image
        self._gate = -1
        self._sealed: dict[str, Pin] = {}
        self._log: asyncio.Task[None] | None = None

    @property
    def control(self) -> Path:
        """The host directory that the container sees as its control directory."""
        return self._service.paths.attempts / self.name

    @property
    def _secrets(self) -> Path:
        return self.control / "secrets"

    def _take_back_secrets(self) -> None:
        """Its container has ended: nothing of its secrets stays but with the job, which has not."""
        self._secrets.unlink(missing_ok=True)

    def stop(self, reason: str, message: str) -> None:
        """Ask for the end; the first reason given counts."""
        if self._stop is None:
            self._stop = (reason, message)
            self._stopping.set()

    async def run(self) -> None:
        """Go through all steps that are left, and record the end."""
        try:
            ending, code = await self._through()
            if code is None:
                await self._discard()
            self._take_back_secrets()
            self._close_gate()
            self.started.set()
            fault("container-ended")
            await self._service.end(self.job_id, ending, code)
            fault("end-committed")
            if self._log is not None:
                await self._log
            if code:
                await self._service.explain_end(self.job_id, self.number, code)
            await self._service.close_log(self.job_id, self.number)
            fault("log-closed")
        finally:
            self.started.set()
            self._close_gate()
            while self._before is not None and self._before.started.is_set():  # else they would all stay in memory
                self._before = self._before._before
        await self._service.tidy.attempt_gone(self.name, self._job.owner, self.job_id)

    async def _through(self) -> tuple[Ending, int | None]:
        """All steps to the end, again from the first whenever something failed that may pass: each may be repeated.

        Once its program runs, only its own end ends it: no answer of the Engine's, however often, is a reason to.
        """
        failures = 0
        while True:
            try:
                await self._start()
                if (end := await self._until_end()) is not None:
                    return end
            except Again as again:
                logger.warning("%s: %s", self.name, again)
                if failures == TRIES:
                    return again.ending, None
                self._useless = True
                await self._rest(1.0)
                failures += 1
            except Failed as failure:
                return failure.ending, None
            except StopAsked:
                return ending_of(0, oom=False, memory=0, released=False, stop=self._stop), None
            except Gone:
                return Ending(outcome="failed", reason="server", message=self._removed), None
            except EngineAway:
                self._fresh = False
                await self._service.engine_watch.returns(self.job_id)
            except (EngineError, Unavailable) as error:
                logger.warning("%s: %s", self.name, error)
                if failures == TRIES and not self._released:
                    return Ending(outcome="failed", reason="server", message=str(error)), None
                await self._rest(2.0 ** min(failures, TRIES))
                failures += 1
            except GpujobsError as error:
                return Ending(outcome="failed", reason="server", message=str(error)), None

    async def _rest(self, seconds: float) -> None:
        """Wait so long before trying again; news that it is to end are worth trying again at once."""
        if self._stop is not None:
            await asyncio.sleep(seconds)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

    async def lost(self, message: str) -> None:
        """Record that its container cannot be found any more."""
        self._take_back_secrets()
        ending = Ending(outcome="failed", reason="server", message=message)
        await self._service.end(self.job_id, ending, None)
        if self._released:
            log = self._service.logs.log(self.job_id, self.number)
            log.append_gap(OUTPUT_LOST, time.time_ns())
        await self._service.close_log(self.job_id, self.number)
        await self._service.tidy.attempt_gone(self.name, self._job.owner, self.job_id)

    @property
    def _removed(self) -> str:
        return f"its container {self.name} was removed by someone else"

    # -- the steps ---------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        if self._released:
            await self._return_to()
            return
        if self._useless:
            await self._drop_container()
        image = await self._image()
        if self.allocation.gpus and (problem := needs_newer_driver(image, self._service.inventory)) is not None:
            raise Failed("image", problem)
        fault("image-ready")
        order = await self._order(image)
        try:
            request = create_request(order)
        except Refused as error:  # neither it nor the job file says what to run
            raise Failed("image", sentence(error)) from error
        await self._make_container(order, request)
        fault("container-recorded")
        self._open_gate()
        inspected = await self._launch(order)
        await self._verify(order, inspected)
        if self.gone.is_set():
            return
        await self._unseal(inspected)
        if self.gone.is_set():
            return
        fault("devices-verified")
        await self._in_turn()
        self._check_stop()
        if not await self._service.released(self.job_id, self.number):
            await self._stopping.wait()
            raise StopAsked
        fault("running-committed")
        self._release()

    async def _drop_container(self) -> None:
        """Make room for another container: what the init wrote is stored, and the name is free."""
        if self._log is not None:
            await self._log
            self._log = None
        if self.container is not None:
            await self._service.engine.remove(self.container)
            self._service.by_container.pop(self.container, None)
        self.container, self._useless = None, False
        self.gone.clear()

    def _release(self) -> None:
        self._released = True
        word = self.control / "word"
        if not under_gvisor(self._job.spec):
            os.write(self._gate, b"g")
        elif not word.exists():
            word.with_suffix(".new").rename(word)
        fault("released")
        self.started.set()

    async def _return_to(self) -> None:
        """Take up a container that was released before this server started, wherever it is now."""
        assert self.container is not None
        inspected = await self._service.engine.inspect(self.container)
        self._stop_signal = _stop_signal(inspected)
        self._open_gate()
        self.follow()
        if not inspected["State"]["Running"]:
            self.gone.set()
        self._release()

    def _check_stop(self) -> None:
        if self._stop is not None and not self._released:
            raise StopAsked

    async def _image(self) -> Image:
        """The image, by what its name meant when the container was made; pulled or built where it is not there."""
        self._check_stop()
        service, owner, spec = self._service, self._job.owner, self._job.spec
        built = await service.contexts.image(self._job) if spec.build is not None else None
        reference = spec.image or built
        if (known := self._recorded_image or reference) is not None:
            try:
                image = await service.images.local(known, owner)
            except Gone:
                pass
            except EngineAway:
                raise
            except GpujobsError as error:
                raise Failed("image", sentence(error)) from error
            else:
                await service.starting(self.job_id)  # a server that died while it was fetched left it pulling
                return replace(image, reference=spec.image or "(built)")
        self.started.set()  # who has to fetch its image does not keep the others waiting
        await service.pulling(self.job_id)
        try:
            image = await self._unless_stopped(self._build() if spec.image is None else self._pull(spec.image))
        except EngineAway:
            raise
        except GpujobsError as error:
            raise Failed("image", sentence(error)) from error
        await service.starting(self.job_id)
        self._check_stop()
        return image

    async def _pull(self, reference: str) -> Image:
        service = self._service
        return await service.images.pull(reference, lambda progress: service.progress(self.job_id, progress))

    async def _build(self) -> Image:
        """Build the image from the context that the client has sent; the output is at the log's beginning."""
        service, spec = self._service, self._job.spec
        assert spec.build is not None
        context = service.contexts.path(self._job)
        if context is None:
            raise Refused("the image that was built for it was removed, and so is its build context",
                          hint="Submit it again.")  # fmt: skip
        log = service.logs.log(self.job_id, self.number)

        def output(line: str) -> None:
            try:
                log.append_gap(line[:BUILD_LINE], time.time_ns())
            except OSError as error:  # a full disk: the build goes on, its output is not kept
                logger.warning("job %s: a line of its build was not stored: %s", self.job_id, error)

        image = await service.images.build(
            context, spec.build, self._job.owner, service.build_limits(), output,
            lambda progress: service.progress(self.job_id, progress),
        )  # fmt: skip
        await service.contexts.built(self._job, image.id)
        return replace(image, reference="(built)")

    async def _unless_stopped(self, work: Coroutine[Any, Any, Image]) -> Image:
        """Do it, unless somebody wants the attempt ended before it is done."""
        task = asyncio.create_task(work, name=f"image of {self.name}")
        stopping = asyncio.create_task(self._stopping.wait(), name=f"stop of {self.name}")
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._check_stop()
            return task.result()
        finally:
            stopping.cancel()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _order(self, image: Image) -> Order:
        service, spec = self._service, self._job.spec
        # Groups that the account has lost since the submission are not given to the job.
        owner = await self._answered(lambda: service.directory.present(self._job.owner))
        self._job = job = replace(self._job, owner=owner)
        home = f"/home/{owner.name}"
        self._sealed.clear()
        mounts: list[Mount] = []
        for position, volume in enumerate(spec.volumes):
            if volume.type == "tmpfs":
                continue
            source = source_of(owner, volume.type, volume.source)
            if volume.type == "volume":
                await self._make_directory(source)
            mounts.append(await self._pin(source, volume.target, volume.read_only, f"{self.name}-{position}"))
        tmpfs = asked_in_memory(spec, owner)
        taken = {mount.target for mount in mounts} | set(tmpfs)
        mounts += await self._shared(taken)
        if home not in taken:
            mount = await self._home(home)
            if mount is None:
                tmpfs[home] = in_memory(owner)
            else:
                mounts.append(mount)
        try:
            network = await service.engine.network()
        except EngineError as error:
            raise Failed("server", f"it has no network: {error}") from error
        await self._mount_points(home, spec.working_dir or image.working_dir)
        order = Order(
            server=service.id, job=job.id, attempt=self.number, nonce=self.nonce, owner=owner, spec=spec,
            allocation=self.allocation, image=image, control=str(self.control), home=home,
            runtime=service.settings.runtime, mounts=tuple(mounts), tmpfs=tmpfs, log=service.engine.log_config,
            visible="void" if service.inventory.simulated else ",".join(self.allocation.gpus) or "void",
            timezone=service.timezone, ceilings=service.ceilings, near=service.near(self.allocation),
            defaults=service.settings.environment, network=network,
        )  # fmt: skip
        names = await self._answered(lambda: service.directory.group_names(owner))
        self._write_control(order, passwd_file(owner, home), group_file(owner, names))
        return order

    async def _mount_points(self, home: str, working_dir: str) -> None:
        """Make, as the owner, what lies in a volume of theirs and the Engine would make there as root, or could not.

        That is where one volume is mounted in another, and the working directory.
        """
        owner = self._job.owner
        sources = {home: home_of(owner)} if home in self._sealed else {}
        wanted = {working_dir} if working_dir else set()
        if self._job.spec.secrets:
            wanted.add(secrets.DIRECTORY)
        for volume in self._job.spec.volumes:
            writable = volume.type != "tmpfs" and not volume.read_only
            sources[volume.target] = source_of(owner, volume.type, volume.source) if writable else ""
            if volume.type == "tmpfs" or self._sealed[volume.target].kind == "dir":
                wanted.add(volume.target)
        for place in sorted(wanted, key=len):
            outer = max((t for t in sources if place.startswith(f"{t}/")), key=len, default=None)
            if outer is not None and sources[outer]:
                await self._make_directory(sources[outer] + place[len(outer) :])

    async def _pin(self, source: str, target: str, read_only: bool, name: str) -> Mount:
        while True:
            try:
                pin = await self._service.mounts.pin(self._job.owner, source, read_only, name, sealed=True)
            except MountHeld as error:
                self.started.set()  # who waits for a file server does not keep the others waiting
                self._service.note(self.job_id, f"waiting for {source}: {error}")
                await self._pause(HOLD_SECONDS)
            except GpujobsError as error:
                raise Failed("server", f"volumes: {source}: {error}") from error
            else:
                ours = read_only and not self._service.mounts.read_only_itself
                self._sealed[target] = pin
                return Mount(source=str(pin.path), target=target, read_only=ours)

    async def _shared(self, taken: set[str]) -> list[Mount]:
        """The mounts that the settings give every job, those that its owner can open and the file does not replace."""
        found = []
        for position, volume in enumerate(self._service.settings.volumes):
            if volume.target in taken:
                continue
            name = f"{self.name}-shared{position}"
            try:
                found.append(await self._pin(volume.source, volume.target, volume.read_only, name))
            except Failed as failure:
                logger.info("%s: %s is left out: %s", self.name, volume.source, failure)
        return found

    async def _make_directory(self, path: str) -> None:
        try:
            await self._service.mounts.make_directory(self._job.owner, path)
        except GpujobsError as error:
            raise Failed("server", f"volumes: {error}") from error

    async def _home(self, home: str) -> Mount | None:
        """A directory of the owner's that is HOME inside and outlives the job; None where they have no home."""
        owner = self._job.owner
        place = home_of(owner)
        try:
            await self._service.mounts.make_directory(owner, f"{place}/{checkpoints(self._service.id, self.job_id)}")
            pin = await self._service.mounts.pin(owner, place, False, f"{self.name}-home", sealed=True)
        except (GpujobsError, MountHeld):
            return None
        self._sealed[home] = pin
        return Mount(source=str(pin.path), target=home, read_only=False)

    async def _answered(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What the account database says, as soon as it says something."""
        while True:
            try:
                answer = await ask()
            except Unavailable as error:
                self.started.set()  # who waits for the account database does not keep the others waiting
                self._service.note(self.job_id, sentence(error))
                await self._pause(ACCOUNT_SECONDS)
            else:
                self._service.note(self.job_id, "")
                return answer

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return
        self._check_stop()

    def _write_control(self, order: Order, passwd: bytes, group: bytes) -> None:
        self.control.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.control.chmod(0o755)
        for name, content in (("job", control_file(order)), ("passwd", passwd), ("group", group)):
            path = self.control / name
            if self.container is None or not path.exists():  # what a container was made with stays
                path.write_bytes(content)
                path.chmod(0o644)
        if order.spec.secrets and (self.container is None or not self._secrets.exists()):
            try:
                values = self._service.secrets.of(self._job)
            except GpujobsError as error:
                raise Failed("server", sentence(error)) from error
            content = secrets.handed_over(order.spec.secrets, values)
            hand_over(self._secrets, content, order.owner.uid, order.owner.gid)
        if under_gvisor(order.spec) and not (self.control / "word").exists():
            word = self.control / "word.new"
            word.write_bytes(b"g")  # now: at the release the disk may be full
            word.chmod(0o644)
        init, gate = self.control / "init", self.control / "gate"
        if not init.exists():
            os.link(self._service.paths.init, init)
        if not gate.exists():
            os.mkfifo(gate, 0o644)
            gate.chmod(0o644)

    async def _make_container(self, order: Order, request: dict[str, Any]) -> None:
        self._check_stop()
        engine = self._service.engine
        if self.container is None:
            try:
                self.container = await engine.create(self.name, request)
                self._fresh = True
            except Conflict:
                self.container = await self._adopt(request)
            except EngineError as error:
                raise Failed("server", f"the Engine did not make its container: {error}") from error
            fault("container-created")
            config = request["Labels"]["gpujobs.config"]
            await self._service.made(self.job_id, self.number, self.container, config, order.image)

    async def _adopt(self, request: dict[str, Any]) -> str:
        """Take the container that has our name already: made by a server that did not live to write that down."""
        engine = self._service.engine
        found = await engine.inspect(self.name)
        labels = found["Config"].get("Labels") or {}
        ours = ("gpujobs.server", "gpujobs.nonce")
        if any(labels.get(name) != request["Labels"][name] for name in ours) or found["State"]["Status"] != "created":
            raise Failed("server", f"there is a container {self.name} that is not the one made for this job")
        if labels.get("gpujobs.config") == request["Labels"]["gpujobs.config"]:
            return str(found["Id"])
        await engine.remove(found["Id"])  # settings, groups or GPUs' neighbourhoods have changed since
        return await engine.create(self.name, request)

    def _close_gate(self) -> None:
        if self._gate >= 0:
            os.close(self._gate)
            self._gate = -1

    def _open_gate(self) -> None:
        # Read-write, so that opening never blocks, and held until the end: what is written stays for the init.
        if self._gate < 0:
            self._gate = os.open(self.control / "gate", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    async def _launch(self, order: Order) -> dict[str, Any]:
        """Start the container where it has not been, and follow its log."""
        assert self.container is not None
        engine = self._service.engine
        inspected = await engine.inspect(self.container)
        if wrong := differences(order, inspected):
            raise Failed("isolation", "its program never ran: " + "; ".join(wrong))
        self._stop_signal = _stop_signal(inspected)
        if inspected["State"]["Status"] == "created":
            self._check_stop()
            try:
                await engine.start(self.container)
            except EngineError as error:
                failure = Failed("server", f"its container did not start: {error}{runtime_hint(str(error))}")
                # An Engine that was killed while it started one may have left a half of it behind, and then says
                # "already exists" for ever.
                raise failure if self._fresh else Again(failure.ending) from error
            fault("container-started")
            inspected = await engine.inspect(self.container)
        self.follow()
        if not inspected["State"]["Running"]:
            self.gone.set()
        return inspected

    def follow(self) -> None:
        """Begin to store what the container writes."""
        if self._log is None:
            assert self.container is not None
            log = self._service.logs.log(self.job_id, self.number)
            self._log = self._service.spawn(self._follow(log), f"log {self.name}")

    async def _follow(self, log: Log) -> None:
        assert self.container is not None
        await follow_to_end(self._service.engine, self.container, log)

    async def _verify(self, order: Order, inspected: dict[str, Any]) -> None:
        """Compare the devices granted with those allocated; a difference ends the attempt before its program ran."""
        service = self._service
        if service.inventory.simulated or self.gone.is_set():
            return
        if under_gvisor(self._job.spec) and not self.allocation.gpus:
            return  # no device of the host is in there, whatever the cgroup of the sandbox lets the sandbox open
        assert self.container is not None
        numbers = await self._numbers()
        wanted = frozenset(numbers[uuid] for uuid in self.allocation.gpus)
        pid = int(inspected["State"]["Pid"])
        try:
            got = await service.engine.granted(self.container, pid, numbers.values())
        except Unavailable:
            if not await self._has_ended():
                raise
            return
        if got == wanted:
            return
        extra, missing = sorted(got - wanted), sorted(wanted - got)
        words = [f"/dev/nvidia{minor} was granted besides" for minor in extra]
        words += [f"/dev/nvidia{minor} was not granted" for minor in missing]
        raise Failed("isolation", f"its program never ran: the runtime {order.runtime} gave it other GPUs than it was "
                                  f"allocated: {', '.join(words)}")  # fmt: skip

    async def _unseal(self, inspected: dict[str, Any]) -> None:
        """Let the container write to its volumes: all that the Engine had to make in there as root is made."""
        pid = int(inspected["State"]["Pid"])
        while True:
            try:
                await self._service.mounts.unseal(pid, self._sealed)
            except MountHeld as error:
                self._service.note(self.job_id, f"waiting for its volumes: {error}")
                await self._pause(HOLD_SECONDS)
            except GpujobsError as error:
                if await self._has_ended():
                    return
                raise Failed("isolation", f"its program never ran: {error}") from error
            else:
                return

    async def _has_ended(self) -> bool:
        """Whether its init refused, or it was killed: the end tells. The Engine knows it a moment after the kernel."""
        if not (await self._service.engine.inspect(self.container or ""))["State"]["Running"]:
            self.gone.set()
        try:
            async with asyncio.timeout(NOTICE_SECONDS):
                await self.gone.wait()
        except TimeoutError:
            return False
        return True

    async def _numbers(self) -> dict[str, int]:
        """The device numbers of all GPUs, its own among them, as soon as the driver tells of them."""
        service = self._service
        while missing := [uuid for uuid in self.allocation.gpus if uuid not in service.gpus.minors()]:
            if not service.inventory.problem:
                raise Failed("gpu-lost", f"its program never ran: {', '.join(missing)} is not in this machine any more")
            service.note(self.job_id, f"its GPUs cannot be checked: {service.inventory.problem}")
            await self._pause(LOOK_SECONDS)
            await service.gpus.look(force=True)
        service.note(self.job_id, "")
        return service.gpus.minors()

    async def _in_turn(self) -> None:
        # All of them, one by one: who need not be waited for, such as one that fetches its image, may itself be
        # behind one that is.
        while self._before is not None:
            await self._before.started.wait()
            self._before = self._before._before

    # -- until the end -----------------------------------------------------------------------------------------

    async def _until_end(self) -> tuple[Ending, int] | None:
        """How it ended; None where it has not, and is yet to be let go."""
        assert self.container is not None
        stopper = asyncio.create_task(self._stop_when_asked(), name=f"stop {self.name}")
        try:
            state = await self._end_state()
        finally:
            stopper.cancel()
        if state is None:
            return None
        code = int(state["ExitCode"])
        ending = ending_of(
            code, oom=bool(state.get("OOMKilled")), memory=self.allocation.memory, released=self._released,
            stop=self._stop, engine_was_away=self.engine_was_away,
        )  # fmt: skip
        if not self._released and self._stop is None and code != INIT_REFUSED:
            raise Again(ending)  # its Engine has died, or somebody has ended it
        return ending, code

    async def _end_state(self) -> dict[str, Any] | None:
        """The Engine's account of the container, once it says that it has ended: events are hints."""
        assert self.container is not None
        while True:
            await self.gone.wait()
            self.gone.clear()
            state = (await self._service.engine.inspect(self.container))["State"]
            if not state["Running"]:
                return dict(state)
            if not self._released:
                return None

    async def _stop_when_asked(self) -> None:
        await self._stopping.wait()
        await self._signal(self._stop_signal)
        await asyncio.sleep(self._job.spec.stop_grace_period)
        if self.container is not None:
            try:
                await self._service.engine.unthrottle(self.container)
            except (EngineError, EngineAway) as error:
                logger.warning("%s is killed with its limit of CPU time: %s", self.name, error)
        while True:  # until whoever waits for the end has seen it
            await self._signal("SIGKILL")
            await asyncio.sleep(KILL_SECONDS)

    async def _discard(self) -> None:
        """Its program never ran: see the container ended, before what it holds passes on.

        It is kept for what the init said, and removed if even that never ran: a container that was only made could
        be started by anybody at any time, and so counts as holding its GPUs.
        """
        while True:
            try:
                if await self._is_over():
                    return
            except Gone:
                return
            except EngineAway:
                await self._service.engine_watch.returns(self.job_id)
            except EngineError as error:
                logger.warning("%s is not known to have ended: %s", self.name, error)
                await asyncio.sleep(LOOK_SECONDS)

    async def _is_over(self) -> bool:
        """Whether the container has ended; it is sent SIGKILL, and waited for a while, where it has not.

        Raises:
            Gone: There is none.
        """
        engine = self._service.engine
        found = await engine.inspect(self.container or self.name)
        if self.container is None:
            if (found["Config"].get("Labels") or {}).get("gpujobs.nonce") != self.nonce:
                return True  # somebody else's of that name
            self.container = str(found["Id"])  # made, but the answer that it was never came
        if found["State"]["Status"] == "created":
            await engine.remove(self.container)
            return True
        if not found["State"]["Running"]:
            return True
        self.gone.clear()
        await engine.kill(self.container, "SIGKILL")
        try:
            async with asyncio.timeout(KILL_SECONDS):
                await self.gone.wait()
        except TimeoutError:
            logger.warning("%s did not end within %g s of SIGKILL", self.name, KILL_SECONDS)
        return False

    async def _signal(self, signal: str) -> None:
        """Send the container a signal, where there is one, as soon as the Engine answers."""
        while self.container is not None:
            try:
                await self._service.engine.kill(self.container, signal)
            except EngineAway:
                await self._service.engine_watch.returns(self.job_id)
                continue
            except EngineError as error:
                logger.warning("%s did not get %s: %s", self.name, signal, error)
            return


def _stop_signal(inspected: Mapping[str, Any]) -> str:
    """What asks a container's program to end, by Compose's rules: the Engine has the job file's, else the image's."""
    return str(inspected["Config"].get("StopSignal") or "SIGTERM")


async def follow_to_end(engine: Runner, container: str, log: Log) -> None:
    """Store what a container writes; where it was removed before its end was read, the log says so."""
    if (await engine.follow(container, log)).gone:
        log.append_gap(OUTPUT_LOST, time.time_ns())


def sentence(error: GpujobsError) -> str:
    """An error in one line: what happened, and what to do about it."""
    return f"{error.message}. {error.hint}" if error.hint else error.message


def remove_control(directory: Path) -> None:
    """Remove an attempt's control directory."""
    shutil.rmtree(directory, ignore_errors=True)


def install_init(source: Path, directory: Path) -> Path:
    """Copy the init beside the state, named by its content: an upgrade leaves running containers their own."""
    content = source.read_bytes()
    target = directory / f"gpujobs-init-{hashlib.sha256(content).hexdigest()[:16]}"
    if not target.exists():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = target.with_suffix(".new")
        temporary.write_bytes(content)
        temporary.chmod(0o755)
        temporary.replace(target)
    return target


def starting_state(job: Job, allocation: Allocation, attempt: int) -> Job:
    """The job as it is when an attempt has been decided."""
    return replace(job, state=jobs.Starting(allocation=allocation, attempt=attempt))


def name_of(server: str, job: Job, attempt: int) -> str:
    """The attempt's container name."""
    return container_name(server, job.id, attempt)
