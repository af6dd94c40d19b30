"""Which set of GPUs is best linked: the search behind :mod:`gpujobs.core.place`.

A pair of GPUs scores 100 for each NVLink between them plus 10 to 60 for the PCIe path below it; a set scores
the sum of its pairs. These are the published scores of NVIDIA's go-gpuallocator (``calculateGPUPairScore`` in
gpuallocator/besteffort_policy.go, which stops at 12 NVLinks; the same 100 for each is carried on above).

What is wanted, in this order: the highest score of the set itself, the highest score of the GPUs that stay
free, the lowest sum of costs (what a cost is, the caller says), the lowest indexes. Taking the best pair
first and adding to it would be wrong: links are no hierarchy, and the best trio need not contain the best
pair.

Up to :data:`EXACT` candidates every set is looked at. Above that the search is exact within each link domain
(a group of GPUs that reach each other at least at some level), fills as few domains as it can where one does
not suffice, and then exchanges single GPUs as long as that helps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from gpujobs.core.inventory import Inventory, Link

NVLINK_SCORE: Final = 100
PCIE_SCORE: Final = {
    Link.SYSTEM: 10,
    Link.NODE: 20,
    Link.HOST_BRIDGE: 30,
    Link.MULTI_SWITCH: 40,
    Link.SINGLE_SWITCH: 50,
    Link.BOARD: 60,
}
EXACT: Final = 16
"""The most candidates for which every set is looked at: 16 choose 8 is 12,870 sets."""

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """The links of one machine as numbers; positions are those of :attr:`Inventory.gpus`.

    Attributes:
        score: Symmetric; what a pair's links are worth, zero on the diagonal.
        nvlinked: Symmetric; 1 where an NVLink joins the pair.
    """

    score: Rows
    nvlinked: Rows


@dataclass(frozen=True, slots=True)
class Search:
    """One question: the best ``size`` of the candidates.

    Attributes:
        topology: The machine's links.
        candidates: Positions that may be taken, in the order in which equals are preferred.
        free: Positions that are wholly free now, whether candidates or not: what stays of them is to stay
            well linked.
        cost: For each candidate a number that is to be small in sum: zero or more.
        pairwise_nvlink: Whether every pair of the set must have an NVLink.
    """

    topology: Topology
    candidates: tuple[int, ...]
    free: frozenset[int]
    cost: tuple[int, ...]
    pairwise_nvlink: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """A :class:`Search` of one size folded into integers, so that ``max`` alone finds the best set.

    A set's value is the sum of its nodes and pairs. From high bits to low it holds: minus the number of pairs
    that are not allowed, the set's own score, the score of what stays free, minus the cost, and one bit for
    each candidate (the first highest), which breaks ties by index and tells afterwards which set it was.
    """

    node: tuple[int, ...]
    pair: Rows
    forbidden: int  # what one pair that is not allowed takes away

    def value(self, chosen: Sequence[int]) -> int:
        """The value of a set of candidates, given by their places in :attr:`Search.candidates`."""
        total = sum(self.node[i] for i in chosen)
        for place, i in enumerate(chosen):
            row = self.pair[i]
            total += sum(row[j] for j in chosen[place + 1 :])
        return total

    def members(self, value: int) -> tuple[int, ...]:
        """The set that has this value."""
        count = len(self.node)
        return tuple(i for i in range(count) if value >> (count - 1 - i) & 1)

    def allowed(self, value: int) -> bool:
        """Whether the set of this value has no forbidden pair."""
        return value > -(self.forbidden >> 1)


_last: tuple[object, object, object, tuple[str, ...], Topology] | None = None


def topology_of(inventory: Inventory) -> Topology:
    """The scores of an inventory's links.

    The last answer is kept: successive snapshots share the very same mappings of links as long as the driver
    runs, and a decision asks for it thousands of times.
    """
    global _last  # noqa: PLW0603 - a memo of a pure function, held by identity since mappings have no hash
    uuids = tuple(gpu.uuid for gpu in inventory.gpus)
    if (
        _last is not None
        and _last[0] is inventory.links
        and _last[1] is inventory.nvlinks
        and _last[2] is inventory.pcie
        and _last[3] == uuids
    ):
        return _last[4]
    count = len(uuids)
    score = [[0] * count for _ in uuids]
    nvlinked = [[0] * count for _ in uuids]
    for i, a in enumerate(uuids):
        for j in range(i + 1, count):
            b = uuids[j]
            links = inventory.nvlink_count(a, b)
            path = inventory.pcie_path(a, b)
            score[i][j] = score[j][i] = NVLINK_SCORE * links + (0 if path is None else PCIE_SCORE[path])
            nvlinked[i][j] = nvlinked[j][i] = int(links > 0)
    built = Topology(tuple(map(tuple, score)), tuple(map(tuple, nvlinked)))
    _last = (inventory.links, inventory.nvlinks, inventory.pcie, uuids, built)
    return built


def link_sum(topology: Topology, chosen: Sequence[int]) -> int:
    """The sum of the pair scores within a set of positions."""
    return sum(topology.score[a][b] for place, a in enumerate(chosen) for b in chosen[place + 1 :])


def best_set(search: Search, size: int) -> tuple[int, ...] | None:
    """The best set of ``size`` candidates, as positions in ascending order of preference.

    Returns:
        None where there are fewer candidates than that, or none of the sets is allowed.
    """
    count = len(search.candidates)
    if size < 1 or size > count:
        return None
    scale = _scale(search, size)
    if count <= EXACT or size == 1:
        value = _exact(scale.node, scale.pair, size)
    else:
        value = scale.value(_large(search, scale, size))
    if not scale.allowed(value):
        return None
    return tuple(search.candidates[i] for i in scale.members(value))


def _scale(search: Search, size: int) -> Scale:
    """Fold the four wishes into one integer each for node and pair.

    The score of what stays free is that of all the free ones, less the links of each taken one to the free,
    plus the pairs of taken ones, which were subtracted twice: a sum over nodes and pairs again.
    """
    score, candidates = search.topology.score, search.candidates
    count = len(candidates)
    degree = [sum(score[c][f] for f in search.free) if c in search.free else 0 for c in candidates]
    # The size is fixed: a constant for each node changes no comparison, and small numbers are fast ones.
    cheapest = min(search.cost)
    cost = [value - cheapest for value in search.cost]
    among = sum(score[a][b] for i, a in enumerate(candidates) for b in candidates[i + 1 :])
    cost_shift = count
    rest_shift = cost_shift + (size * max(cost)).bit_length()
    own_shift = rest_shift + (size * max(degree) + among).bit_length() + 1
    forbidden = 1 << (own_shift + among.bit_length() + 2)
    node = tuple(
        (1 << (count - 1 - i)) - (cost[i] << cost_shift) - (degree[i] << rest_shift) for i in range(count)
    )
    pair = []
    for a in candidates:
        row = []
        for b in candidates:
            worth = score[a][b]
            folded = worth << own_shift
            if a in search.free and b in search.free:
                folded += worth << rest_shift
            if search.pairwise_nvlink and a != b and not search.topology.nvlinked[a][b]:
                folded -= forbidden
            row.append(folded)
        pair.append(tuple(row))
    return Scale(node, tuple(pair), forbidden)


@lru_cache(maxsize=1024)
def _exact(node: tuple[int, ...], pair: Rows, size: int) -> int:
    """The highest value of all sets of ``size``.

    The candidates are halved. For each half the value of each of its sets is tabulated; for each set of the
    left half, what it shares with the right one is a number for each right candidate, tabulated again over
    the two quarters of the right. A whole set then costs two additions.
    """
    count = len(node)
    if size == 1:
        return max(node)
    half = count // 2
    left = _subset_values(node[:half], tuple(row[:half] for row in pair[:half]))
    right = _subset_values(node[half:], tuple(row[half:] for row in pair[half:]))
    width = count - half
    quarter = width // 2
    low_mask = (1 << quarter) - 1
    by_size: list[list[tuple[int, int, int]]] = [[] for _ in range(width + 1)]
    for mask, value in enumerate(right):
        by_size[mask.bit_count()].append((mask & low_mask, mask >> quarter, value))
    shared: list[tuple[int, ...]] = [(0,) * width]
    best: int | None = None
    for mask in range(1 << half):
        if mask:
            top = mask.bit_length() - 1
            row = pair[top][half:]
            shared.append(tuple(map(int.__add__, shared[mask ^ (1 << top)], row)))
        wanted = size - mask.bit_count()
        if not 0 <= wanted <= width:
            continue
        low = _subset_sums(shared[mask][:quarter])
        high = _subset_sums(shared[mask][quarter:])
        value = left[mask] + max([own + low[a] + high[b] for a, b, own in by_size[wanted]])
        if best is None or value > best:
            best = value
    assert best is not None
    return best


def _subset_sums(values: Sequence[int]) -> list[int]:
    """The sum of each subset, at the index whose bits name it."""
    sums = [0]
    for value in values:
        sums += [total + value for total in sums]
    return sums


def _subset_values(node: Sequence[int], pair: Rows) -> list[int]:
    """The value of each subset, at the index whose bits name it."""
    values = [0]
    for i, own in enumerate(node):
        shared = _subset_sums(pair[i][:i])
        values += [value + own + extra for value, extra in zip(values, shared, strict=True)]
    return values


def _large(search: Search, scale: Scale, size: int) -> tuple[int, ...]:
    """A best set where there are too many candidates to look at all sets; places in the candidates."""
    score = search.topology.score
    own = tuple(tuple(score[a][b] for b in search.candidates) for a in search.candidates)
    everything = tuple(range(len(own)))
    levels = sorted({value for row in own for value in row}, reverse=True)
    found: dict[tuple[int, ...], int] = {}
    partitions: list[list[tuple[int, ...]]] = [[(i,) for i in everything]]
    for level in levels:
        domains = _domains(own, everything, level)
        if domains == partitions[-1]:
            continue
        for domain in domains:
            if len(domain) >= size:
                chosen = _within(search, scale, own, domain, size)
                if chosen is not None:
                    found[chosen] = scale.value(chosen)
        partitions.append(domains)
        if len(domains) == 1:
            break
    if not found:
        for domains, inner in zip(partitions[1:], partitions, strict=False):
            for domain in domains:
                if len(domain) >= size:
                    chosen = _fill(search, scale, own, [d for d in inner if d[0] in domain], size)
                    found[chosen] = scale.value(chosen)
            if found:
                break
    return _exchange(scale, max(found, key=found.__getitem__))


def _domains(own: Rows, members: Iterable[int], level: int) -> list[tuple[int, ...]]:
    """Groups whose members reach each other over pairs of at least this score; by their first member."""
    left = list(members)
    groups = []
    while left:
        group = [left.pop(0)]
        for member in group:  # grows while it is walked
            near = [other for other in left if own[member][other] >= level]
            group += near
            left = [other for other in left if other not in near]
        groups.append(tuple(sorted(group)))
    return groups


def _within(
    search: Search, scale: Scale, own: Rows, domain: tuple[int, ...], size: int
) -> tuple[int, ...] | None:
    """The exact best set within one domain; None where it is too large to tell."""
    if size == len(domain):
        return domain
    if len(domain) <= EXACT:
        node = tuple(scale.node[i] for i in domain)
        pair = tuple(tuple(scale.pair[i][j] for j in domain) for i in domain)
        return scale.members(_exact(node, pair, size))
    if len({own[a][b] for a in domain for b in domain if a < b}) > 1:
        return None
    # All pairs are worth the same (an NVSwitch): what counts is each by itself, and how many are free ones.
    ranked = sorted(domain, key=lambda i: -scale.node[i])
    free = [i for i in ranked if search.candidates[i] in search.free]
    used = [i for i in ranked if search.candidates[i] not in search.free]
    sets = [
        tuple(sorted((*free[:n], *used[: size - n])))
        for n in range(size + 1)
        if n <= len(free) and size - n <= len(used)
    ]
    return max(sets, key=scale.value)


def _fill(
    search: Search, scale: Scale, own: Rows, domains: list[tuple[int, ...]], size: int
) -> tuple[int, ...]:
    """As few domains as possible: the largest ones whole, the remainder from the smallest that has enough."""
    left = sorted(domains, key=lambda domain: (-len(domain), domain))
    chosen: list[int] = []
    while size and len(left[0]) <= size:
        whole = left.pop(0)
        chosen += whole
        size -= len(whole)
    if size:
        last = min((d for d in left if len(d) >= size), key=lambda domain: (len(domain), domain))
        part = _within(search, scale, own, last, size)
        chosen += part if part is not None else sorted(last, key=lambda i: -scale.node[i])[:size]
    return tuple(sorted(chosen))


def _exchange(scale: Scale, chosen: tuple[int, ...]) -> tuple[int, ...]:
    """Exchange one member for one outsider, the best exchange each time, until none helps."""
    inside = set(chosen)
    everything = range(len(scale.node))
    near = [sum(scale.pair[i][j] for j in chosen) for i in everything]
    while True:
        outside = [i for i in everything if i not in inside]
        gain, out, into = max(
            (
                (scale.node[b] + near[b] - scale.pair[a][b] - scale.node[a] - near[a], a, b)
                for a in inside
                for b in outside
            ),
            default=(0, 0, 0),
        )
        if gain <= 0:
            return tuple(sorted(inside))
        inside.remove(out)
        inside.add(into)
        for i in everything:
            near[i] += scale.pair[i][into] - scale.pair[i][out]
