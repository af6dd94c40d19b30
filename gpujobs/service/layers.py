"""Keeps what a job writes into its container within its limit: the disk that this is on is everybody's.

No event tells that a container writes, and the Engine walks through all that one has written to tell how much that
is. So only the disk's free space is looked at often, which costs nothing; containers are measured when it has shrunk
enough for one of them to be near the limit since it was measured last, or when that was long ago: what somebody else
deletes meanwhile hides what a job writes.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpujobs.core import job as jobs
from gpujobs.core.errors import GpujobsError
from gpujobs.core.fits import size
from gpujobs.core.job import JobId
from gpujobs.core.ports import EngineError

if TYPE_CHECKING:
    from gpujobs.service.loop import Service

logger = logging.getLogger("gpujobs")

LOOK_SECONDS = 5.0
"""Between looks at the free space while jobs run."""

MEASURE_SECONDS = 600.0
"""After which a container is measured whatever the free space says."""

NEAR = 0.25
"""The part of what a container may still write that the free space may shrink by before it is measured again."""

REASON = "quota"


@dataclass(frozen=True, slots=True)
class Measured:
    """A container's layer when it was last looked at: the time, its bytes, and the disk's free ones then."""

    at: float
    used: int
    free: int | None


def due(last: Measured | None, now: float, free: int | None, limit: int) -> bool:
    """Whether a container is to be measured now.

    Args:
        last: When it was measured last; None where it was not.
        now: Seconds.
        free: Bytes that are free now; None where that is not known.
        limit: Bytes that it may write.
    """
    if last is None or not 0 <= now - last.at < MEASURE_SECONDS:
        return True
    if free is None or last.free is None:
        return now - last.at >= 12 * LOOK_SECONDS
    return last.free - free >= max(0, limit - last.used) * NEAR


class Layers:
    """Measures the containers of running jobs, and ends those that have written too much.

    Args:
        service: The server.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._measured: dict[JobId, Measured] = {}

    async def run(self) -> None:
        """Look for ever."""
        while True:
            try:
                await self._look()
            except (EngineError, GpujobsError) as error:
                logger.warning("what containers have written was not looked at: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        service = self._service
        running = {
            job_id: attempt.container
            for job_id, attempt in service.attempts.items()
            if attempt.container is not None
            and isinstance(getattr(service.active.get(job_id), "state", None), jobs.Running)
        } if service.settings.layer_size else {}  # fmt: skip
        self._measured = {job_id: last for job_id, last in self._measured.items() if job_id in running}
        if not running:
            return
        limit, free = service.settings.layer_size, await service.engine.disk_free()
        for job_id, container in running.items():
            now = service.clock.now()
            if not due(self._measured.get(job_id), now, free, limit):
                continue
            used = await service.engine.layer_bytes(container)
            self._measured[job_id] = Measured(now, used, free)
            if used > limit:
                words = (
                    f"it wrote {size(used)} into its container's own file system; the limit (layer_size) is "
                    f"{size(limit)}. Write to a volume"
                )
                await service.stop(job_id, REASON, words)
