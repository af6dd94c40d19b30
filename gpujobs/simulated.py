"""Simulated machines: a YAML file that says what GPUs there are, in place of NVML.

``serve --simulate FILE``, ``plan --simulate FILE`` and ``simulate --gpus FILE`` take the same file; its keys
are told in docs/simulated-machines.md. Whatever comes from here says so: every GPU's health is ``simulated``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Final

from gpujobs.core.errors import InvalidInput, Problem
from gpujobs.core.inventory import Gpu, Health, Inventory, Link, MigDevice, pair
from gpujobs.core.values import Loc, typed, unknown_key
from gpujobs.yamltree import BYTES_MAX, Place, TextError, Tree, path_of, read

MAX_GPUS: Final = 256
MIG_SLICES: Final = 7
"""Compute slices of a GPU that MIG can divide (NVIDIA Multi-Instance GPU user guide)."""

EMPTY: Final = "the file is empty; it needs the keys gpus, cpus and memory"
GPU_KEYS: Final = ("model", "count", "memory", "capability", "numa", "mig")
LINK_KEYS: Final = ("nvlink", "pairs", "same_numa", "other_numa", "groups")
MACHINE_KEYS: Final = ("name", "gpus", "links", "cpus", "memory")

LEVELS: Final[Mapping[str, Link]] = {
    "SYS": Link.SYSTEM,
    "NODE": Link.NODE,
    "PHB": Link.HOST_BRIDGE,
    "PXB": Link.MULTI_SWITCH,
    "PIX": Link.SINGLE_SWITCH,
    "PSB": Link.BOARD,
}
"""PCIe paths by the words of ``nvidia-smi topo -m``."""

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_PROFILE: Final = re.compile(r"(?:(\d)c\.)?(\d)g\.(\d+)gb(?:[+-][a-z.]+)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A simulated machine.

    Attributes:
        name: For people.
        inventory: Its GPUs, all healthy and empty.
        cpus: CPUs of the host.
        memory_bytes: Memory of the host.
    """

    name: str
    inventory: Inventory
    cpus: int
    memory_bytes: int


class SimulatedGpus:
    """A source of inventories that are always the same: the machine of a file.

    Args:
        machine: What :func:`load` gave.
        clock: Seconds since the epoch, for :attr:`Inventory.taken_at`.
    """

    def __init__(self, machine: Machine, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.machine = machine
        self._clock = clock

    def snapshot(self, locate: Callable[[str], str | None] | None = None) -> Inventory:  # noqa: ARG002
        """The machine; there are no processes to locate."""
        return replace(self.machine.inventory, taken_at=self._clock())

    def wait_event(self, timeout_s: float) -> None:  # noqa: ARG002
        """Simulated GPUs have no XID events."""
        return

    def close(self) -> None:
        """There is nothing to let go of."""


def load(path: Path) -> Machine:
    """Read a machine file.

    Raises:
        InvalidInput: With the position of every mistake in the file, or where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(BYTES_MAX + 1)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot read the machine file: {error.strerror}") from error
    return parse(content, str(path))


def parse(text: bytes | str, file: str = "") -> Machine:
    """Read a machine from YAML text.

    Args:
        text: The file's content; keys of the top level that begin with ``x-`` are for anchors and notes.
        file: Its name, for positions and as the machine's name where it gives none itself.

    Raises:
        InvalidInput: With the position of every mistake.
    """
    reader = _Reader(file)
    try:
        reader.tree = read(text, empty=EMPTY, second="a second document begins; a file is one machine")
    except TextError as error:
        reader.note(error.note.place, (), error.note.message)
        raise reader.error() from error
    for note in reader.tree.notes:
        reader.note(note.place, note.loc, note.message)
    machine = _machine(reader, _Node(reader.tree.value, ()))
    if machine is None or reader.problems:
        raise reader.error()
    return machine


def assemble(
    gpus: Sequence[Gpu],
    nvlinks: Mapping[tuple[int, int], int],
    pcie: Mapping[tuple[int, int], Link],
    *,
    simulated: bool = True,
) -> Inventory:
    """An inventory from GPUs and the links of pairs of their indexes.

    Args:
        gpus: In order.
        nvlinks: The number of NVLinks of a pair.
        pcie: The PCIe path of a pair; pairs without one have no path but NVLinks.
        simulated: Whether it is to say so.
    """
    links: dict[tuple[str, str], Link] = {}
    paths: dict[tuple[str, str], Link] = {}
    counts: dict[tuple[str, str], int] = {}
    for (a, b), path in pcie.items():
        key = pair(gpus[a].uuid, gpus[b].uuid)
        links[key] = paths[key] = path
    for (a, b), count in nvlinks.items():
        if count > 0:
            key = pair(gpus[a].uuid, gpus[b].uuid)
            links[key], counts[key] = Link.NVLINK, count
    return Inventory(gpus=tuple(gpus), links=links, nvlinks=counts, pcie=paths, simulated=simulated)


@dataclass(frozen=True, slots=True)
class _Node:
    """A value of the file and where it is."""

    value: object
    loc: Loc


class _Reader:
    """Takes typed values out of the file's and collects what is wrong with them, each with its position."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.tree = Tree()
        self.problems: list[Problem] = []

    def error(self) -> InvalidInput:
        """All problems as one error."""
        found = sorted(self.problems)
        count = f"{len(found)} mistakes" if len(found) > 1 else "a mistake"
        return InvalidInput(f"{count} in the machine file", problems=tuple(found))

    def note(self, place: Place, loc: Loc, message: str) -> None:
        """Note a mistake at a place."""
        self.problems.append(Problem(self.file, place.line, place.column, path_of(loc), message))

    def wrong(self, node: _Node, path: str, message: str) -> None:
        """Note a mistake in a value."""
        place = self.tree.values.get(node.loc, Place(1, 1))
        self.problems.append(Problem(self.file, place.line, place.column, path, message))

    def mapping(self, node: _Node, path: str, allowed: Sequence[str]) -> dict[str, _Node]:
        """The values of a mapping by key; unknown keys are mistakes."""
        if not isinstance(node.value, dict):
            self.wrong(node, path, f"expected keys ({', '.join(allowed)})")
            return {}
        found: dict[str, _Node] = {}
        for key, value in node.value.items():
            loc = (*node.loc, key)
            if key in allowed:
                found[key] = _Node(value, loc)
            elif node.loc or not key.startswith("x-"):
                self.note(self.tree.keys.get(loc, Place(1, 1)), loc, unknown_key(key, allowed))
        return found

    def items(self, node: _Node, path: str) -> Iterator[tuple[_Node, str]]:
        """The elements of a list, each with its path."""
        if not isinstance(node.value, list):
            self.wrong(node, path, "expected a list")
            return
        for index, item in enumerate(node.value):
            yield _Node(item, (*node.loc, index)), f"{path}[{index}]"

    def text(self, node: _Node, path: str) -> str:
        """A non-empty text."""
        if isinstance(node.value, str) and node.value.strip() and typed(node.value) is not None:
            return str(node.value).strip()
        self.wrong(node, path, "expected a text")
        return ""

    def integer(self, node: _Node, path: str, low: int, high: int) -> int:
        """A whole number within bounds, both included; the lower bound where it is wrong."""
        value = node.value if isinstance(node.value, str) else ""
        if re.fullmatch(r"\d{1,9}", value) and low <= int(value) <= high:
            return int(value)
        self.wrong(node, path, f"expected a whole number from {low} to {high}")
        return low

    def size(self, node: _Node, path: str) -> int:
        """A positive size in bytes, from bytes or a number with a unit (powers of 1024)."""
        match = _SIZE.fullmatch(node.value.strip()) if isinstance(node.value, str) else None
        if match and (amount := int(float(match[1]) * _UNITS[match[2].lower()])) > 0:
            return amount
        self.wrong(node, path, "expected a size such as 40GB, 81559MiB or a number of bytes")
        return 1


def _machine(reader: _Reader, node: _Node) -> Machine | None:
    keys = reader.mapping(node, "", MACHINE_KEYS)
    for key in ("gpus", "cpus", "memory"):
        if isinstance(node.value, dict) and key not in keys:
            reader.wrong(node, key, "is missing")
    cpus = reader.integer(keys["cpus"], "cpus", 1, 4096) if "cpus" in keys else 1
    memory = reader.size(keys["memory"], "memory") if "memory" in keys else 1
    stem = Path(reader.file).stem if reader.file else "simulated"
    name = reader.text(keys["name"], "name") if "name" in keys else stem
    if "gpus" not in keys:
        return None
    gpus: list[Gpu] = []
    for item, path in reader.items(keys["gpus"], "gpus"):
        gpus += _gpus(reader, item, path, len(gpus))
    if len(gpus) > MAX_GPUS:
        reader.wrong(keys["gpus"], "gpus", f"{len(gpus)} GPUs, at most {MAX_GPUS}")
        return None
    nvlinks, pcie = _links(reader, keys.get("links"), gpus)
    if reader.problems:
        return None
    return Machine(name=name, inventory=assemble(gpus, nvlinks, pcie), cpus=cpus, memory_bytes=memory)


def _gpus(reader: _Reader, node: _Node, path: str, first: int) -> list[Gpu]:
    """The GPUs of one entry; ``first`` is the index of its first one."""
    keys = reader.mapping(node, path, GPU_KEYS)
    for key in ("model", "memory"):
        if isinstance(node.value, dict) and key not in keys:
            reader.wrong(node, f"{path}.{key}", "is missing")
    model = reader.text(keys["model"], f"{path}.model") if "model" in keys else ""
    memory = reader.size(keys["memory"], f"{path}.memory") if "memory" in keys else 1
    count = reader.integer(keys["count"], f"{path}.count", 1, MAX_GPUS) if "count" in keys else 1
    capability = None
    if "capability" in keys:
        shown = reader.text(keys["capability"], f"{path}.capability")
        if match := re.fullmatch(r"(\d{1,2})\.(\d)", shown):
            capability = (int(match[1]), int(match[2]))
        elif shown:
            reader.wrong(keys["capability"], f"{path}.capability", 'expected major.minor, such as "8.0"')
    nodes = _numa(reader, keys.get("numa"), f"{path}.numa", count)
    profiles = _profiles(reader, keys.get("mig"), f"{path}.mig", memory)
    return [
        Gpu(
            uuid=f"GPU-00000000-0000-0000-0000-{index:012d}",
            index=index,
            minor=index,
            model=model,
            memory_bytes=memory,
            health=Health.SIMULATED,
            capability=capability,
            memory_used_bytes=0,
            pci=f"00000000:{index + 1:02X}:00.0",
            numa=nodes[index - first],
            mig_enabled=profiles is not None,
            mig=_mig(index, profiles or []),
        )
        for index in range(first, first + count)
    ]


def _numa(reader: _Reader, node: _Node | None, path: str, count: int) -> list[int]:
    """The NUMA node of each GPU of an entry: one for all, or a list."""
    if node is None or not isinstance(node.value, list):
        return [reader.integer(node, path, 0, 255) if node else 0] * count
    nodes = [reader.integer(item, where, 0, 255) for item, where in reader.items(node, path)]
    if len(nodes) != count:
        reader.wrong(node, path, f"{len(nodes)} numbers for {count} GPUs")
        return [0] * count
    return nodes


def _profiles(reader: _Reader, node: _Node | None, path: str, memory: int) -> list[str] | None:
    """The MIG profiles of a GPU; None where it is not in MIG mode."""
    if node is None:
        return None
    profiles: list[str] = []
    slices = size = 0
    for item, where in reader.items(node, path):
        profile = reader.text(item, where).lower()
        match = _PROFILE.fullmatch(profile)
        if match is None:
            reader.wrong(item, where, "expected a MIG profile, such as 3g.20gb")
            continue
        profiles.append(profile)
        slices += int(match[2])
        size += int(match[3]) << 30
    if slices > MIG_SLICES:
        reader.wrong(node, path, f"{slices} compute slices in sum, a GPU has {MIG_SLICES}")
    if size > memory:
        reader.wrong(node, path, f"{size >> 30} GB in sum, the GPU has {memory / (1 << 30):.1f} GiB")
    return profiles


def _mig(gpu: int, profiles: Sequence[str]) -> tuple[MigDevice, ...]:
    return tuple(
        MigDevice(
            uuid=f"MIG-00000000-0000-0000-{gpu:04d}-{place:012d}",
            profile=profile,
            gpu_instance=place + 1,
            compute_instance=0,
            memory_bytes=int(profile.split("gb")[0].rsplit(".", 1)[1]) << 30,
            memory_used_bytes=0,
        )
        for place, profile in enumerate(profiles)
    )


def _links(
    reader: _Reader, node: _Node | None, gpus: Sequence[Gpu]
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], Link]]:
    """NVLinks and PCIe paths of pairs of indexes."""
    keys = reader.mapping(node, "links", LINK_KEYS) if node else {}
    everyone = reader.integer(keys["nvlink"], "links.nvlink", 0, 64) if "nvlink" in keys else 0
    near = _level(reader, keys["same_numa"], "links.same_numa") if "same_numa" in keys else Link.NODE
    far = _level(reader, keys["other_numa"], "links.other_numa") if "other_numa" in keys else Link.SYSTEM
    all_pairs = list(combinations(range(len(gpus)), 2))
    nvlinks = dict.fromkeys(all_pairs, everyone)
    pcie = {(a, b): near if gpus[a].numa == gpus[b].numa else far for a, b in all_pairs}
    for item, path in reader.items(keys["groups"], "links.groups") if "groups" in keys else ():
        group = reader.mapping(item, path, ("gpus", "path"))
        if {"gpus", "path"} - group.keys():
            reader.wrong(item, path, "expected gpus (indexes) and path (a PCIe path)")
            continue
        level = _level(reader, group["path"], f"{path}.path")
        members = [_index(reader, i, where, gpus) for i, where in reader.items(group["gpus"], f"{path}.gpus")]
        pcie.update(((a, b), level) for a, b in combinations(sorted(set(members)), 2))
    for item, path in reader.items(keys["pairs"], "links.pairs") if "pairs" in keys else ():
        parts = list(reader.items(item, path))
        if len(parts) != 3:
            reader.wrong(item, path, "expected [index, index, number of NVLinks]")
            continue
        known = len(reader.problems)
        a, b = (_index(reader, *part, gpus) for part in parts[:2])
        count = reader.integer(*parts[2], 0, 64)
        if len(reader.problems) > known:
            continue
        if a == b:
            reader.wrong(item, path, "a GPU has no link to itself")
        else:
            nvlinks[min(a, b), max(a, b)] = count
    return nvlinks, pcie


def _index(reader: _Reader, node: _Node, path: str, gpus: Sequence[Gpu]) -> int:
    return reader.integer(node, path, 0, max(0, len(gpus) - 1))


def _level(reader: _Reader, node: _Node, path: str) -> Link:
    word = node.value.upper() if isinstance(node.value, str) else ""
    if word not in LEVELS:
        reader.wrong(node, path, f"expected one of {', '.join(LEVELS)}, as nvidia-smi topo -m names them")
    return LEVELS.get(word, Link.SYSTEM)
