"""Tidying up: ended containers when they have been kept long enough, and pins that nobody uses."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from gpujobs.core.container import checkpoints, home_of
from gpujobs.core.errors import GpujobsError
from gpujobs.core.job import JobId, Owner
from gpujobs.core.ports import EngineError
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

    async def run(self) -> None:
        """Remove ended containers when they have been kept long enough, for ever."""
        service = self._service
        while True:
            now, keep = service.clock.now(), service.settings.keep_ended
            before = now - keep
            for row in await service.store.read(lambda ledger, before=before: ledger.expired(before)):  # type: ignore[misc]
                await self._remove(row)
            oldest = await service.store.read(lambda ledger: ledger.next_expiry())
            due = keep if oldest is None else max(1.0, oldest + keep - now)
            await asyncio.sleep(min(due, LONGEST_SLEEP) if keep else 1.0)

    async def _remove(self, row: dict[str, Any]) -> None:
        service = self._service
        job_id = JobId.of_key(row["number"], row["idx"])
        try:
            if row["container"] is not None:
                await service.engine.remove(row["container"])
            fault("container-removed")
            remove_control(service.paths.attempts / row["name"])
            await service.store.change(lambda ledger: ledger.on_attempt("set_removed", job_id, row["attempt"]))
        except (EngineError, GpujobsError) as error:
            logger.warning("container %s was not removed: %s", row["name"], error)
            return
        if row["container"] is not None:
            service.by_container.pop(row["container"], None)

    async def attempt_gone(self, name: str, owner: Owner, job: JobId) -> None:
        """An attempt's container has ended: its pins go, and its checkpoint directory if nothing is in it."""
        mounts = self._service.mounts
        try:
            await mounts.remove_empty(owner, f"{home_of(owner)}/{checkpoints(self._service.id, job)}")
        except GpujobsError as error:
            logger.info("the checkpoint directory of job %s stays: %s", job, error)
        for pin in mounts.list():
            if pin.startswith(f"{name}-"):
                await mounts.unpin(pin)

    async def drop_pins(self) -> None:
        """Remove the pins that a former run of this server left of attempts that have ended."""
        service = self._service
        kept = tuple(f"{attempt.name}-" for attempt in service.attempts.values())
        for pin in service.mounts.list():
            if pin.startswith(f"gpujobs-{service.id}-") and not pin.startswith(kept):
                try:
                    await service.mounts.unpin(pin)
                except GpujobsError as error:  # a silent file server must not keep the server from starting
                    logger.warning("the pin %s stays: %s", pin, error)
