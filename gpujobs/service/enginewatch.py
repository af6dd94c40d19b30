"""What happens in the Engine: ends of our containers, containers of others, the Engine's own coming and going."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpujobs.core.container import container_name
from gpujobs.core.errors import GpujobsError
from gpujobs.core.job import JobId
from gpujobs.core.ports import Disconnected, EngineError, EngineEvent, Gone, Reconnected
from gpujobs.core.reconcile import Action, Adopt, Forget, Kill, Lost, Recorded, Resume, Seen, reconcile
from gpujobs.service.attempts import KILL_SECONDS, Attempt, remove_control

if TYPE_CHECKING:
    from gpujobs.service.loop import Service

logger = logging.getLogger("gpujobs")

AGAIN_SECONDS = 1.0
"""Between tries of what the Engine did not answer."""


RUNNING = ("running", "paused")
ENDED = ("exited", "dead")
"""Docker's words for containers that will not run again by themselves."""


class EngineWatch:
    """The server's view of the Engine.

    Attributes:
        strange: The containers that are not ours, by id: some of them may hold GPUs.
    """

    def __init__(self, service: Service) -> None:
        self.strange: dict[str, Seen] = {}
        self._service = service
        self._ending: set[str] = set()
        self._missed = False
        self._answers = asyncio.Event()
        self._answers.set()

    async def run(self, since: float) -> None:
        """Take in events from a time on, for ever: they are hints, what counts is what inspecting says."""
        async for event in self._service.engine.events(since):
            if isinstance(event, EngineEvent):
                await self._event(event)
            elif isinstance(event, Reconnected):
                await self._is_back()
            elif isinstance(event, Disconnected):
                self._answers.clear()
                logger.warning("the Engine does not answer: %s", event.reason)

    async def _is_back(self) -> None:
        """Look what became of everything; the Engine may go again meanwhile."""
        while True:
            try:
                await self.reconcile(after_absence=True)
                await self._keep_lock()
            except (EngineError, GpujobsError) as error:
                logger.warning("the Engine answers, but not to everything: %s", error)
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                break
        logger.info("the Engine answers again")
        self._answers.set()
        self._service.wake()

    async def returns(self, job_id: JobId) -> None:
        """Wait, as long as it takes, until the Engine answers and what it holds has been looked at."""
        self._service.note(job_id, "the Docker Engine does not answer; it goes on when it does")
        await asyncio.sleep(AGAIN_SECONDS)
        await self._answers.wait()
        self._service.note(job_id, "")

    async def _event(self, event: EngineEvent) -> None:
        if event.type == "volume":
            if event.action == "destroy" and event.id.startswith("gpujobs-lock-"):
                await self._keep_lock()
            return
        job_id = self._service.by_container.get(event.id)
        attempt = None if job_id is None else self._service.attempts.get(job_id)
        if attempt is None:
            await self._strange_event(event)
        elif event.action in ("die", "destroy") and event.id == attempt.container:
            attempt.gone.set()

    async def _keep_lock(self) -> None:
        """The lock may have been pruned: take it again, and if another server was quicker, leave it the Engine."""
        try:
            kept = await self._service.still_alone()
        except (EngineError, GpujobsError) as error:
            logger.warning("whether another server uses this Engine is not known: %s", error)
            return
        if not kept:
            logger.critical("another server has taken this Engine: this one stops")
            self._service.stopped.set()
            self._service.wake()

    async def _strange_event(self, event: EngineEvent) -> None:
        if event.action in ("create", "start"):
            try:
                seen = await self._service.engine.seen(event.id)
            except Gone:
                return
            except (EngineError, GpujobsError) as error:
                logger.warning("container %s was not looked at: %s", event.id[:12], error)
                self._miss()
                return
            # By its name, which is the Engine's to give once, and our secret: labels can be anybody's.
            ours = {(attempt.name, attempt.nonce) for attempt in self._service.attempts.values()}
            if (seen.name, seen.labels.get("gpujobs.nonce")) in ours:
                return
            self.strange[seen.id] = seen
            if seen.state in RUNNING and seen.labels.get("gpujobs.server") == self._service.id:
                await self._look_again()  # it may be one of ours that had ended
        elif event.action in ("die", "destroy"):
            if event.action == "destroy":
                self.strange.pop(event.id, None)
            elif (known := self.strange.get(event.id)) is not None:
                self.strange[event.id] = replace(known, state="exited")
            self._service.wake()

    async def _look_again(self) -> None:
        try:
            await self.reconcile()
        except (EngineError, GpujobsError) as error:
            logger.warning("the Engine's containers were not compared with the ledger: %s", error)
            self._miss()

    def _miss(self) -> None:
        """A container was not looked at. Were it not known, its GPUs would be given away: all are looked at again."""
        if not self._missed:
            self._missed = True
            self._service.spawn(self._catch_up(), "containers not looked at")

    async def _catch_up(self) -> None:
        await asyncio.sleep(AGAIN_SECONDS)
        self._missed = False  # what is missed from now on is looked at after this look
        await self._look_again()
        self._service.wake()

    async def reconcile(self, *, after_absence: bool = False) -> None:
        """Compare ledger and Engine and act on every difference, by the table of core.reconcile.

        Args:
            after_absence: The Engine was away while this server ran.
        """
        service = self._service
        # The ledger first: a container that is made meanwhile is not missed by who looks at the Engine later.
        rows = await service.store.read(lambda ledger: ledger.kept())
        seen = await service.engine.containers()
        recorded = [
            Recorded(
                job=JobId.of_key(row["number"], row["idx"]), attempt=row["attempt"], name=row["name"],
                nonce=row["nonce"], config=row["config"], state=row["state"], active=bool(row["active"]),
            )
            for row in rows
        ]  # fmt: skip
        by_job = {JobId.of_key(row["number"], row["idx"]): row for row in rows if row["active"]}
        kept = {(row["name"], row["nonce"]) for row in rows}
        active = {(row["name"], row["nonce"]) for row in rows if row["active"]}
        active |= {(attempt.name, attempt.nonce) for attempt in service.attempts.values()}  # decided meanwhile
        self.strange = {c.id: c for c in seen if _is_strange(c, active, kept)}
        by_id = {container.id: container for container in seen}
        for action in reconcile(service.id, recorded, seen):
            attempt = service.attempts.get(action.job) if isinstance(action, Adopt) else None
            if after_absence and attempt is not None and isinstance(action, Adopt):
                attempt.engine_was_away = by_id[action.container].state in ENDED
            await self._settle(action, by_job, by_id)

    async def _settle(self, action: Action, rows: dict[JobId, dict[str, Any]], seen: dict[str, Seen]) -> None:
        service = self._service
        if isinstance(action, Resume | Adopt | Lost) and action.job not in service.active:
            return  # it has ended since the ledger was read
        if isinstance(action, Resume | Adopt):
            row = dict(rows[action.job])
            if isinstance(action, Adopt):
                row["container"] = action.container
            elif row["container"] not in seen:
                row["container"] = None  # it was made and is gone, and its program never ran: another is made
            attempt = service.attempts.get(action.job) or service.begin_attempt(service.active[action.job], row)
            if isinstance(action, Adopt) and seen[action.container].state in ENDED:
                attempt.gone.set()
        elif isinstance(action, Lost):
            if (running := service.attempts.get(action.job)) is not None:
                running.gone.set()
            else:
                lost = Attempt(service, service.active[action.job], rows[action.job], None)
                service.attempts[action.job] = lost
                service.spawn(lost.lost(action.message), f"end of {lost.name}")
        elif isinstance(action, Forget):
            remove_control(service.paths.attempts / container_name(service.id, action.job, action.attempt))
            await service.store.change(lambda ledger: ledger.on_attempt("set_removed", action.job, action.attempt))
        elif isinstance(action, Kill) and action.container not in self._ending:
            self._ending.add(action.container)
            service.spawn(self._end_stray(action), f"end of {action.name}")

    async def _end_stray(self, action: Kill) -> None:
        """End a container that must not run; until it has ended, its GPUs count as taken."""
        while (known := self.strange.get(action.container)) is not None and known.state in RUNNING:
            logger.warning("container %s runs without a job: it is ended", action.name)
            try:
                await self._service.engine.kill(action.container, "SIGKILL")
            except (EngineError, GpujobsError) as error:
                logger.warning("container %s was not ended: %s", action.name, error)
            await asyncio.sleep(KILL_SECONDS)
        self._ending.discard(action.container)


def _is_strange(container: Seen, active: AbstractSet[tuple[str, str]], kept: AbstractSet[tuple[str, str]]) -> bool:
    """Whether a container is not for an attempt to look after: not ours, or of ours that runs and must not.

    What is ours is told by its name, which the Engine gives once, and by the ledger's secret: a label alone, or a
    name alone, can be anybody's.
    """
    key = (container.name, container.labels.get("gpujobs.nonce", ""))
    return key not in active and (key not in kept or container.state in RUNNING)
