"""One snapshot of a host's GPUs: what they are, how they are linked, how they are, who is on them.

Units: memory and transfer sizes in bytes, power in watts, energy in joules, temperature in degrees Celsius,
utilisation in percent (0-100). ``None`` is a gap: the device or its driver does not support the metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum


class Health(StrEnum):
    """Whether a GPU can be given to a job."""

    OK = "ok"
    LOST = "lost"
    QUARANTINED = "quarantined"
    SIMULATED = "simulated"


class Link(IntEnum):
    """How two GPUs reach each other, the better the higher; the order of ``nvidia-smi topo -m``.

    NVLink ranks above every PCIe path, more links (``NV1`` … ``NV18``) above fewer: that number is in
    :attr:`Inventory.nvlinks`, since a class of its own for each would hide that they are the same thing.
    """

    SYSTEM = 0  # SYS: across sockets
    NODE = 1  # NODE: across host bridges within one NUMA node
    HOST_BRIDGE = 2  # PHB: one host bridge
    MULTI_SWITCH = 3  # PXB: several PCIe switches
    SINGLE_SWITCH = 4  # PIX: one PCIe switch
    BOARD = 5  # PSB/internal: two GPUs on one board
    NVLINK = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process that holds memory on a GPU.

    Attributes:
        pid: The host's process id.
        kind: ``compute``, ``graphics`` or ``mps``.
        name: The command; empty where it is not known.
        uid: The owner's uid on the host; None where the process could not be looked up.
        user: The owner's name.
        memory_bytes: Its memory on the device.
        container: The Engine's full container id it runs in.
        job: The job it belongs to (``12`` or ``12_3``), of this server.
    """

    pid: int
    kind: str = "compute"
    name: str = ""
    uid: int | None = None
    user: str | None = None
    memory_bytes: int | None = None
    container: str | None = None
    job: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MigDevice:
    """One MIG device of a GPU (a GPU instance's compute instance).

    Attributes:
        uuid: ``MIG-…``, what the runtime takes.
        profile: NVIDIA's name, such as ``3g.20gb``.
        gpu_instance: The GPU instance's id.
        compute_instance: The compute instance's id.
    """

    uuid: str
    profile: str
    gpu_instance: int
    compute_instance: int
    memory_bytes: int
    memory_used_bytes: int | None = None
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One physical GPU.

    Attributes:
        uuid: ``GPU-…``; for a GPU lost since before the first look, ``lost-<index>``.
        index: NVML's index. It moves when a card is lost or the host reboots: for people only.
        minor: The device file's number: ``/dev/nvidia<minor>``.
        capability: CUDA compute capability, such as (8, 0).
        memory_reserved_bytes: What the driver and firmware keep for themselves (memory info v2).
        mig_enabled: In MIG mode: the whole GPU cannot be given, only its :attr:`mig` devices.
        serial: The board's serial number.
        energy_joules: Since the driver was loaded.
        ecc_uncorrected: Uncorrected ECC errors since the driver was loaded.
        cpus: The host CPUs near it, as numbers; empty where not known.
        xid: The last XID error seen on it since the server started.
    """

    uuid: str
    index: int
    minor: int | None
    model: str
    memory_bytes: int
    health: Health = Health.OK
    capability: tuple[int, int] | None = None
    memory_used_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    utilisation_percent: int | None = None
    memory_utilisation_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_joules: float | None = None
    pci: str | None = None
    numa: int | None = None
    cpus: tuple[int, ...] = ()
    serial: str | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    xid: int | None = None
    mig_enabled: bool = False
    mig: tuple[MigDevice, ...] = ()
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The host's GPUs at one moment.

    Attributes:
        gpus: In NVML's order, lost ones too.
        links: For each unordered pair of UUIDs (the smaller first) the best path between them.
        nvlinks: For each such pair the number of active NVLinks; absent means none.
        pcie: For each such pair the path over PCIe, also where NVLinks go round it; absent means as in links.
        driver: The driver's version; None without a driver.
        cuda: The newest CUDA version that the driver supports, such as (12, 4).
        simulated: Only under ``serve --simulate``.
        problem: Why there are no GPUs here, as a sentence; empty where NVML answered.
        taken_at: Seconds since the epoch.
    """

    gpus: tuple[Gpu, ...] = ()
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    nvlinks: Mapping[tuple[str, str], int] = field(default_factory=dict)
    pcie: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    simulated: bool = False
    problem: str = ""
    taken_at: float = 0.0

    def by_uuid(self, uuid: str) -> Gpu | None:
        """The GPU of that UUID, or the one that holds the MIG device of that UUID."""
        for gpu in self.gpus:
            if gpu.uuid == uuid or any(mig.uuid == uuid for mig in gpu.mig):
                return gpu
        return None

    def link(self, a: str, b: str) -> Link:
        """The best path between two GPUs; the farthest where it is not known."""
        return self.links.get(pair(a, b), Link.SYSTEM)

    def nvlink_count(self, a: str, b: str) -> int:
        """How many NVLinks join two GPUs."""
        return self.nvlinks.get(pair(a, b), 0)

    def pcie_path(self, a: str, b: str) -> Link | None:
        """The path between two GPUs over PCIe; None where only an NVLink is known."""
        key = pair(a, b)
        path = self.pcie.get(key, self.links.get(key))
        return None if path is Link.NVLINK else path


def pair(a: str, b: str) -> tuple[str, str]:
    """The key of an unordered pair of UUIDs: the smaller one first."""
    return (a, b) if a < b else (b, a)


SYSTEM_COMMANDS = frozenset(
    {"Xorg", "Xwayland", "gnome-shell", "nv-hostengine", "dcgm", "dcgm-exporter", "nvidia-persistenced",
     "nvidia-smi", "nvsm_core", "nvidia-cuda-mps-server", "nvidia-cuda-mps-control"}
)  # fmt: skip
"""Commands that sit on GPUs of any machine: they use memory, they do not take the GPU."""


def is_stranger(process: Process) -> bool:
    """Whether a process takes the GPU from us: a compute process that is no job's and no system service's."""
    if process.job is not None or process.kind == "graphics":
        return False
    return process.name.rsplit("/", 1)[-1] not in SYSTEM_COMMANDS


APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68})
"""XID errors that a program causes by itself (a bad address, a killed process): the card is not to blame.

NVIDIA's "XID Errors" catalogue: 13 graphics engine exception, 31 memory page fault, 43 reset channel
verification error, 45 preemptive channel removal, 68 video processor exception.
"""


@dataclass(frozen=True, slots=True)
class XidEvent:
    """An XID error that the driver reported.

    Attributes:
        uuid: The GPU.
        xid: The error's number.
    """

    uuid: str
    xid: int

    @property
    def is_application(self) -> bool:
        """Whether the program on the GPU is at fault, not the GPU."""
        return self.xid in APPLICATION_XIDS
