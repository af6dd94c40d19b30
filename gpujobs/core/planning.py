"""What would happen to a job if it were submitted now.

The GPUs, why each other one was not chosen, the mounts, the equivalent ``docker run`` line. Nothing is done; the
server and ``plan --simulate`` ask the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpujobs.core import export
from gpujobs.core.container import Image, Mount, Order, asked_in_memory, cpus_near, in_memory
from gpujobs.core.cuda import needs_newer_driver
from gpujobs.core.decide import View, check_possible, holdings, memory_of, shape_of
from gpujobs.core.job import Allocation, JobId, Owner
from gpujobs.core.place import Choice, NoPlacement, place
from gpujobs.core.spec import JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The outcome.

    Attributes:
        gpus: The UUIDs it would get now; empty where it gets none or would wait.
        reasons: Every device of the machine with why it was chosen or not.
        starts: Whether it could start now, were it first in line.
        message: What it would wait for, or what will go wrong; empty for nothing.
        order: What its container would be made of; None where it would wait.
        indexes: NVML's index of each GPU, and of each MIG device's GPU, by UUID: for people.
    """

    gpus: tuple[str, ...]
    reasons: tuple[Choice, ...]
    starts: bool
    message: str
    order: Order | None
    indexes: Mapping[str, int] = field(default_factory=dict)


def plan(
    spec: JobSpec, owner: Owner, image: Image, view: View, *, runtime: str = "nvidia",
    ceilings: Mapping[str, int] | None = None, defaults: tuple[tuple[str, str], ...] = (),
) -> Plan:  # fmt: skip
    """Place a job on the machine as it is.

    Raises:
        Refused: It can never run there.
    """
    shape = shape_of(spec)
    check_possible(shape, view)
    outcome = place(shape.gpus, holdings(view.queue.active), view.avoid, view.inventory)
    indexes = {uuid: gpu.index for gpu in view.inventory.gpus for uuid in (gpu.uuid, *(mig.uuid for mig in gpu.mig))}
    if isinstance(outcome, NoPlacement):
        return Plan(gpus=(), reasons=outcome.choices, starts=False, message=outcome.message, order=None,
                    indexes=indexes)  # fmt: skip
    allocation = Allocation(gpus=outcome.uuids, cpus=shape.cpus, memory=memory_of(shape, view))
    chosen = [gpu for uuid in outcome.uuids if (gpu := view.inventory.by_uuid(uuid)) is not None]
    home = f"/home/{owner.name}"
    mounts = tuple(
        Mount(source=source_of(owner, volume.type, volume.source), target=volume.target, read_only=volume.read_only)
        for volume in spec.volumes
        if volume.type != "tmpfs"
    )
    tmpfs = asked_in_memory(spec, owner)
    if home not in {mount.target for mount in mounts} | set(tmpfs):
        tmpfs[home] = in_memory(owner)
    order = Order(
        server="", job=JobId(0), attempt=1, nonce="", owner=owner, spec=spec, allocation=allocation, image=image,
        control="", home=home, runtime=runtime, visible=",".join(outcome.uuids) or "void", mounts=mounts, tmpfs=tmpfs,
        ceilings=ceilings or {}, near=cpus_near(chosen, shape.cpus, int(view.host.cpus)), defaults=defaults,
    )  # fmt: skip
    warning = needs_newer_driver(image, view.inventory) if outcome.uuids else None
    return Plan(gpus=outcome.uuids, reasons=outcome.choices, starts=True, message=warning or "", order=order,
                indexes=indexes)  # fmt: skip


def source_of(owner: Owner, kind: str, source: str) -> str:
    """The host path of a mount: a named volume is a directory in its owner's home, nobody else's to name."""
    return source if kind == "bind" else f"{owner.home}/.local/share/gpujobs/volumes/{source}"


def as_row(outcome: Plan) -> dict[str, Any]:
    """The contract's JSON of a plan."""
    order = outcome.order
    return {
        "gpus": list(outcome.gpus),
        "reasons": [
            {"uuid": c.uuid, "index": outcome.indexes.get(c.uuid), "chosen": c.chosen, "reason": c.reason}
            for c in outcome.reasons
        ],
        "starts": outcome.starts,
        "message": outcome.message or None,
        "mounts": [] if order is None else [
            {"source": m.source, "target": m.target, "read_only": m.read_only} for m in order.mounts
        ],
        "docker_run": None if order is None else export.docker_run(order),
        "compose": None if order is None else export.compose(order),
    }  # fmt: skip
