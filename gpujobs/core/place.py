"""The choice of GPUs: which ones a request gets now, or why none and whether ever.

A pure function of the request, of what is held and to be avoided, and of one snapshot of the machine. What
differs between GPUs that fit is decided in this order:

1. the link score of the chosen ones (:mod:`gpujobs.core.topology`), the higher the better;
2. the link score of the GPUs that stay wholly free, the higher the better;
3. for shares: GPUs that are shared already before wholly free ones;
4. the memory in sum, the smaller the better: a big card is not spent on a request that a small one serves;
5. for shares: the least memory left over;
6. NVML's order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gpujobs.core import fits
from gpujobs.core.fits import Device, Holding, Holdings, Occupation, Verdict, strangers
from gpujobs.core.inventory import Inventory
from gpujobs.core.spec import GpuRequest
from gpujobs.core.topology import Search, Topology, best_set, link_sum, topology_of

__all__ = ["Choice", "Holding", "Holdings", "NoPlacement", "Placement", "place", "strangers"]

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided about one GPU (or MIG device).

    Attributes:
        uuid: The device.
        chosen: Whether the request gets it.
        reason: Why or why not, in one short clause.
        word: The reason as one word, under which it is counted; empty for those that fit.
    """

    uuid: str
    chosen: bool
    reason: str
    word: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """The GPUs that a request gets.

    Attributes:
        uuids: In NVML's order.
        link_sum: The score of the links among them: 100 for each NVLink, 10 to 60 for each PCIe path.
        choices: Every device of the machine, in NVML's order.
    """

    uuids: tuple[str, ...]
    link_sum: int = 0
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True)
class NoPlacement:
    """Why a request gets no GPUs now.

    Attributes:
        possible_later: False where it cannot fit this machine even when every GPU is free and healthy.
        message: For people, such as ``2 GPUs asked, 1 free: 5 taken, 1 lost``.
        reasons: How many devices were left out for which reason (:attr:`Choice.word`), most frequent first.
        free: How many devices would fit one by one.
        choices: Every device of the machine, in NVML's order.
    """

    possible_later: bool
    message: str
    reasons: Mapping[str, int] = field(default_factory=dict)
    free: int = 0
    choices: tuple[Choice, ...] = ()


def place(
    request: GpuRequest, held: Holdings, avoid: Mapping[str, str], inventory: Inventory
) -> Placement | NoPlacement:
    """Choose GPUs for a request: as many as possible of its range, the best linked ones.

    Args:
        request: What is asked. ``uuid`` limits the choice to those devices; where it names MIG devices, these
            are given. ``memory`` is met by the size that a card is sold with
            (:func:`gpujobs.core.fits.holds_memory`).
        held: What jobs hold, by UUID.
        avoid: What is not to be used for another reason, by UUID, as a word or a clause that says why;
            :func:`strangers` gives those for other people's processes.
        inventory: The machine.
    """
    if request.count < 1 and request.max_count < 1:
        return Placement(())
    if not inventory.gpus:
        why = inventory.problem or "NVML reports none."
        return NoPlacement(False, f"{fits.asked(request)}, and this machine has no GPU: {why}")
    free = Occupation(held, avoid)
    devices = fits.devices(request, inventory)
    verdicts = [fits.judge(request, device, free) for device in devices]
    usable = [device for device, verdict in zip(devices, verdicts, strict=True) if verdict is None]
    machine = topology_of(inventory)
    for size in range(min(max(request.max_count, request.count), len(usable)), max(request.count, 1) - 1, -1):
        chosen = _select(request, free, machine, devices, usable, size)
        if chosen is not None:
            return _placement(request, free, machine, devices, verdicts, chosen)
    return _refusal(request, machine, devices, verdicts, usable)


def _select(
    request: GpuRequest,
    free: Occupation,
    machine: Topology,
    devices: Sequence[Device],
    usable: Sequence[Device],
    size: int,
) -> tuple[Device, ...] | None:
    """The best ``size`` of the usable devices that meet what is asked of their links."""
    if len(usable) < size:
        return None
    if any(device.mig for device in usable):
        return _select_mig(request, free, devices, usable, size)
    whole = frozenset(device.position for device in devices if fits.is_whole(device, free))
    groups = [list(usable)]
    if request.link == "same-numa" and size > 1:
        nodes = sorted({device.gpu.numa for device in usable}, key=lambda node: -1 if node is None else node)
        groups = [[device for device in usable if device.gpu.numa == node] for node in nodes]
    best: tuple[tuple[int, ...], tuple[Device, ...]] | None = None
    for group in groups:
        search = Search(
            topology=machine,
            candidates=tuple(device.position for device in group),
            free=whole,
            cost=_costs(request, free, group, whole, size),
            pairwise_nvlink=request.link == "nvlink",
        )
        positions = best_set(search, size)
        if positions is None:
            continue
        chosen = tuple(device for device in group if device.position in positions)
        rank = _rank(request, free, machine, whole, chosen)
        if best is None or rank > best[0]:
            best = (rank, chosen)
    return None if best is None else best[1]


def _costs(
    request: GpuRequest, free: Occupation, group: Sequence[Device], whole: frozenset[int], size: int
) -> tuple[int, ...]:
    """Wishes three to five as one number each, so that sums of it compare in that order."""
    wishes = [_wishes(request, free, device, whole) for device in group]
    least = [min(column) for column in zip(*wishes, strict=True)]
    spans = [
        size * (max(column) - low) + 1 for column, low in zip(zip(*wishes, strict=True), least, strict=True)
    ]
    costs = []
    for wish in wishes:
        cost = 0
        for value, low, span in zip(wish, least, spans, strict=True):
            cost = cost * span + value - low
        costs.append(cost)
    return tuple(costs)


def _wishes(
    request: GpuRequest, free: Occupation, device: Device, whole: frozenset[int]
) -> tuple[int, int, int]:
    """What taking this device wastes: a free GPU opened to sharing, its memory, what is left over of it."""
    if request.share is None:
        return (0, device.memory_bytes // MIB, 0)
    left = fits.share_left(device, free) - request.share
    return (int(device.position in whole), device.memory_bytes // MIB, left // MIB)


def _rank(
    request: GpuRequest,
    free: Occupation,
    machine: Topology,
    whole: frozenset[int],
    chosen: Sequence[Device],
) -> tuple[int, ...]:
    """The six wishes as a tuple: the higher, the better."""
    positions = [device.position for device in chosen]
    wishes = [_wishes(request, free, device, whole) for device in chosen]
    return (
        link_sum(machine, positions),
        link_sum(machine, sorted(whole.difference(positions))),
        *(-sum(column) for column in zip(*wishes, strict=True)),
        *(-position for position in positions),
    )


def _select_mig(
    request: GpuRequest, free: Occupation, devices: Sequence[Device], usable: Sequence[Device], size: int
) -> tuple[Device, ...] | None:
    """MIG devices: from GPUs whose devices are in use already, so that others can be partitioned anew.

    NVLinks join GPUs, not MIG devices, so ``link: nvlink`` is met by a single one only.
    """
    if request.link == "nvlink" and size > 1:
        return None
    busy = Counter(device.position for device in devices if device.mig and fits.holds_of(device, free))

    def preference(device: Device) -> tuple[int, int, int, int]:
        slot = device.mig.gpu_instance if device.mig else 0
        return (-busy[device.position], device.memory_bytes, device.position, slot)

    groups = [list(usable)]
    if request.link == "same-numa" and size > 1:
        nodes = sorted({device.gpu.numa for device in usable}, key=lambda node: -1 if node is None else node)
        groups = [[device for device in usable if device.gpu.numa == node] for node in nodes]
    fitting = [sorted(group, key=preference)[:size] for group in groups if len(group) >= size]
    if not fitting:
        return None
    best = min(fitting, key=lambda group: [preference(device) for device in group])
    return tuple(device for device in devices if device in best)


def _placement(
    request: GpuRequest,
    free: Occupation,
    machine: Topology,
    devices: Sequence[Device],
    verdicts: Sequence[Verdict | None],
    chosen: tuple[Device, ...],
) -> Placement:
    mig = any(device.mig for device in chosen)
    alternatives = None if mig else _Alternatives(request, free, machine, devices, chosen)
    choices = []
    for device, verdict in zip(devices, verdicts, strict=True):
        if verdict is not None:
            choices.append(Choice(device.uuid, False, verdict.clause, verdict.word))
        elif device in chosen:
            choices.append(Choice(device.uuid, True, _why_chosen(request, chosen)))
        elif alternatives is None:
            choices.append(Choice(device.uuid, False, _why_other_mig(device, chosen)))
        else:
            choices.append(Choice(device.uuid, False, alternatives.why_not(device)))
    total = 0 if mig else link_sum(machine, [device.position for device in chosen])
    return Placement(tuple(device.uuid for device in chosen), total, tuple(choices))


def _why_chosen(request: GpuRequest, chosen: Sequence[Device]) -> str:
    if request.uuid:
        return "free, asked for by its UUID"
    if request.share is not None and len(chosen) == 1:
        return f"has {fits.size(request.share)} to share"
    if len(chosen) == 1:
        return "free, and the rest stays best linked without it"
    return "free, in the best linked set"


def _why_other_mig(device: Device, chosen: Sequence[Device]) -> str:
    if any(device.position == other.position for other in chosen):
        return "an earlier MIG device of this GPU serves"
    return "a MIG device of another GPU serves"


class _Alternatives:
    """What would have been worse with another GPU in the place of a chosen one."""

    WORSE = (
        "another set has faster links",
        "left free: the others would stay less well linked without it",
        "left whole: another GPU is shared already",
        "left free: a smaller GPU serves",
        "another GPU has less left over",
    )

    def __init__(
        self,
        request: GpuRequest,
        free: Occupation,
        machine: Topology,
        devices: Sequence[Device],
        chosen: tuple[Device, ...],
    ) -> None:
        self._request, self._free, self._machine, self._chosen = request, free, machine, chosen
        self._whole = frozenset(device.position for device in devices if fits.is_whole(device, free))
        taken = [device.position for device in chosen]
        stay = self._whole.difference(taken)
        self._to_chosen = [sum(row[p] for p in taken) for row in machine.score]
        self._to_free = [sum(row[p] for p in stay) for row in machine.score]

    def why_not(self, device: Device) -> str:
        """The first of the wishes that even the best exchange for this device fails."""
        gains = [
            self._gain(out, device)
            for out in self._chosen
            if fits.links_allow(
                self._request, self._machine, (*(d for d in self._chosen if d is not out), device)
            )
        ]
        if not gains:
            return "on another NUMA node" if self._request.link == "same-numa" else "not linked to the chosen"
        for gain, word in zip(max(gains), self.WORSE, strict=True):
            if gain < 0:
                return word
        return "an equal one with a lower index was taken"

    def _gain(self, out: Device, into: Device) -> tuple[int, ...]:
        """What an exchange changes in wishes one to five; a gain is positive."""
        a, b = out.position, into.position
        between = self._machine.score[a][b]
        own = self._to_chosen[b] - between - self._to_chosen[a]
        rest = 0
        if a in self._whole:
            rest += self._to_free[a] - (between if b in self._whole else 0)
        if b in self._whole:
            rest -= self._to_free[b]
        before = _wishes(self._request, self._free, out, self._whole)
        after = _wishes(self._request, self._free, into, self._whole)
        return (own, rest, *(mine - theirs for mine, theirs in zip(before, after, strict=True)))


def _refusal(
    request: GpuRequest,
    machine: Topology,
    devices: Sequence[Device],
    verdicts: Sequence[Verdict | None],
    usable: Sequence[Device],
) -> NoPlacement:
    count = max(request.count, 1)
    able = [d for d, v in zip(devices, verdicts, strict=True) if v is None or not v.lasting]
    # A GPU that was lost before the first look may be anything: it is counted as one that fits.
    unknown = sum(device.is_unknown for device in able)
    known = [device for device in able if not device.is_unknown]
    needed = count - unknown
    later = needed < 1 or _select(request, Occupation(), machine, devices, known, needed) is not None
    by_links = "on another NUMA node" if request.link == "same-numa" else "not linked to enough others"
    apart = len(usable) >= count
    choices = []
    reasons: Counter[str] = Counter()
    phrases: Counter[str] = Counter()
    for device, verdict in zip(devices, verdicts, strict=True):
        if verdict is None:
            word = "link" if apart else ""
            choices.append(Choice(device.uuid, False, by_links if apart else "free", word))
        else:
            reasons[verdict.word] += 1
            phrases[verdict.phrase] += 1
            choices.append(Choice(device.uuid, False, verdict.clause, verdict.word))
    if apart:
        reasons["link"] = len(usable)
    return NoPlacement(
        possible_later=later,
        message=_message(request, phrases, len(usable), apart=apart, later=later, able=len(able)),
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        free=len(usable),
        choices=tuple(choices),
    )


def _message(
    request: GpuRequest, phrases: Counter[str], usable: int, *, apart: bool, later: bool, able: int
) -> str:
    told = sorted(phrases.items(), key=lambda item: (-item[1], item[0]))
    rest = ", ".join(f"{count} {phrase}" for phrase, count in told)
    links = {"same-numa": "on one NUMA node", "nvlink": "joined pairwise by NVLink"}.get(request.link, "")
    count = max(request.count, 1)
    if later:
        free = f"{usable} free, but not {count} {links}" if apart else f"{usable} free"
    elif able >= count:
        free = f"and no {count} on this machine are {links}"
    else:
        free = f"and {f'only {able}' if able else 'none'} of this machine can ever fit"
    return f"{fits.asked(request)}, {free}" + (f": {rest}" if rest else "")
