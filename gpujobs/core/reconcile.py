"""Three truths compared: what the ledger says, what the Engine has, and which GPUs strangers' containers hold.

Run at start-up, after the Engine was away, and before anything is started. Pure: the caller acts.

    ledger says          the Engine has                      action
    ─────────────────────────────────────────────────────────────────────────────────────────
    starting, pulling    nothing                             Resume: begin the attempt again
    starting, pulling    our container, created              Resume: it is adopted by its name
    starting             our container, running              Adopt: check its devices, release it
    running, stopping    our container, running              Adopt
    any active           our container, exited               Adopt: its end is collected
    stopping             nothing, and none was recorded      Resume: it ends as asked, before one is made
    running, stopping    nothing, though one was recorded    Lost: it was removed behind our back
    any active           that name, not our nonce or hash    Lost: forged or changed; never touched
    ended, not removed   nothing                             Forget
    ended or unknown     our nonce, running                  Kill: it must not run
    other server's or made by hand, with GPUs                Foreign: those GPUs are taken
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpujobs.core.inventory import Inventory
from gpujobs.core.job import JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A container as the Engine shows it.

    Attributes:
        state: Docker's word: ``created running paused restarting removing exited dead``.
        visible: The value of NVIDIA_VISIBLE_DEVICES; None where it is not set.
        cuda_image: Its environment has CUDA_VERSION (what the runtime takes for "all" when nothing is set).
        devices: Host paths under HostConfig.Devices.
        requests: DeviceRequests as (count, ids); count -1 means all.
    """

    id: str
    name: str
    state: str
    labels: Mapping[str, str]
    runtime: str = "runc"
    visible: str | None = None
    cuda_image: bool = False
    devices: tuple[str, ...] = ()
    requests: tuple[tuple[int, tuple[str, ...]], ...] = ()
    image: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """An attempt as the ledger has it; ``active`` is False once it ended."""

    job: JobId
    attempt: int
    name: str
    nonce: str
    config: str
    state: str
    active: bool


@dataclass(frozen=True, slots=True)
class Resume:
    """Go through the attempt's steps from the first: each is safe to repeat."""

    job: JobId


@dataclass(frozen=True, slots=True)
class Adopt:
    """The container is ours and as it should be: go on from where it is."""

    job: JobId
    container: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The attempt cannot be found any more; it ends as failed, reason ``server``."""

    job: JobId
    message: str


@dataclass(frozen=True, slots=True)
class Forget:
    """An ended attempt's container is gone already."""

    job: JobId
    attempt: int


@dataclass(frozen=True, slots=True)
class Kill:
    """A container of ours runs that no active attempt stands for."""

    container: str
    name: str


Action = Resume | Adopt | Lost | Forget | Kill


def reconcile(server: str, recorded: Sequence[Recorded], seen: Iterable[Seen]) -> list[Action]:
    """What to do about each difference, by the table above.

    Args:
        server: This server's id.
        recorded: Every attempt whose container may still exist.
        seen: Every container of the Engine.
    """
    by_name = {container.name: container for container in seen}
    actions: list[Action] = []
    for row in recorded:
        container = by_name.get(row.name)
        if container is not None and _is_ours(row, server, container):
            actions += _ours(row, container)
        elif row.active:
            actions.append(_without(row, container))
        elif container is None:
            actions.append(Forget(row.job, row.attempt))
    names, nonces = {row.name for row in recorded}, {row.nonce for row in recorded}
    for container in by_name.values():
        if container.name in names or container.labels.get("gpujobs.server") != server:
            continue
        if container.labels.get("gpujobs.nonce") in nonces and container.state in ("running", "paused"):
            actions.append(Kill(container.id, container.name))
    return actions


def _is_ours(row: Recorded, server: str, container: Seen) -> bool:
    labels = container.labels
    return (
        labels.get("gpujobs.server") == server
        and labels.get("gpujobs.nonce") == row.nonce
        and (not row.config or labels.get("gpujobs.config") == row.config)
    )


def _ours(row: Recorded, container: Seen) -> list[Action]:
    if not row.active:
        return [Kill(container.id, container.name)] if container.state in ("running", "paused") else []
    if container.state == "created":
        return [Resume(row.job)]
    return [Adopt(row.job, container.id)]


def _without(row: Recorded, container: Seen | None) -> Action:
    if container is not None:
        return Lost(row.job, f"the container {row.name} is not the one that was made for it; it was left alone")
    if row.state in ("pulling", "starting") or (row.state == "stopping" and not row.config):
        return Resume(row.job)
    return Lost(row.job, f"its container {row.name} was removed by someone else")


_INDEX = re.compile(r"([0-9]+)(?::[0-9]+)?", re.ASCII)
"""A GPU by its index, or a MIG device by its GPU's index and its own."""
_EVERY = frozenset({"all", "nvidia.com/gpu=all"})
_NODE = re.compile(r"/dev/nvidia([0-9]+)", re.ASCII)

HOLDING = frozenset({"running", "paused", "restarting", "created"})
"""States in which a container holds its GPUs: a created one may be started at any moment."""


def gpus_of(container: Seen, inventory: Inventory, runtime: str = "nvidia") -> frozenset[str]:
    """The GPUs that a container of somebody else can use, by the rules of NVIDIA's runtime.

    Device requests beat the variable; ``all`` in a list means all, ``void`` means nothing; under the nvidia
    runtime an unset variable with CUDA_VERSION set means all.
    """
    every = frozenset(gpu.uuid for gpu in inventory.gpus)
    held = {
        gpu.uuid
        for device in container.devices
        if (match := _NODE.fullmatch(device))
        for gpu in inventory.gpus
        if gpu.minor == int(match[1])
    }
    if container.requests:
        for count, ids in container.requests:
            if count == -1 or _EVERY.intersection(ids):
                return every
            held |= _named(ids or tuple(str(index) for index in range(max(0, count))), inventory)
        return frozenset(held)
    if container.runtime != runtime:
        return frozenset(held)
    if container.visible is None:
        return every if container.cuda_image else frozenset(held)
    words = [word.strip() for word in container.visible.split(",")]
    if "void" in words:
        return frozenset(held)
    if _EVERY.intersection(words):
        return every
    return frozenset(held | _named(words, inventory))


def _named(words: Sequence[str], inventory: Inventory) -> set[str]:
    found = set()
    for name in (word.removeprefix("nvidia.com/gpu=") for word in words):
        match = _INDEX.fullmatch(name)
        for gpu in inventory.gpus:
            by_index = match is not None and gpu.index == int(match[1])
            if by_index or name == gpu.uuid or any(name == mig.uuid for mig in gpu.mig):
                found.add(gpu.uuid)
    return found


def foreign(
    server: str, seen: Iterable[Seen], ours: frozenset[str], inventory: Inventory, runtime: str
) -> Mapping[str, str]:
    """GPUs held by containers that are not this server's, with the sentence that says whose they are.

    Args:
        server: This server's id.
        seen: Every container of the Engine.
        ours: Ids of the containers that the ledger stands for.
        inventory: The GPUs.
        runtime: The GPU runtime's name.
    """
    taken: dict[str, str] = {}
    for container in seen:
        if container.id in ours or container.state not in HOLDING:
            continue
        other = container.labels.get("gpujobs.server")
        whose = f"job {container.labels.get('gpujobs.job')} of another gpujobs server" if other not in (None, server) \
            else "a container that was not started by gpujobs"  # fmt: skip
        for uuid in gpus_of(container, inventory, runtime):
            taken.setdefault(uuid, f"{whose} ({container.name})")
    return taken
