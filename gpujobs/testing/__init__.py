"""Fakes and named machines for tests, of this project and of whoever builds on it.

The machines are built link by link; each says where its links are taken from. They are inventories without
processes, their GPUs healthy (``ok``), so that policy is tested as for real hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations

from gpujobs.core.inventory import Gpu, Health, Inventory, Link, MigDevice, Process
from gpujobs.simulated import assemble

GIB = 1 << 30
MIB = 1 << 20


class MachineBuilder:
    """A machine under construction: add GPUs, then links.

    Args:
        name: Goes into the UUIDs, so that two machines never share one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._gpus: list[Gpu] = []
        self._nvlinks: dict[tuple[int, int], int] = {}
        self._pcie: dict[tuple[int, int], Link] = {}

    def gpu(
        self,
        model: str,
        memory_bytes: int,
        capability: tuple[int, int],
        *,
        numa: int | None = 0,
        mig: Iterable[str] | None = None,
        reserved_bytes: int | None = None,
    ) -> MachineBuilder:
        """Add one GPU; with MIG profiles (also none of them) it is in MIG mode."""
        index = len(self._gpus)
        self._gpus.append(
            Gpu(
                uuid=f"GPU-{self.name}-{index}",
                index=index,
                minor=index,
                model=model,
                memory_bytes=memory_bytes,
                memory_reserved_bytes=reserved_bytes,
                capability=capability,
                pci=f"00000000:{index + 1:02X}:00.0",
                numa=numa,
                mig_enabled=mig is not None,
                mig=tuple(
                    MigDevice(
                        uuid=f"MIG-{self.name}-{index}-{place}",
                        profile=profile,
                        gpu_instance=place + 1,
                        compute_instance=0,
                        memory_bytes=int(profile.split("gb")[0].rsplit(".", 1)[1]) * GIB,
                    )
                    for place, profile in enumerate(mig or ())
                ),
            )
        )
        return self

    def nvlink(self, a: int, b: int, count: int) -> MachineBuilder:
        """Join two GPUs by a number of NVLinks."""
        self._nvlinks[min(a, b), max(a, b)] = count
        return self

    def nvswitch(self, count: int) -> MachineBuilder:
        """Join all GPUs so far by that many NVLinks a pair."""
        for a, b in combinations(range(len(self._gpus)), 2):
            self.nvlink(a, b, count)
        return self

    def path(self, a: int, b: int, path: Link) -> MachineBuilder:
        """Say how two GPUs reach each other over PCIe."""
        self._pcie[min(a, b), max(a, b)] = path
        return self

    def sockets(self, near: Link = Link.NODE, far: Link = Link.SYSTEM) -> MachineBuilder:
        """Give every pair that has no PCIe path yet the one within a NUMA node, or across nodes."""
        for a, b in combinations(range(len(self._gpus)), 2):
            same = self._gpus[a].numa == self._gpus[b].numa
            self._pcie.setdefault((a, b), near if same else far)
        return self

    def build(self) -> Inventory:
        """The machine."""
        inventory = assemble(self._gpus, self._nvlinks, self._pcie, simulated=False)
        return replace(inventory, driver="550.54.15", cuda=(12, 4))


def dgx1_p100() -> Inventory:
    """DGX-1 with Pascal cards: single NVLinks, PCIe switches join 0-2, 1-3, 4-6, 5-7.

    Links as in ``NewDGX1PascalNode`` of NVIDIA's go-gpuallocator (gpuallocator/common_test.go).
    """
    machine = MachineBuilder("dgx1-p100")
    for index in range(8):
        machine.gpu("Tesla P100-SXM2-16GB", 16384 * MIB, (6, 0), numa=index // 4)
    for a, b in ((0, 4), (1, 5), (2, 6), (3, 7)):
        machine.nvlink(a, b, 1)
    for base in (0, 4):
        for a, b in combinations(range(base, base + 4), 2):
            machine.nvlink(a, b, 1)
        machine.path(base, base + 2, Link.SINGLE_SWITCH).path(base + 1, base + 3, Link.SINGLE_SWITCH)
    return machine.sockets(near=Link.HOST_BRIDGE).build()


def dgx1_v100() -> Inventory:
    """DGX-1 with Volta cards: a mesh of single and double NVLinks, PCIe switches join 0-1, 2-3, 4-5, 6-7.

    Links as in ``NewDGX1VoltaNode`` of NVIDIA's go-gpuallocator (gpuallocator/common_test.go).
    """
    machine = MachineBuilder("dgx1-v100")
    for index in range(8):
        machine.gpu("Tesla V100-SXM2-16GB", 16384 * MIB, (7, 0), numa=index // 4)
    for base in (0, 4):
        for a, b, count in ((0, 1, 1), (0, 2, 1), (0, 3, 2), (1, 2, 2), (1, 3, 1), (2, 3, 2)):
            machine.nvlink(base + a, base + b, count)
        machine.path(base, base + 1, Link.SINGLE_SWITCH).path(base + 2, base + 3, Link.SINGLE_SWITCH)
    for a, b, count in ((0, 4, 2), (1, 5, 2), (2, 6, 1), (3, 7, 1)):
        machine.nvlink(a, b, count)
    return machine.sockets(near=Link.HOST_BRIDGE).build()


def dgx_a100() -> Inventory:
    """DGX A100: eight A100 of 40 GB, each pair 12 NVLinks through NVSwitches; pairs share PCIe switches.

    ``NV12`` everywhere and the NUMA nodes are those that ``nvidia-smi topo -m`` shows in
    https://github.com/NVIDIA/nccl/issues/1505.
    """
    machine = MachineBuilder("dgx-a100")
    for numa in (3, 3, 1, 1, 7, 7, 5, 5):
        machine.gpu("NVIDIA A100-SXM4-40GB", 40960 * MIB, (8, 0), numa=numa)
    for first in range(0, 8, 2):
        machine.path(first, first + 1, Link.MULTI_SWITCH)
    return machine.nvswitch(12).sockets().build()


def dgx_h100() -> Inventory:
    """DGX H100: eight H100 of 80 GB, each pair 18 NVLinks through NVSwitches, four on each socket."""
    machine = MachineBuilder("dgx-h100")
    for index in range(8):
        machine.gpu("NVIDIA H100 80GB HBM3", 81559 * MIB, (9, 0), numa=index // 4)
    return machine.nvswitch(18).sockets().build()


def two_socket_rtx() -> Inventory:
    """Four Quadro RTX 8000, two a socket; NVLink bridges of two links join 0-3 and 1-2, across the sockets.

    Links as in ``New4xRTX8000Node`` of NVIDIA's go-gpuallocator (gpuallocator/common_test.go): the bridged
    pairs have no PCIe path of their own there.
    """
    machine = MachineBuilder("two-socket-rtx")
    for index in range(4):
        machine.gpu("Quadro RTX 8000", 48601 * MIB, (7, 5), numa=index // 2)
    for a, b in ((0, 1), (2, 3)):
        machine.path(a, b, Link.NODE)
    for a, b in ((0, 2), (1, 3)):
        machine.path(a, b, Link.SYSTEM)
    return machine.nvlink(0, 3, 2).nvlink(1, 2, 2).build()


def mixed() -> Inventory:
    """What a group buys over the years: two bridged A100, one RTX 3090, two T4; PCIe only between kinds."""
    machine = MachineBuilder("mixed")
    for _ in range(2):
        machine.gpu("NVIDIA A100-PCIE-40GB", 40960 * MIB, (8, 0), numa=0)
    machine.gpu("NVIDIA GeForce RTX 3090", 24576 * MIB, (8, 6), numa=0)
    for _ in range(2):
        machine.gpu("Tesla T4", 15360 * MIB, (7, 5), numa=1)
    return machine.nvlink(0, 1, 12).sockets(near=Link.HOST_BRIDGE).build()


def mig_a100() -> Inventory:
    """Three A100: one divided into 3g.20gb, 2g.10gb and two 1g.5gb, one into seven 1g.5gb, one whole."""
    machine = MachineBuilder("mig-a100")
    machine.gpu("NVIDIA A100-SXM4-40GB", 40960 * MIB, (8, 0), mig=["3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb"])
    machine.gpu("NVIDIA A100-SXM4-40GB", 40960 * MIB, (8, 0), mig=["1g.5gb"] * 7)
    machine.gpu("NVIDIA A100-SXM4-40GB", 40960 * MIB, (8, 0))
    return machine.nvswitch(12).sockets().build()


def one_t4() -> Inventory:
    """One T4."""
    return MachineBuilder("one-t4").gpu("Tesla T4", 15360 * MIB, (7, 5), numa=None).build()


class FakeGpus:
    """A source of inventories for tests: a machine whose state the test changes between snapshots.

    Args:
        inventory: What it shows at first.

    Attributes:
        inventory: What the next snapshot shows.
        snapshots: How many were taken.
        closed: Whether it was closed.
    """

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.snapshots = 0
        self.closed = False

    def snapshot(self, locate: Callable[[str], str | None] | None = None) -> Inventory:
        """The machine as the test left it; ``locate`` fills in the jobs of processes in containers."""
        self.snapshots += 1
        if locate is None:
            return self.inventory

        def located(process: Process) -> Process:
            job = locate(process.container) if process.container else None
            return process if job is None else replace(process, job=job)

        gpus = tuple(
            replace(gpu, processes=tuple(map(located, gpu.processes))) for gpu in self.inventory.gpus
        )
        return replace(self.inventory, gpus=gpus)

    def wait_event(self, timeout_s: float) -> None:  # noqa: ARG002
        """There are no XID events here."""
        return

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True

    def change(self, uuid: str, **changes: object) -> None:
        """Change attributes of one GPU.

        Raises:
            KeyError: There is no such GPU.
        """
        if not any(gpu.uuid == uuid for gpu in self.inventory.gpus):
            raise KeyError(uuid)
        gpus = tuple(
            replace(gpu, **changes) if gpu.uuid == uuid else gpu  # type: ignore[arg-type]
            for gpu in self.inventory.gpus
        )
        self.inventory = replace(self.inventory, gpus=gpus)

    def lose(self, uuid: str) -> None:
        """Let a GPU fall off the bus: what it was is known, how it is no longer."""
        self.change(uuid, health=Health.LOST, processes=(), memory_used_bytes=None, temperature_c=None)

    def occupy(self, uuid: str, *processes: Process) -> None:
        """Put processes on a GPU."""
        self.change(uuid, processes=processes, memory_used_bytes=sum(p.memory_bytes or 0 for p in processes))

    def unload_driver(self, problem: str = "The NVIDIA driver is not loaded.") -> None:
        """Take the driver away."""
        self.inventory = Inventory(problem=problem)
