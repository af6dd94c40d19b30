"""Machines with GPUs, for the NVML stand-in of the test lab.

`build` compiles `nvml/standin.c` to `libnvidia-ml.so.1`; with that directory first in `LD_LIBRARY_PATH` the
real pynvml loads it.  A `Machine` is described here and written to the file that `LAB_NVML_STATE` names; the
library looks at the file again on every call, so a test changes the machine by writing it again:

    library = build(tmp_path / "nvml")
    machine = dgx_a100()
    machine.write(state)
    ... run a program with environment(library, state) ...
    machine.gpus[3].lost = True
    machine.write(state)

From a shell: `python -m tests.lab.nvml build DIR` and
`python -m tests.lab.nvml write MACHINE FILE [--count N]`.

Nothing of the product is imported here: the lab must not agree with the product by construction.
"""

import argparse
import fcntl
import hashlib
import itertools
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SOURCE = Path(__file__).parent / "nvml" / "standin.c"
SONAME = "libnvidia-ml.so.1"
FLAGS = (
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fPIC",
    "-shared",
    "-pthread",
    "-O1",
    "-fvisibility=hidden",
    f"-Wl,-soname,{SONAME}",
)

MIB = 2**20
GIB = 2**30

# Codes of nvml.h that tests let the stand-in answer.
UNINITIALIZED = 1
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
DRIVER_NOT_LOADED = 9
GPU_IS_LOST = 15
UNKNOWN = 999

# nvmlGpuTopologyLevel_t: what two GPUs have in common, from near to far.
INTERNAL = 0
SINGLE_SWITCH = 10
MULTIPLE_SWITCHES = 20
HOST_BRIDGE = 30
SAME_NODE = 40
ACROSS_SOCKETS = 50

# nvmlEventType…
EVENT_XID = 0x8

_NO_INSTANCE = 0xFFFFFFFF
_NO_VALUE = 2**64 - 1


def build(directory: Path, without: Iterable[str] = ()) -> Path:
    """Compile the stand-in to `directory/libnvidia-ml.so.1`, unless what is there is already that.

    Safe when several processes build at once: they take turns, and the library appears by a rename.

    Args:
        directory: where the library goes; made if missing.
        without: symbols to leave out, as a library older than these functions would
            (`"nvmlDeviceGetMemoryInfo_v2"`); use a directory of its own for each such library.

    Returns:
        `directory`, to be put first in `LD_LIBRARY_PATH`.

    Raises:
        RuntimeError: gcc refused the source; its words are the message.
    """
    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    hidden = sorted(set(without))
    recipe = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, hidden)).encode()).hexdigest()
    library, stamp = directory / SONAME, directory / "built-from"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists() and stamp.exists() and stamp.read_text() == recipe:
            return directory
        fresh = directory / f"{SONAME}.new"
        script = directory / "symbols.map"
        script.write_text("{ local: " + " ".join(f"{name};" for name in hidden) + " };\n")
        versions = [f"-Wl,--version-script={script}"] if hidden else []
        done = subprocess.run(
            ["gcc", *FLAGS, *versions, "-o", str(fresh), str(SOURCE)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"gcc could not build the NVML stand-in:\n{done.stderr}")
        stamp.unlink(missing_ok=True)  # never a stamp beside a library that it does not describe
        fresh.replace(library)
        stamp.write_text(recipe)
    return directory


def environment(library: Path, state: Path) -> dict[str, str]:
    """This process's environment, changed so that a child's pynvml sees the machine in `state`.

    Args:
        library: the directory that `build` gave.
        state: the file that `Machine.write` writes.
    """
    paths = [str(library), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths)), "LAB_NVML_STATE": str(state)}


def identity(prefix: Literal["GPU", "MIG"], *parts: object) -> str:
    """A UUID as NVML spells it, the same on every run for the same `parts`."""
    return f"{prefix}-{uuid.uuid5(uuid.NAMESPACE_DNS, '/'.join(map(str, parts)))}"


@dataclass(slots=True)
class Process:
    """A process on a GPU.

    Attributes:
        pid: as the host sees it.
        memory: bytes of GPU memory, None where the driver cannot tell.
        kind: which of NVML's three lists it is on.
        gpu_instance: on a GPU in MIG mode, whose instance it is on.
        compute_instance: likewise.
        name: what `nvmlSystemGetProcessName` says; empty: asked of `/proc`.
    """

    pid: int
    memory: int | None = 0
    kind: Literal["compute", "graphics", "mps"] = "compute"
    gpu_instance: int | None = None
    compute_instance: int | None = None
    name: str = ""


@dataclass(slots=True)
class Sample:
    """One sample of a process's utilisation, in percent.

    Attributes:
        pid: the process.
        sm: of the multiprocessors.
        memory: of the memory's bandwidth.
        encoder: of the video encoder.
        decoder: of the video decoder.
        timestamp: microseconds since the epoch; None: just now, whenever it is asked.
    """

    pid: int
    sm: int = 0
    memory: int = 0
    encoder: int = 0
    decoder: int = 0
    timestamp: int | None = None


# GPU instance profiles: slices, multiprocessors, MiB; of the A100-SXM4-40GB and -80GB, about as
# `nvidia-smi mig -lgip` prints them (in GiB to two places; they differ by some MiB between drivers).
MIG_PROFILES: dict[str, tuple[int, int, int]] = {
    "1g.5gb": (1, 14, 4864),
    "2g.10gb": (2, 28, 9984),
    "3g.20gb": (3, 42, 20096),
    "4g.20gb": (4, 56, 20096),
    "7g.40gb": (7, 98, 40320),
    "1g.10gb": (1, 14, 9728),
    "2g.20gb": (2, 28, 19968),
    "3g.40gb": (3, 42, 40192),
    "4g.40gb": (4, 56, 40192),
    "7g.80gb": (7, 98, 80640),
}


@dataclass(slots=True)
class MigDevice:
    """A MIG device: one compute instance on one GPU instance.

    Attributes:
        profile: such as `1g.10gb`; unknown ones need `memory`, `slices` and `multiprocessors`.
        uuid: `MIG-…`.
        gpu_instance: unique on its GPU.
        compute_instance: unique on its GPU instance.
        slot: the index by which NVML hands it out; there may be empty slots in between.
        memory: bytes; 0: the profile's.
        memory_used: bytes; None: the sum over its processes.
        slices: of the GPU's compute, 0: the profile's.
        multiprocessors: 0: the profile's.
    """

    profile: str
    uuid: str
    gpu_instance: int
    compute_instance: int = 0
    slot: int = 0
    memory: int = 0
    memory_used: int | None = None
    slices: int = 0
    multiprocessors: int = 0

    def __post_init__(self) -> None:
        slices, multiprocessors, mebibytes = MIG_PROFILES.get(self.profile, (0, 0, 0))
        self.slices = self.slices or slices
        self.multiprocessors = self.multiprocessors or multiprocessors
        self.memory = self.memory or mebibytes * MIB
        if not (self.slices and self.multiprocessors and self.memory):
            raise ValueError(
                f"MIG profile {self.profile!r} is not known: give memory, slices and multiprocessors"
            )


@dataclass(slots=True)
class Link:
    """One end of an NVLink.

    Attributes:
        number: of the link on this GPU.
        peer: the other GPU's index; None: an NVSwitch at `switch`.
        switch: the switch's PCI bus id.
        active: whether it is up (a link to a lost GPU is down anyway).
    """

    number: int
    peer: int | None = None
    switch: str = ""
    active: bool = True


@dataclass(slots=True)
class Gpu:
    """A GPU, as NVML tells of it.  Its index is its place in `Machine.gpus`.

    Attributes:
        uuid: `GPU-…`.
        name: the product's name.
        minor: N of `/dev/nvidiaN`, which need not be the index.
        pci: bus id, `DDDDDDDD:BB:DD.0`.
        pci_device: device and vendor id, as in NVML's `pciDeviceId`.
        pci_subsystem: likewise of the subsystem.
        serial: empty where the product does not tell.
        memory: bytes in all.
        memory_reserved: bytes that the driver keeps.
        memory_used: bytes used beside these; None: the sum over the processes.
        utilization: percent of time that a kernel ran.
        memory_utilization: percent of time that memory was read or written.
        temperature: degrees C.
        power: milliwatts drawn.
        power_limit: milliwatts allowed.
        energy: millijoules since the driver was loaded.
        capability: CUDA compute capability.
        compute_mode: 0 default, 2 prohibited, 3 exclusive to a process.
        persistence: whether persistence mode is on.
        ecc: None: the product has none.
        ecc_corrected: errors since the driver was loaded, and of the card's life.
        ecc_uncorrected: likewise.
        numa_node: the host's node it is near (`nvmlDeviceGetMemoryAffinity`); None: not told.
        own_numa_node: `nvmlDeviceGetNumaNodeId`, only where the GPU's own memory is a node (not on x86).
        cpus: near ones, such as `0-15,32-47`; empty: not told.
        mig_mode: None: the product has no MIG.
        mig_pending: after the next reset; None: as now.
        mig_devices: listed by NVML only while `mig_mode` is on.
        mig_slots: how many MIG devices there can be.
        lost: fallen off the bus.
        p2p: whether the driver allows peer access over PCIe for this product.
        processes: on the GPU.
        samples: of their utilisation.
        answers: NVML codes to answer in place of values, by the function's name without `nvmlDeviceGet` and
            without a version (`{"PowerUsage": NOT_SUPPORTED, "UUID": UNKNOWN}`); `MemoryInfo` and
            `MemoryInfo_v2` are told apart, and it is `RegisterEvents` for nvmlDeviceRegisterEvents.
        links: NVLinks.
    """

    uuid: str
    name: str
    minor: int
    pci: str
    memory: int
    pci_device: int = 0x20B010DE
    pci_subsystem: int = 0x134F10DE
    serial: str = ""
    memory_reserved: int = 0
    memory_used: int | None = None
    utilization: int = 0
    memory_utilization: int = 0
    temperature: int = 33
    power: int = 55_000
    power_limit: int = 400_000
    energy: int = 1_000_000
    capability: tuple[int, int] = (8, 0)
    compute_mode: int = 0
    persistence: bool = True
    ecc: bool | None = True
    ecc_corrected: tuple[int, int] = (0, 0)
    ecc_uncorrected: tuple[int, int] = (0, 0)
    numa_node: int | None = 0
    own_numa_node: int | None = None
    cpus: str = ""
    mig_mode: bool | None = None
    mig_pending: bool | None = None
    mig_devices: list[MigDevice] = field(default_factory=list)
    mig_slots: int = 7
    lost: bool = False
    p2p: bool = True
    processes: list[Process] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)

    def unsupported(self, *functions: str) -> "Gpu":
        """Let these functions answer NOT_SUPPORTED (named as for `answers`).  Returns the GPU."""
        self.answers.update(dict.fromkeys(functions, NOT_SUPPORTED))
        return self

    def add_mig(self, profile: str, slot: int | None = None) -> MigDevice:
        """Put the GPU in MIG mode and make a device of `profile`, in the next slot or in `slot`."""
        if slot is None:
            slot = max((device.slot for device in self.mig_devices), default=-1) + 1
        self.mig_mode = True
        device = MigDevice(
            profile, identity("MIG", self.uuid, slot, profile), gpu_instance=slot + 7, slot=slot
        )
        self.mig_devices.append(device)
        return device


@dataclass(frozen=True, slots=True)
class Model:
    """What is the same for every card of a product: memory in bytes, power in milliwatts."""

    memory: int
    capability: tuple[int, int]
    power_limit: int
    pci_device: int
    ecc: bool | None = True
    mig: bool = False
    serial: bool = True
    p2p: bool = True


# Memory is about what nvidia-smi prints.
MODELS: dict[str, Model] = {
    "NVIDIA A100-SXM4-40GB": Model(40960 * MIB, (8, 0), 400_000, 0x20B010DE, mig=True),
    "NVIDIA A100-PCIE-40GB": Model(40960 * MIB, (8, 0), 250_000, 0x20F110DE, mig=True),
    "NVIDIA H100 80GB HBM3": Model(81559 * MIB, (9, 0), 700_000, 0x233010DE, mig=True),
    "Tesla V100-SXM2-16GB": Model(16384 * MIB, (7, 0), 300_000, 0x1DB110DE),
    "Tesla T4": Model(15360 * MIB, (7, 5), 70_000, 0x1EB810DE),
    "Quadro RTX 8000": Model(46080 * MIB, (7, 5), 260_000, 0x1E3010DE),
    "NVIDIA GeForce RTX 4090": Model(
        24564 * MIB, (8, 9), 450_000, 0x268410DE, ecc=None, serial=False, p2p=False
    ),
    "NVIDIA GeForce RTX 3090": Model(
        24576 * MIB, (8, 6), 350_000, 0x220410DE, ecc=None, serial=False, p2p=False
    ),
}


@dataclass(slots=True)
class Event:
    """Something that happened on a GPU, told once to every event set that was registered before.

    Attributes:
        sequence: grows from event to event over the life of the state file.
        gpu: index.
        data: for an XID event its number.
        kind: `nvmlEventType…`.
        gpu_instance: in MIG mode.
        compute_instance: likewise.
    """

    sequence: int
    gpu: int
    data: int
    kind: int = EVENT_XID
    gpu_instance: int | None = None
    compute_instance: int | None = None


@dataclass(slots=True)
class Machine:
    """A machine with GPUs.  Change it and `write` it again.

    Attributes:
        gpus: by index.
        driver: `absent`: not loaded; `mismatch`: another version than the library's, after an upgrade.
        driver_version: of the kernel driver.
        cuda_version: the newest that the driver knows, major x 1000 + minor x 10.
        generation: another number means that the driver was loaded anew: handles of before are dead.
        levels: by pair of indexes, smaller first, where it is not `ACROSS_SOCKETS`.
        events: all so far.
        reap: whether a process leaves its GPU when its PID is gone from `/proc`, as with a real driver; off,
            so that made-up PIDs can be used.
        lost_handle_fails: whether already the handle of a lost GPU is refused, or only every query of it.
        lost_wait_fails: whether a wait for events, all events given, answers GPU_IS_LOST at once while a
            registered GPU is lost; else it goes on waiting.
    """

    gpus: list[Gpu] = field(default_factory=list)
    driver: Literal["loaded", "absent", "mismatch"] = "loaded"
    driver_version: str = "535.183.01"
    cuda_version: int = 12020
    generation: int = 1
    levels: dict[tuple[int, int], int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    reap: bool = False
    lost_handle_fails: bool = False
    lost_wait_fails: bool = False

    @classmethod
    def uniform(
        cls,
        count: int,
        model: str = "NVIDIA A100-SXM4-40GB",
        memory: int | None = None,
        *,
        name: str = "uniform",
        sockets: int = 1,
        cpus: int | None = None,
    ) -> "Machine":
        """A machine of equal GPUs.

        Args:
            count: how many.
            model: the product's name; one that is not in `MODELS` needs `memory`.
            memory: bytes a GPU, in place of the model's.
            name: makes the UUIDs differ from those of other machines.
            sockets: over which the GPUs are spread evenly, each a NUMA node.
            cpus: of the machine, for the GPUs' affinity; None: those of this machine.
        """
        machine = cls()
        for index in range(count):
            machine.add_gpu(model, memory, name=name, numa_node=index * sockets // count)
        machine.place(sockets, cpus or os.cpu_count() or 1)
        return machine

    def add_gpu(
        self, model: str, memory: int | None = None, *, name: str = "machine", numa_node: int = 0
    ) -> Gpu:
        """Append a GPU of a product; its minor is its index."""
        facts = MODELS.get(model)
        if facts is None:
            if memory is None:
                raise ValueError(
                    f"the model {model!r} is not known: give its memory, or one of {', '.join(MODELS)}"
                )
            facts = Model(memory, (8, 0), 300_000, 0x20B010DE)
        index = len(self.gpus)
        total = memory or facts.memory
        gpu = Gpu(
            uuid=identity("GPU", name, model, index),
            name=model,
            minor=index,
            pci=f"{index // 31:08X}:{0x07 + 8 * (index % 31):02X}:00.0",
            memory=total,
            pci_device=facts.pci_device,
            serial=f"{1_320_000_000_000 + uuid.uuid5(uuid.NAMESPACE_DNS, f'{name}/{index}').int % 10**10}"
            if facts.serial
            else "",
            memory_reserved=total // 64,
            power=facts.power_limit // 8,
            power_limit=facts.power_limit,
            capability=facts.capability,
            ecc=facts.ecc,
            mig_mode=False if facts.mig else None,
            numa_node=numa_node,
            p2p=facts.p2p,
        )
        self.gpus.append(gpu)
        return gpu

    def place(self, sockets: int, cpus: int) -> None:
        """Give GPUs their NUMA node's CPUs, and pairs on one node `SAME_NODE`, where nothing is set yet."""
        share = max(cpus // sockets, 1)
        for gpu in self.gpus:
            if gpu.numa_node is not None and not gpu.cpus:
                first = min(gpu.numa_node * share, max(cpus - share, 0))
                gpu.cpus = f"{first}-{first + share - 1}"
        for (low, one), (high, other) in itertools.combinations(enumerate(self.gpus), 2):
            if one.numa_node == other.numa_node:
                self.levels.setdefault((low, high), SAME_NODE)

    def fit_host(self) -> "Machine":
        """Let the GPUs be near CPUs that this host has, so that containers can be pinned.  Returns it."""
        nodes = 1 + max((gpu.numa_node or 0 for gpu in self.gpus), default=0)
        for gpu in self.gpus:
            gpu.cpus = ""
        self.place(nodes, os.cpu_count() or 1)
        return self

    def first(self, count: int) -> "Machine":
        """Keep the first `count` GPUs only, and no link or level to the others.  Returns the machine."""
        del self.gpus[count:]
        self.levels = {pair: level for pair, level in self.levels.items() if max(pair) < count}
        self.events = [event for event in self.events if event.gpu < count]
        for gpu in self.gpus:
            gpu.links = [link for link in gpu.links if link.peer is None or link.peer < count]
        return self

    def connect(self, one: int, other: int, links: int = 1) -> None:
        """Join two GPUs directly by `links` NVLinks, on the next free link numbers of both."""
        for _ in range(links):
            for here, there in ((one, other), (other, one)):
                self.gpus[here].links.append(Link(len(self.gpus[here].links), peer=there))

    def connect_by_switches(self, switches: int, links_each: int) -> None:
        """Join all GPUs through NVSwitches: each GPU has `links_each` links to each switch.

        As on real such machines, NVML then names the switches, not the other GPUs, as the links' far ends.
        """
        for gpu in self.gpus:
            for switch in range(switches):
                bus = f"00000000:{0xC4 + switch:02X}:00.0"
                gpu.links += [Link(len(gpu.links) + n, switch=bus) for n in range(links_each)]

    def xid(self, gpu: int, number: int) -> Event:
        """Let an XID happen on a GPU; told after the next `write`."""
        last = self.events[-1].sequence if self.events else 0
        self.events.append(Event(last + 1, gpu, number))
        return self.events[-1]

    def unload_driver(self) -> None:
        """Take the driver away, after the next `write`."""
        self.driver = "absent"

    def load_driver(self) -> None:
        """Load the driver anew, after the next `write`: no lost GPU, no process and no old handle is left."""
        self.driver = "loaded"
        self.generation += 1
        for gpu in self.gpus:
            gpu.lost = False
            gpu.processes.clear()
            gpu.samples.clear()

    def render(self) -> str:
        """The state file's text; its grammar is `parse_line` of `nvml/standin.c`."""
        lines = [
            "lab-nvml 1",
            f"driver {self.driver}",
            f"generation {self.generation}",
            f"driver_version {self.driver_version}",
            f"nvml_version {self.cuda_version // 1000}.{self.driver_version}",
            f"cuda {self.cuda_version}",
            f"reap {self.reap:d}",
            f"lost_handle_fails {self.lost_handle_fails:d}",
            f"lost_wait_fails {self.lost_wait_fails:d}",
        ]
        for gpu in self.gpus:
            lines += _gpu_lines(gpu)
        lines += [f"level {low} {high} {level}" for (low, high), level in sorted(self.levels.items())]
        lines += [
            f"event {e.sequence} {e.gpu} {e.kind} {e.data}"
            f" {_instance(e.gpu_instance)} {_instance(e.compute_instance)}"
            for e in self.events
        ]
        return "\n".join([*lines, "end", ""])

    def write(self, path: Path) -> Path:
        """Put the machine in the state file, at once and whole.  Returns `path`."""
        path = Path(path)
        fresh = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        fresh.write_text(self.render())
        fresh.chmod(0o644)  # other accounts' programs read it too, whatever the umask here
        # The kernel stamps files by its tick, a few milliseconds: two quick writes would look the same to the
        # library where the inode's number is used again.
        now = time.time_ns()
        os.utime(fresh, ns=(now, now))
        fresh.replace(path)
        return path


def _instance(number: int | None) -> int:
    return _NO_INSTANCE if number is None else number


def _word(text: str) -> str:
    """Text that ends a line must not hold a line's end; that would change the machine silently."""
    if "\n" in text or "\0" in text:
        raise ValueError(f"a line break in {text!r}")
    return text


def _gpu_lines(gpu: Gpu) -> list[str]:
    ecc = -1 if gpu.ecc is None else int(gpu.ecc)
    mig = -1 if gpu.mig_mode is None else int(gpu.mig_mode)
    pending = mig if gpu.mig_pending is None else int(gpu.mig_pending)
    numa, own_numa = (-1 if node is None else node for node in (gpu.numa_node, gpu.own_numa_node))
    corrected, uncorrected = gpu.ecc_corrected, gpu.ecc_uncorrected
    lines = [
        f"gpu {_word(gpu.uuid)}",
        f"name {_word(gpu.name)}",
        f"minor {gpu.minor}",
        f"pci {gpu.pci} {gpu.pci_device:x} {gpu.pci_subsystem:x}",
        f"serial {_word(gpu.serial)}",
        f"memory {gpu.memory} {gpu.memory_reserved} {-1 if gpu.memory_used is None else gpu.memory_used}",
        f"utilization {gpu.utilization} {gpu.memory_utilization}",
        f"temperature {gpu.temperature}",
        f"power {gpu.power} {gpu.power_limit} {gpu.energy}",
        f"capability {gpu.capability[0]} {gpu.capability[1]}",
        f"mode {gpu.compute_mode} {gpu.persistence:d}",
        f"ecc {ecc} {corrected[0]} {uncorrected[0]} {corrected[1]} {uncorrected[1]}",
        f"numa {numa} {own_numa}",
        f"cpus {_word(gpu.cpus)}",
        f"mig_mode {mig} {pending} {gpu.mig_slots}",
        f"lost {gpu.lost:d}",
        f"p2p {gpu.p2p:d}",
    ]
    lines += [
        f"mig {m.slot} {m.uuid} {m.gpu_instance} {m.compute_instance} {m.slices} {m.slices}"
        f" {m.multiprocessors} {m.memory} {-1 if m.memory_used is None else m.memory_used} {m.profile}"
        for m in gpu.mig_devices
    ]
    lines += [
        f"process {p.pid} {_NO_VALUE if p.memory is None else p.memory}"
        f" {p.kind[0]} {_instance(p.gpu_instance)} {_instance(p.compute_instance)} {_word(p.name)}"
        for p in gpu.processes
    ]
    lines += [
        f"sample {s.pid} {s.timestamp or 0} {s.sm} {s.memory} {s.encoder} {s.decoder}" for s in gpu.samples
    ]
    lines += [f"answer {function} {code}" for function, code in sorted(gpu.answers.items())]
    lines += [
        f"nvlink {n.number} {n.active:d} {-1 if n.peer is None else n.peer} {n.switch or '-'}"
        for n in gpu.links
    ]
    return lines


def dgx_a100() -> Machine:
    """Eight A100-SXM4-40GB, all joined by 12 NVLinks each into six NVSwitches, on two NUMA nodes."""
    machine = Machine.uniform(8, name="dgx-a100", sockets=2, cpus=256)
    machine.connect_by_switches(6, 2)
    for first in range(0, 8, 2):  # pairs share a PCIe switch's upstream port
        machine.levels[first, first + 1] = MULTIPLE_SWITCHES
    return machine


def dgx_h100() -> Machine:
    """Eight H100, all joined by 18 NVLinks each into four NVSwitches, on two NUMA nodes."""
    machine = Machine.uniform(8, "NVIDIA H100 80GB HBM3", name="dgx-h100", sockets=2, cpus=224)
    for gpu in machine.gpus:
        for switch, links in enumerate((5, 4, 4, 5)):
            bus = f"00000000:{0xC4 + switch:02X}:00.0"
            gpu.links += [Link(len(gpu.links) + n, switch=bus) for n in range(links)]
    return machine


def dgx1_volta() -> Machine:
    """Eight V100 in a hybrid cube mesh of direct NVLinks: the links of NVIDIA's go-gpuallocator fixtures."""
    machine = Machine.uniform(8, "Tesla V100-SXM2-16GB", name="dgx1-volta", sockets=2, cpus=80)
    quad = ((0, 1, 1), (0, 2, 1), (0, 3, 2), (1, 2, 2), (1, 3, 1), (2, 3, 2))
    across = ((0, 4, 2), (1, 5, 2), (2, 6, 1), (3, 7, 1))
    for one, other, links in (*quad, *((a + 4, b + 4, n) for a, b, n in quad), *across):
        machine.connect(one, other, links)
    for base in (0, 4):
        for pair in itertools.combinations(range(base, base + 4), 2):
            machine.levels[pair] = HOST_BRIDGE
        machine.levels[base, base + 1] = machine.levels[base + 2, base + 3] = SINGLE_SWITCH
    return machine


def two_socket_rtx() -> Machine:
    """Four Quadro RTX 8000, two a socket, each bridged by two NVLinks to one on the *other* socket.

    The links of the four-card machine in NVIDIA's go-gpuallocator fixtures: 0-3 and 1-2.
    """
    machine = Machine.uniform(4, "Quadro RTX 8000", name="two-socket-rtx", sockets=2, cpus=64)
    machine.connect(0, 3, 2)
    machine.connect(1, 2, 2)
    return machine


def two_rtx4090() -> Machine:
    """Two GeForce RTX 4090 under one socket: no NVLink, no peer access, no ECC, no serial number."""
    machine = Machine.uniform(2, "NVIDIA GeForce RTX 4090", name="two-rtx4090", cpus=32)
    machine.levels[0, 1] = HOST_BRIDGE
    return machine


def mixed() -> Machine:
    """Two A100-PCIE, a GeForce with a desktop on it, and a T4; minors in another order than indexes."""
    machine = Machine()
    machine.add_gpu("NVIDIA A100-PCIE-40GB", name="mixed", numa_node=0)
    machine.add_gpu("NVIDIA A100-PCIE-40GB", name="mixed", numa_node=0)
    desktop = machine.add_gpu("NVIDIA GeForce RTX 3090", name="mixed", numa_node=1)
    machine.add_gpu("Tesla T4", name="mixed", numa_node=1).unsupported("TotalEnergyConsumption")
    machine.connect(0, 1, 12)
    machine.place(2, 48)
    desktop.processes.append(Process(1432, 312 * MIB, "graphics", name="/usr/lib/xorg/Xorg"))
    for gpu, minor in zip(machine.gpus, (2, 3, 0, 1), strict=True):
        gpu.minor = minor
    return machine


def mig_a100() -> Machine:
    """Two A100-SXM4-40GB, the first divided into 3g.20gb, 2g.10gb and 1g.5gb with an empty slot between."""
    machine = Machine.uniform(2, name="mig-a100", cpus=64)
    machine.connect_by_switches(6, 2)
    for profile, slot in (("3g.20gb", 0), ("2g.10gb", 1), ("1g.5gb", 3)):
        machine.gpus[0].add_mig(profile, slot)
    return machine


def one_t4() -> Machine:
    """One T4."""
    return Machine.uniform(1, "Tesla T4", name="one-t4", cpus=8)


MACHINES: dict[str, Callable[[], Machine]] = {
    "dgx-a100": dgx_a100,
    "dgx-h100": dgx_h100,
    "dgx1-volta": dgx1_volta,
    "two-socket-rtx": two_socket_rtx,
    "two-rtx4090": two_rtx4090,
    "mixed": mixed,
    "mig-a100": mig_a100,
    "one-t4": one_t4,
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.nvml", description="The NVML stand-in of the lab."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser(
        "build", help="compile the library; prints the directory for LD_LIBRARY_PATH"
    )
    builder.add_argument("directory", type=Path)
    writer = commands.add_parser("write", help="write a machine, near this host's CPUs, for LAB_NVML_STATE")
    writer.add_argument("machine", choices=["uniform", *MACHINES])
    writer.add_argument("file", type=Path)
    writer.add_argument(
        "--count", type=int, help="GPUs: all of uniform (8), or the first ones of another machine"
    )
    chosen = parser.parse_args(arguments)
    if chosen.command == "build":
        print(build(chosen.directory))
        return 0
    if chosen.machine == "uniform":
        machine = Machine.uniform(8 if chosen.count is None else chosen.count)
    else:
        machine = MACHINES[chosen.machine]()
        if chosen.count is not None:
            machine.first(chosen.count)
    print(machine.fit_host().write(chosen.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
