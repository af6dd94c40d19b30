"""Tidying up: ended containers when they have been kept long enough, and pins that nobody uses."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from gpujobs.core.container import checkpoints, home_of
from gpujobs.core.errors import GpujobsError
from gpujobs.core.job import JobId, Owner
from gpujobs.core.ports import EngineError, Gone
from gpujobs.service.attempts import remove_control
from gpujobs.service.faults import fault

if TYPE_CHECKING:
    from gpujobs.service.loop import Service

logger = logging.getLogger("gpujobs")

LONGEST_SLEEP = 3600.0


class Tidy:
    """Removes what is no longer needed."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._changed = asyncio.Event()

    def ended(self) -> None:
        """An attempt is over and its log is stored: its container may be the next to go."""
        self._changed.set()

    def settings_changed(self) -> None:
        """Containers may have to go earlier, or later."""
        self._changed.set()

    async def run(self) -> None:
        """Remove ended containers when they have been kept long enough, for ever."""
        service = self._service
        while True:
            self._changed.clear()
            now, keep = service.clock.now(), service.settings.keep_ended
            before = now - keep
            for row in await service.store.read(lambda ledger, before=before: ledger.expired(before)):  # type: ignore[misc]
                await self._remove(row)
            await self.drop_pins()
            oldest = await service.store.read(lambda ledger: ledger.next_expiry())
            due = LONGEST_SLEEP if oldest is None else max(1.0, oldest + keep - now)
            try:
                async with asyncio.timeout(min(due, LONGEST_SLEEP)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _remove(self, row: dict[str, Any]) -> None:
        service = self._service
        job_id = JobId.of_key(row["number"], row["idx"])
        try:
            if (container := row["container"] or await self._unrecorded(row)) is not None:
                await service.engine.remove(container)
            fault("container-removed")
            remove_control(service.paths.attempts / row["name"])
            await service.store.change(lambda ledger: ledger.on_attempt("set_removed", job_id, row["attempt"]))
        except (EngineError, GpujobsError) as error:
            logger.warning("container %s was not removed: %s", row["name"], error)
            return
        if row["container"] is not None:
            service.by_container.pop(row["container"], None)

    async def _unrecorded(self, row: dict[str, Any]) -> str | None:
        """The container of an attempt whose making was never answered; None where there is none."""
        try:
            seen = await self._service.engine.seen(row["name"])
        except Gone:
            return None
        return seen.id if seen.labels.get("gpujobs.nonce") == row["nonce"] else None

    async def attempt_gone(self, name: str, owner: Owner, job: JobId) -> None:
        """An attempt's container has ended: its pins go, and its checkpoint directory if nothing is in it."""
        mounts = self._service.mounts
        try:
            await mounts.remove_empty(owner, f"{home_of(owner)}/{checkpoints(self._service.id, job)}")
        except GpujobsError as error:
            logger.info("the checkpoint directory of job %s stays: %s", job, error)
        for pin in mounts.list():
            if pin.startswith(f"{name}-"):
                await self._unpin(pin)

    async def _unpin(self, pin: str) -> None:
        try:
            await self._service.mounts.unpin(pin)
        except GpujobsError as error:  # a silent file server: it is tried again when next there is tidying up
            logger.warning("the pin %s stays for now: %s", pin, error)

    async def drop_pins(self) -> None:
        """Remove the pins of attempts that have ended: of a former run of this server, or stuck before."""
        service = self._service
        kept = tuple(f"{attempt.name}-" for attempt in service.attempts.values())
        for pin in service.mounts.list():
            if pin.startswith(f"gpujobs-{service.id}-") and not pin.startswith(kept):
                await self._unpin(pin)
