"""The host's GPUs by NVIDIA's own library, NVML.

A metric that is not there is a gap; a GPU that fell off the bus is listed as lost, as what it was, and the
rest stands; a driver that went away is looked for again (the library is shut down and started: handles of
before are dead, indexes may have moved).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import pynvml

from gpujobs.adapters import nvlinks, procfs
from gpujobs.adapters.nvmlfirst import first_processes
from gpujobs.adapters.nvmlsession import Answer, Away, Handle, Lost, Session
from gpujobs.core.inventory import Gpu, Health, Inventory, MigDevice, Process, XidEvent

Locate = Callable[[str], str | None]
"""From the full id of a container to the id of the job that runs in it; None for a container of others."""

NO_INSTANCE: Final = 0xFFFFFFFF
CPU_WORDS: Final = 64
"""64-bit words asked for in an affinity mask: 4,096 CPUs."""
NODE_WORDS: Final = 16
LISTS: Final = (
    ("compute", "nvmlDeviceGetComputeRunningProcesses"),
    ("mps", "nvmlDeviceGetMPSComputeRunningProcesses"),
    ("graphics", "nvmlDeviceGetGraphicsRunningProcesses"),
)
"""NVML's lists of processes. One that is on several counts as what comes first here."""


@dataclass(frozen=True, slots=True)
class _Static:
    """What does not change while a driver is loaded."""

    model: str
    minor: int | None
    capability: tuple[int, int] | None
    pci: str | None
    numa: int | None
    cpus: tuple[int, ...]
    serial: str | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of NVML's process lists."""

    pid: int
    kind: str
    memory_bytes: int | None
    instance: tuple[int, int] | None


class Nvml:
    """The real GPUs. To be used from one thread.

    Args:
        locate: Says which job a container belongs to, where a snapshot does not bring its own.
        clock: Seconds since the epoch.
    """

    def __init__(self, locate: Locate | None = None, clock: Callable[[], float] = time.time) -> None:
        self._locate: Locate = locate or _nobody
        self._clock = clock
        self._nvml = Session()
        self._generation = 0
        self._static: dict[str, _Static] = {}
        self._system: tuple[str | None, tuple[int, int] | None] = (None, None)
        self._seen: dict[int, Gpu] = {}
        self._xids: dict[str, int] = {}
        self._links = nvlinks.Links()
        self._linked: frozenset[str] | None = None
        self._events: Handle = None
        self._watched: dict[int, str] = {}

    def snapshot(self, locate: Locate | None = None) -> Inventory:
        """The GPUs as they are now; with a ``problem`` and without GPUs where NVML does not answer.

        A driver that went away is looked for again at each call.

        Args:
            locate: Says which job a container belongs to, in place of the one given at the start.
        """
        try:
            was_up = self._nvml.up
            self._start()
            try:
                return self._take(locate or self._locate)
            except Away:
                if not was_up:
                    raise
            self._stop()
            self._start()
            return self._take(locate or self._locate)
        except Away as away:
            self._stop()
            return Inventory(problem=away.problem, taken_at=self._clock())

    def wait_event(self, timeout_s: float) -> XidEvent | None:
        """Wait for an XID error on any GPU.

        Returns:
            None when none came in time, or when something else calls for a look at the GPUs (one was lost,
            the driver went away): then after a second at most, never at once.
        """
        end = time.monotonic() + timeout_s
        try:
            self._start()
            self._watch()
            if self._events is None:  # a driver without events, as that of a virtual GPU
                time.sleep(timeout_s)
                return None
            data = self._nvml.query("nvmlEventSetWait_v2", self._events, max(0, int(timeout_s * 1000)))
        except Lost:
            # The set answers so at once as long as the lost GPU is in it: the next wait makes another.
            self._forget_events()
            time.sleep(max(0.0, min(1.0, end - time.monotonic())))
            return None
        except Away:
            self._stop()
            time.sleep(max(0.0, min(1.0, end - time.monotonic())))
            return None
        if data is None or data.eventType != pynvml.nvmlEventTypeXidCriticalError:
            return None
        # By the handle: a GPU that fell off the bus, which is an XID too, no longer tells its UUID.
        uuid = self._watched.get(_address(data.device))
        if uuid is None:
            return None
        self._xids[uuid] = int(data.eventData)
        return XidEvent(uuid, int(data.eventData))

    def close(self) -> None:
        """Let go of the driver; a later snapshot starts anew."""
        self._stop()

    def _start(self) -> None:
        self._nvml.start()
        if self._generation == self._nvml.generation:
            return
        self._generation = self._nvml.generation
        self._static.clear()
        self._linked = None
        self._forget_events()
        cuda = self._nvml.query("nvmlSystemGetCudaDriverVersion_v2")
        driver = self._nvml.query("nvmlSystemGetDriverVersion")
        self._system = (driver, (cuda // 1000, cuda % 1000 // 10) if cuda else None)

    def _stop(self) -> None:
        self._forget_events()
        self._nvml.stop()

    def _take(self, locate: Locate) -> Inventory:
        count = self._nvml.query("nvmlDeviceGetCount")
        if count is None:
            raise Away(pynvml.NVML_ERROR_UNKNOWN)
        handles: dict[str, Handle] = {}
        gpus: dict[int, Gpu] = {}
        for index in range(count):
            with contextlib.suppress(Lost):
                handle = self._nvml.must("nvmlDeviceGetHandleByIndex", index)
                gpu = self._gpu(index, handle, locate)
                gpus[index] = gpu
                handles[gpu.uuid] = handle
        if count and not gpus and not self._nvml.fresh:
            # All of them at once: rather another driver than as many broken cards.
            raise Away(pynvml.NVML_ERROR_GPU_IS_LOST)
        listed = tuple(gpus.get(index) or self._lost(index, handles) for index in range(count))
        self._seen = dict(enumerate(listed))
        self._relate(handles)
        driver, cuda = self._system
        return Inventory(
            gpus=listed,
            links=self._links.best,
            nvlinks=self._links.nvlinks,
            pcie=self._links.pcie,
            driver=driver,
            cuda=cuda,
            taken_at=self._clock(),
        )

    def _lost(self, index: int, handles: Mapping[str, Handle]) -> Gpu:
        """The GPU at an index that does not answer: what it was, where that is known."""
        known = self._seen.get(index)
        if known is None or known.uuid in handles:  # indexes moved: it is not the one that was here
            return Gpu(
                uuid=f"lost-{index}", index=index, minor=None, model="", memory_bytes=0, health=Health.LOST
            )
        return replace(
            known,
            health=Health.LOST,
            memory_used_bytes=None,
            utilisation_percent=None,
            memory_utilisation_percent=None,
            temperature_c=None,
            power_w=None,
            power_limit_w=None,
            energy_joules=None,
            ecc_corrected=None,
            ecc_uncorrected=None,
            xid=self._xids.get(known.uuid),
            mig=tuple(replace(mig, memory_used_bytes=None, processes=()) for mig in known.mig),
            processes=(),
        )

    def _gpu(self, index: int, handle: Handle, locate: Locate) -> Gpu:
        uuid = str(self._nvml.must("nvmlDeviceGetUUID", handle))
        static = self._static.get(uuid)
        if static is None:
            static = self._static[uuid] = self._describe(handle)
        total, reserved, used = self._memory(handle)
        rates = self._nvml.query("nvmlDeviceGetUtilizationRates", handle)
        power = self._nvml.query("nvmlDeviceGetPowerUsage", handle)
        limit = self._nvml.query("nvmlDeviceGetEnforcedPowerLimit", handle)
        energy = self._nvml.query("nvmlDeviceGetTotalEnergyConsumption", handle)
        mig_enabled = self._nvml.query("nvmlDeviceGetMigMode", handle, default=(0, 0))[0] == 1
        entries = self._entries(handle)
        mig: tuple[MigDevice, ...] = ()
        if mig_enabled:
            mig = self._mig_devices(handle, entries, locate)
            placed = {(device.gpu_instance, device.compute_instance) for device in mig}
            entries = [entry for entry in entries if entry.instance not in placed]
        return Gpu(
            uuid=uuid,
            index=index,
            minor=static.minor,
            model=static.model,
            memory_bytes=total,
            capability=static.capability,
            memory_used_bytes=used,
            memory_reserved_bytes=reserved,
            utilisation_percent=None if rates is None else int(rates.gpu),
            memory_utilisation_percent=None if rates is None else int(rates.memory),
            temperature_c=self._temperature(handle),
            power_w=None if power is None else power / 1000,
            power_limit_w=None if limit is None else limit / 1000,
            energy_joules=None if energy is None else energy / 1000,
            pci=static.pci,
            numa=static.numa,
            cpus=static.cpus,
            serial=static.serial,
            ecc_corrected=self._ecc(handle, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ecc_uncorrected=self._ecc(handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            xid=self._xids.get(uuid),
            mig_enabled=mig_enabled,
            mig=mig,
            processes=self._processes(entries, locate),
        )

    def _describe(self, handle: Handle) -> _Static:
        pci = self._nvml.query("nvmlDeviceGetPciInfo_v3", handle)
        capability = self._nvml.query("nvmlDeviceGetCudaComputeCapability", handle)
        nodes = self._nvml.query(
            "nvmlDeviceGetMemoryAffinity", handle, NODE_WORDS, pynvml.NVML_AFFINITY_SCOPE_NODE, default=()
        )
        cpus = self._nvml.query("nvmlDeviceGetCpuAffinity", handle, CPU_WORDS, default=())
        return _Static(
            model=str(self._nvml.query("nvmlDeviceGetName", handle, default="")),
            minor=self._nvml.query("nvmlDeviceGetMinorNumber", handle),
            capability=None if capability is None else (int(capability[0]), int(capability[1])),
            pci=None if pci is None else nvlinks.bus_id(pci),
            numa=next(iter(_bits(nodes)), None),
            cpus=_bits(cpus),
            serial=self._nvml.query("nvmlDeviceGetSerial", handle),
        )

    def _memory(self, handle: Handle, *, odd: bool = False) -> tuple[int, int | None, int | None]:
        """Total, reserved and used bytes; the older call counts what is reserved as used."""
        memory = self._nvml.query("nvmlDeviceGetMemoryInfo", handle, pynvml.nvmlMemory_v2, odd=odd)
        if memory is not None:
            return int(memory.total), int(memory.reserved), int(memory.used)
        memory = self._nvml.query("nvmlDeviceGetMemoryInfo", handle, odd=odd)
        return (0, None, None) if memory is None else (int(memory.total), None, int(memory.used))

    def _temperature(self, handle: Handle) -> int | None:
        for function in ("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV"):
            degrees = self._nvml.query(function, handle, pynvml.NVML_TEMPERATURE_GPU)
            if degrees is not None:
                return int(degrees)
        return None

    def _ecc(self, handle: Handle, kind: int) -> int | None:
        count = self._nvml.query("nvmlDeviceGetTotalEccErrors", handle, kind, pynvml.NVML_VOLATILE_ECC)
        return None if count is None else int(count)

    def _mig_devices(self, gpu: Handle, entries: list[_Entry], locate: Locate) -> tuple[MigDevice, ...]:
        """The MIG devices of a GPU. One may be destroyed while it is asked: nothing of it is vital."""
        found = []
        for slot in range(self._nvml.query("nvmlDeviceGetMaxMigDeviceCount", gpu, default=0)):
            handle = self._nvml.query("nvmlDeviceGetMigDeviceHandleByIndex", gpu, slot, odd=True)
            if handle is None:
                continue
            uuid = self._nvml.query("nvmlDeviceGetUUID", handle, odd=True)
            instance = (
                self._nvml.query("nvmlDeviceGetGpuInstanceId", handle, odd=True),
                self._nvml.query("nvmlDeviceGetComputeInstanceId", handle, odd=True),
            )
            if uuid is None or None in instance:
                continue
            total, _, used = self._memory(handle, odd=True)
            own = [entry for entry in entries if entry.instance == instance] + self._entries(handle, odd=True)
            found.append(
                MigDevice(
                    uuid=str(uuid),
                    profile=self._profile(handle),
                    gpu_instance=instance[0],
                    compute_instance=instance[1],
                    memory_bytes=total,
                    memory_used_bytes=used,
                    processes=self._processes(own, locate),
                )
            )
        return tuple(found)

    def _profile(self, handle: Handle) -> str:
        """A MIG device's profile: the end of its name, or put together from its parts."""
        name = str(self._nvml.query("nvmlDeviceGetName", handle, default="", odd=True))
        if match := re.search(r"\bMIG (\d\S*)$", name):
            return match[1]
        parts = self._nvml.query("nvmlDeviceGetAttributes_v2", handle, odd=True)
        if parts is None:
            return ""
        slices, own = parts.gpuInstanceSliceCount, parts.computeInstanceSliceCount
        prefix = f"{own}c." if own != slices else ""
        return f"{prefix}{slices}g.{math.ceil(parts.memorySizeMB / 1024)}gb"

    def _entries(self, handle: Handle, *, odd: bool = False) -> list[_Entry]:
        found = []
        for kind, function in LISTS:
            for line in self._lines(function, handle, odd=odd):
                instance = (int(line.gpuInstanceId), int(line.computeInstanceId))
                found.append(
                    _Entry(
                        pid=int(line.pid),
                        kind=kind,
                        memory_bytes=None if line.usedGpuMemory is None else int(line.usedGpuMemory),
                        instance=None if NO_INSTANCE in instance else instance,
                    )
                )
        return found

    def _lines(self, function: str, handle: Handle, *, odd: bool) -> Sequence[Answer]:
        """What a process list says, by the newest of its calls that the driver has.

        Drivers before 510 lack the third and those before 460 the second; without them strangers would not be seen.
        """
        for name in (f"{function}_v3", f"{function}_v2"):
            if (lines := self._nvml.query(name, handle, odd=odd)) is not None:
                return tuple(lines)
        return tuple(self._nvml.query(first_processes, function, handle, default=(), odd=odd))

    def _processes(self, entries: list[_Entry], locate: Locate) -> tuple[Process, ...]:
        """The processes of some entries, each once, by pid."""
        merged: dict[int, _Entry] = {}
        for entry in entries:
            other = merged.setdefault(entry.pid, entry)
            sizes = [size for size in (entry.memory_bytes, other.memory_bytes) if size is not None]
            merged[entry.pid] = replace(other, memory_bytes=max(sizes, default=None))
        return tuple(self._process(merged[pid], locate) for pid in sorted(merged))

    def _process(self, entry: _Entry, locate: Locate) -> Process:
        facts = procfs.facts(entry.pid)
        name = self._nvml.query("nvmlSystemGetProcessName", entry.pid, odd=True) or facts.name
        container, job = next(iter(facts.containers), None), None
        # Within containers in containers, the one that is known here is the one that counts.
        for each in facts.containers:
            if (job := locate(each)) is not None:
                container = each
                break
        return Process(
            pid=entry.pid,
            kind=entry.kind,
            name=str(name),
            uid=facts.uid,
            user=facts.user,
            memory_bytes=entry.memory_bytes,
            container=container,
            job=job,
        )

    def _relate(self, handles: Mapping[str, Handle]) -> None:
        """Read the links anew where other GPUs are there than the last time."""
        if self._linked == frozenset(handles):
            return
        # A link to a GPU that is lost now is known by the address that it had.
        addresses = {gpu.pci: gpu.uuid for gpu in self._seen.values() if gpu.pci is not None}
        with contextlib.suppress(Lost):  # lost between two questions: the next snapshot sees it
            self._links = nvlinks.read(self._nvml.query, handles, addresses, self._links)
            self._linked = frozenset(handles)

    def _watch(self) -> None:
        """Have all GPUs that are there in the set of events."""
        if self._events is None:
            self._events = self._nvml.query("nvmlEventSetCreate")
        if self._events is None:
            return
        kind = pynvml.nvmlEventTypeXidCriticalError
        for index in range(self._nvml.query("nvmlDeviceGetCount", default=0)):
            with contextlib.suppress(Lost):
                handle = self._nvml.must("nvmlDeviceGetHandleByIndex", index)
                if _address(handle) not in self._watched:
                    uuid = self._nvml.must("nvmlDeviceGetUUID", handle)
                    self._nvml.query("nvmlDeviceRegisterEvents", handle, kind, self._events)
                    self._watched[_address(handle)] = uuid

    def _forget_events(self) -> None:
        if self._events is not None:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(self._events)
        self._events = None
        self._watched.clear()


def _bits(words: Iterable[int]) -> tuple[int, ...]:
    """The numbers of the bits that are set in an array of 64-bit words."""
    return tuple(64 * place + bit for place, word in enumerate(words) for bit in range(64) if word >> bit & 1)


def _address(handle: Handle) -> int:
    """A handle as a number: NVML gives the same one for a device as long as it is started."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _nobody(_container: str) -> str | None:
    return None
