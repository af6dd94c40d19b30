"""The GPUs as the server last saw them, looked at in a thread of their own: a driver can hang."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from gpujobs.core.container import cpus_near
from gpujobs.core.inventory import Health, Inventory
from gpujobs.core.job import Allocation
from gpujobs.core.place import strangers
from gpujobs.core.ports import GpuSource
from gpujobs.core.queue import ActiveJob, Key

logger = logging.getLogger("gpujobs")

XID_EVENTS = 64
"""XID errors taken note of before each look at the GPUs."""

NVML_SECONDS = 15.0
FRESH_SECONDS = 1.0


class GpuWatch:
    """The last inventory, and how to get a newer one.

    Args:
        source: NVML, or a simulated machine.
        locate: The job that a container belongs to.
    """

    def __init__(self, source: GpuSource, locate: Callable[[str], str | None]) -> None:
        self.inventory = Inventory(problem="the GPUs have not been looked at yet")
        self._source = source
        self._locate = locate
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nvml")
        self._looked_at = float("-inf")

    async def look(self, *, force: bool = False) -> Inventory:
        """The GPUs; looked at again where the last look is older than a second, or ``force``."""
        loop = asyncio.get_running_loop()
        if not force and loop.time() - self._looked_at < FRESH_SECONDS:
            return self.inventory
        try:
            async with asyncio.timeout(NVML_SECONDS):
                self.inventory = await loop.run_in_executor(self._thread, self._snapshot)
        except TimeoutError:
            self.inventory = replace(self.inventory, gpus=(), problem=f"NVML did not answer in {NVML_SECONDS:g} s")
        self._looked_at = loop.time()
        return self.inventory

    def _snapshot(self) -> Inventory:
        for _ in range(XID_EVENTS):
            if (event := self._source.wait_event(0)) is None:
                break
            logger.warning("GPU %s: XID %d", event.uuid, event.xid)
        return self._source.snapshot(self._locate)

    async def close(self) -> None:
        """Let go of the driver."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._source.close)
        self._thread.shutdown()

    @property
    def ailing(self) -> bool:
        """Whether the driver is away, or a GPU is not in a state to be given: no event tells when that ends."""
        usable = (Health.OK, Health.SIMULATED)
        return bool(self.inventory.problem) or any(gpu.health not in usable for gpu in self.inventory.gpus)

    def minors(self) -> dict[str, int]:
        """The device file's number of every GPU, and of every MIG device's GPU, by UUID."""
        numbers = {}
        for gpu in self.inventory.gpus:
            number = gpu.index if gpu.minor is None else gpu.minor
            numbers[gpu.uuid] = number
            numbers.update({mig.uuid: number for mig in gpu.mig})
        return numbers

    def near(self, allocation: Allocation, host_cpus: int) -> tuple[int, ...]:
        """The CPUs near an allocation's GPUs."""
        gpus = [gpu for uuid in allocation.gpus if (gpu := self.inventory.by_uuid(uuid)) is not None]
        return cpus_near(gpus, allocation.cpus, host_cpus)

    def occupied(self, active: Mapping[Key, ActiveJob]) -> dict[str, str]:
        """GPUs that processes keep from us, by UUID, with the clause that says whose.

        These are other people's processes, and those of a job that does not hold the GPU any more: it passes on
        when they are gone. No event tells when that is.
        """
        found = dict(strangers(self.inventory))
        held = {str(job.id): set(job.allocation.gpus) for job in active.values()}
        for gpu in self.inventory.gpus:
            for uuid, processes in ((gpu.uuid, gpu.processes), *((mig.uuid, mig.processes) for mig in gpu.mig)):
                for process in processes:
                    if process.job is not None and uuid not in held.get(process.job, ()):
                        found[uuid] = f"a process of job {process.job} is still on it (pid {process.pid})"
        return found
