"""How GPUs reach each other, as NVML tells it: NVLinks, NVSwitches, PCIe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Final, TypeAlias

import pynvml

from gpujobs.adapters.nvmlsession import Answer, Handle
from gpujobs.core.inventory import Link, pair

Pairs = dict[tuple[str, str], int]

PATHS: Final[Mapping[int, Link]] = {
    pynvml.NVML_TOPOLOGY_INTERNAL: Link.BOARD,
    pynvml.NVML_TOPOLOGY_SINGLE: Link.SINGLE_SWITCH,
    pynvml.NVML_TOPOLOGY_MULTIPLE: Link.MULTI_SWITCH,
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: Link.HOST_BRIDGE,
    pynvml.NVML_TOPOLOGY_NODE: Link.NODE,
    pynvml.NVML_TOPOLOGY_SYSTEM: Link.SYSTEM,
}


Query: TypeAlias = Callable[..., Any]
"""How NVML is asked: :meth:`gpujobs.adapters.nvmlsession.Session.query`."""


@dataclass(frozen=True, slots=True)
class Links:
    """The links of pairs of GPUs, the smaller UUID first.

    Attributes:
        best: The best path of each pair.
        nvlinks: The number of NVLinks, where there are any.
        pcie: The path over PCIe.
    """

    best: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    nvlinks: Mapping[tuple[str, str], int] = field(default_factory=dict)
    pcie: Mapping[tuple[str, str], Link] = field(default_factory=dict)


def read(query: Query, handles: Mapping[str, Handle], addresses: Mapping[str, str], before: Links) -> Links:
    """The links of all GPUs that are there.

    Args:
        query: Asks NVML.
        handles: The GPUs that are there, by UUID.
        addresses: The UUID of each GPU, lost ones too, by its PCI bus id.
        before: What was read the last time; pairs with a GPU that is not there now are taken over.

    Returns:
        ``before`` itself where nothing changed, so that whoever keeps something for it can tell by identity.
    """
    nvlinks = _nvlinks(query, handles, addresses)
    pcie: dict[tuple[str, str], Link] = {}
    for a, b in combinations(sorted(handles), 2):
        level = query("nvmlDeviceGetTopologyCommonAncestor", handles[a], handles[b])
        if level in PATHS:
            pcie[a, b] = PATHS[level]
    there = handles.keys()
    gone_nvlinks = {key: count for key, count in before.nvlinks.items() if not there >= set(key)}
    gone_pcie = {key: path for key, path in before.pcie.items() if not there >= set(key)}
    nvlinks = gone_nvlinks | nvlinks
    pcie = gone_pcie | pcie
    best = pcie | dict.fromkeys(nvlinks, Link.NVLINK)
    links = Links(best, nvlinks, pcie)
    return before if links == before else links


def bus_id(pci: Answer) -> str:
    """The PCI address of NVML's PciInfo, in one spelling: ``00000000:07:00.0``."""
    text = pci.busId
    return (text.decode(errors="replace") if isinstance(text, bytes) else str(text)).upper()


def _nvlinks(query: Query, handles: Mapping[str, Handle], addresses: Mapping[str, str]) -> Pairs:
    """The number of active NVLinks of each pair.

    Links that end at NVSwitches join a GPU with every other one that has such links: a pair has as many as
    the one with fewer of them. Where the driver cannot tell what is at the far end, an address that is no
    GPU's is taken for a switch's.
    """
    direct: dict[str, Counter[str]] = {uuid: Counter() for uuid in handles}
    switched: Counter[str] = Counter()
    for uuid, handle in handles.items():
        for number in range(pynvml.NVML_NVLINK_MAX_LINKS):
            if query("nvmlDeviceGetNvLinkState", handle, number, odd=True) != pynvml.NVML_FEATURE_ENABLED:
                continue
            pci = query("nvmlDeviceGetNvLinkRemotePciInfo", handle, number, odd=True)
            kind = query("nvmlDeviceGetNvLinkRemoteDeviceType", handle, number, odd=True)
            other = None if pci is None else addresses.get(bus_id(pci))
            if other is not None:
                direct[uuid][other] += 1
            elif kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH or (kind is None and pci is not None):
                switched[uuid] += 1
    counts: Pairs = {}
    for a, b in combinations(sorted(handles), 2):
        count = max(direct[a][b], direct[b][a]) + min(switched[a], switched[b])
        if count:
            counts[pair(a, b)] = count
    return counts
