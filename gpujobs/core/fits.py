"""Whether one GPU fits one request: the filters of :mod:`gpujobs.core.place`, each with its reason."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from typing import Final

from gpujobs.core.inventory import Gpu, Health, Inventory, MigDevice, Process, is_stranger
from gpujobs.core.spec import GpuRequest
from gpujobs.core.topology import Topology

GIB: Final = 1 << 30
MIB: Final = 1 << 20
NOMINAL: Final = 1000**3 / 1024**3
"""The least part of an asked size that a card must report to count as having it; see :func:`holds_memory`."""

COMPARISONS: Final[Mapping[str, Callable[[tuple[int, int], tuple[int, int]], bool]]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
}


@dataclass(frozen=True, slots=True)
class Holding:
    """What a job has of one device.

    Attributes:
        job: Its id: ``12`` or ``12_3``.
        share: Bytes of the device's memory; None means all of it.
    """

    job: str
    share: int | None = None


Holdings = Mapping[str, tuple[Holding, ...]]
"""What is held, by the UUID of a GPU or of a MIG device. A holding of a GPU covers its MIG devices."""


@dataclass(frozen=True, slots=True)
class Occupation:
    """What cannot be given now.

    Attributes:
        held: What jobs hold.
        avoid: What is not to be used for another reason, by UUID (a GPU's covers its MIG devices): a word, a
            clause, or both with a colon (``reserved: for carol``). See :func:`strangers`.
    """

    held: Holdings = field(default_factory=dict)
    avoid: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Device:
    """One thing that can be given: a GPU, or a MIG device of one.

    Attributes:
        position: The GPU's place in :attr:`Inventory.gpus`.
        mig: The MIG device; None for the GPU itself.
    """

    position: int
    gpu: Gpu
    mig: MigDevice | None = None

    @property
    def uuid(self) -> str:
        """What the runtime takes."""
        return self.mig.uuid if self.mig else self.gpu.uuid

    @property
    def memory_bytes(self) -> int:
        """Its whole memory."""
        return self.mig.memory_bytes if self.mig else self.gpu.memory_bytes

    @property
    def processes(self) -> tuple[Process, ...]:
        """The processes on it."""
        return self.mig.processes if self.mig else self.gpu.processes

    @property
    def is_unknown(self) -> bool:
        """Whether it was lost before the first look, so that nothing is known of it."""
        return self.gpu.health is Health.LOST and self.gpu.uuid.startswith("lost-")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a device cannot be given.

    Attributes:
        word: Under which it is counted.
        clause: For people, about this device.
        phrase: For people, after a number: ``3 too small``.
        lasting: Whether it would be so also if everything were free and healthy.
    """

    word: str
    clause: str
    phrase: str
    lasting: bool = False


def devices(request: GpuRequest, inventory: Inventory) -> list[Device]:
    """Everything on the machine that the request could be about, in NVML's order.

    A GPU in MIG mode is itself replaced by its MIG devices where MIG devices are asked for.
    """
    wants_mig = request.mig is not None or any(uuid.startswith("MIG-") for uuid in request.uuid)
    found = []
    for position, gpu in enumerate(inventory.gpus):
        if wants_mig and gpu.mig:
            found += [Device(position, gpu, mig) for mig in gpu.mig]
        else:
            found.append(Device(position, gpu))
    return found


def judge(request: GpuRequest, device: Device, free: Occupation) -> Verdict | None:
    """Why a device cannot be given to a request now; None where it can."""
    lasting = None if device.is_unknown else _misfit(request, device)
    return lasting or _trouble(device, free) or _occupied(request, device, free)


def _misfit(request: GpuRequest, device: Device) -> Verdict | None:
    """What no waiting mends."""
    if request.uuid and device.uuid not in request.uuid:
        return Verdict("uuid", "not among the UUIDs asked for", "not asked for", lasting=True)
    if request.mig is not None and device.mig is None:
        why = "has no MIG devices" if device.gpu.mig_enabled else "not in MIG mode"
        return Verdict("mig", why, "without MIG devices", lasting=True)
    if request.mig is not None and device.mig and device.mig.profile.lower() != request.mig.lower():
        clause = f"{device.mig.profile}, {request.mig} asked"
        return Verdict("profile", clause, "of another profile", lasting=True)
    if device.mig is None and device.gpu.mig_enabled:
        return Verdict("mig", "in MIG mode: only its MIG devices are given", "in MIG mode", lasting=True)
    if request.model and not any(matches_model(name, device.gpu.model) for name in request.model):
        clause = f"{device.gpu.model}, {' or '.join(request.model)} asked"
        return Verdict("model", clause, "of another model", lasting=True)
    if request.memory is not None and not holds_memory(device.memory_bytes, request.memory):
        clause = f"{size(device.memory_bytes)}, {size(request.memory)} asked"
        return Verdict("memory", clause, "too small", lasting=True)
    if request.share is not None and request.share > sharable(device.gpu):
        clause = f"{size(sharable(device.gpu))} in all, {size(request.share)} asked"
        return Verdict("memory", clause, "too small", lasting=True)
    if request.capability is not None:
        sign, wanted = request.capability
        have = device.gpu.capability
        if have is None or not COMPARISONS[sign](have, wanted):
            shown = f"capability {have[0]}.{have[1]}" if have else "capability not known"
            clause = f"{shown}, {sign}{wanted[0]}.{wanted[1]} asked"
            return Verdict("capability", clause, "of another capability", lasting=True)
    return None


def _trouble(device: Device, free: Occupation) -> Verdict | None:
    """What keeps everybody away from it for now."""
    if device.gpu.health in (Health.LOST, Health.QUARANTINED):
        word = device.gpu.health.value
        clause = word if device.gpu.xid is None else f"{word} after XID {device.gpu.xid}"
        return Verdict(word, clause, word)
    why = free.avoid.get(device.uuid) or free.avoid.get(device.gpu.uuid)
    if not why:
        return None
    word, _, told = why.partition(":")
    if word != "stranger":
        if " " not in word:
            return Verdict(word, why, word)
        return Verdict("avoided", why, why)
    there = [process for process in device.processes if is_stranger(process)]
    clause = f"stranger: {_people(there)}" if there and not told else why
    return Verdict(word, clause, f"in use by {_name(there[0]) if there else 'a stranger'}")


def _occupied(request: GpuRequest, device: Device, free: Occupation) -> Verdict | None:
    """What others hold of it."""
    holds = holds_of(device, free)
    if not holds:
        if request.share is None or share_left(device, free) >= request.share:
            return None
        clause = f"{size(share_left(device, free))} left beside system processes, {size(request.share)} asked"
        return Verdict("full", clause, "without enough memory left")
    whole = next((hold for hold in holds if hold.share is None), None)
    if whole is not None:
        return Verdict("taken", f"taken by job {whole.job}", "taken")
    if request.share is None:
        return Verdict("taken", f"shared by job {' and '.join(hold.job for hold in holds)}", "taken")
    left = share_left(device, free)
    if left < request.share:
        clause = f"{size(left)} left, {size(request.share)} asked"
        return Verdict("full", clause, "without enough memory left")
    return None


def holds_of(device: Device, free: Occupation) -> tuple[Holding, ...]:
    """What is held of a device, whether named by its own UUID or, for a MIG device, by its GPU's."""
    own = free.held.get(device.uuid, ())
    return own if device.mig is None else (*own, *free.held.get(device.gpu.uuid, ()))


def is_whole(device: Device, free: Occupation) -> bool:
    """Whether a GPU is free as a whole: healthy, held by nobody, nobody's to avoid, not in MIG mode."""
    gpu = device.gpu
    return (
        gpu.health in (Health.OK, Health.SIMULATED)
        and not gpu.mig_enabled
        and not free.held.get(gpu.uuid)
        and not free.avoid.get(gpu.uuid)
    )


def sharable(gpu: Gpu) -> int:
    """Bytes of a GPU that shares can be made of: all but what the driver keeps for itself."""
    return gpu.memory_bytes - (gpu.memory_reserved_bytes or 0)


def share_left(device: Device, free: Occupation) -> int:
    """Bytes that can still be shared: less what is held, and less what system processes use."""
    system = sum(p.memory_bytes or 0 for p in device.processes if p.job is None and not is_stranger(p))
    held = sum(hold.share or 0 for hold in holds_of(device, free))
    return max(0, sharable(device.gpu) - system - held)


def links_allow(request: GpuRequest, machine: Topology, chosen: Sequence[Device]) -> bool:
    """Whether a set meets what is asked of its links."""
    if request.link == "same-numa":
        return len({device.gpu.numa for device in chosen}) <= 1
    if request.link == "nvlink":
        places = [device.position for device in chosen]
        return all(machine.nvlinked[a][b] for i, a in enumerate(places) for b in places[i + 1 :])
    return True


def holds_memory(reported: int, wanted: int) -> bool:
    """Whether a card that reports this many bytes has the memory that was asked for.

    People ask by the size a card is sold with, and a file's ``40GB`` means 40 GiB, as in Compose. Cards
    report a little less: the driver may keep a part, and ECC on cards with GDDR memory takes a sixteenth.
    Reported are 23,028 MiB by an A10 and 23,034 MiB by an L4 (both sold as 24 GB), 15,360 MiB by a T4 (16
    GB), 46,068 MiB by an L40S (48 GB), 81,559 MiB by an H100 (80 GB)
    (https://github.com/modal-labs/modal-client/pull/2797). All of these hold the size in decimal gigabytes,
    so that is what a card must report: 93.1 % of the GiB.
    """
    return reported >= wanted * NOMINAL


def matches_model(wanted: str, model: str) -> bool:
    """Whether a name or glob, in any case, is the model's name or whole words of it.

    ``A100`` and ``a100-sxm4-*`` match ``NVIDIA A100-SXM4-40GB``; ``A10`` does not.
    """
    return _model_pattern(wanted.lower()).search(model.lower()) is not None


@lru_cache(maxsize=256)
def _model_pattern(wanted: str) -> re.Pattern[str]:
    body = re.sub(r"\\[Zz]$", "", translate(wanted))
    return re.compile(rf"(?<![a-z0-9]){body}(?![a-z0-9])")


def strangers(inventory: Inventory) -> dict[str, str]:
    """The devices that other people's processes use, for :func:`gpujobs.core.place.place`.

    Returns:
        For each such GPU or MIG device ``stranger: python of alice (pid 77)``. Jobs' processes, graphics and
        system services (:data:`gpujobs.core.inventory.SYSTEM_COMMANDS`) are none.
    """
    found = {}
    for gpu in inventory.gpus:
        holders: list[tuple[str, Iterable[Process]]] = [(gpu.uuid, gpu.processes)]
        if gpu.mig_enabled and gpu.mig:
            holders = [(mig.uuid, mig.processes) for mig in gpu.mig]
        for uuid, processes in holders:
            there = [process for process in processes if is_stranger(process)]
            if there:
                found[uuid] = f"stranger: {_people(there)}"
    return found


def _people(processes: Sequence[Process]) -> str:
    first = f"{_name(processes[0])} (pid {processes[0].pid})"
    return first if len(processes) == 1 else f"{first} and {len(processes) - 1} more"


def _name(process: Process) -> str:
    command = process.name.rsplit("/", 1)[-1] or "a process"
    return f"{command} of {process.user}" if process.user else command


def asked(request: GpuRequest) -> str:
    """What a request asks, as the start of a sentence: ``2 GPUs asked``, ``a share of 10 GiB asked``."""
    low, high = max(request.count, 1), max(request.max_count, request.count, 1)
    number = str(low) if low == high else f"{low}-{high}"
    many = high > 1
    if request.share is not None:
        amount = size(request.share)
        return f"{number} shares of {amount} asked" if many else f"a share of {amount} asked"
    if request.mig is not None:
        return f"{number} MIG device{'s' * many} {request.mig} asked"
    return f"{number} GPU{'s' * many} asked"


def size(amount: int) -> str:
    """Bytes for people: ``40 GiB``, ``22.5 GiB``, ``512 MiB``."""
    if abs(amount) >= GIB:
        return f"{amount / GIB:.1f}".removesuffix(".0") + " GiB"
    return f"{amount / MIB:.0f} MiB"
