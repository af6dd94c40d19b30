"""Policy: what is to be done now, as a pure function of what is known.

GPU jobs start strictly first in, first out: when the oldest does not fit, no younger GPU job passes it. Jobs
without GPUs have a line of their own, bounded by the host's CPUs, so that neither kind holds up the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpujobs.core.errors import Refused
from gpujobs.core.inventory import Inventory
from gpujobs.core.job import Allocation, JobId
from gpujobs.core.place import Choice, Holding, NoPlacement, Placement, place
from gpujobs.core.queue import ActiveJob, Key, QueueState, Shape
from gpujobs.core.spec import JobSpec

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine that jobs run on: CPUs, and memory in bytes."""

    cpus: float
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the settings say about deciding.

    Attributes:
        memory_reserve: The part of the host's memory that no job is given, 0-1.
        cpu_job_memory: The memory limit of a job without GPUs that does not name one, in bytes.
    """

    memory_reserve: float = 0.1
    cpu_job_memory: int = 8 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Begin an attempt of this job with this allocation; ``choices`` say why these GPUs."""

    job: JobId
    allocation: Allocation
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """End this running job."""

    job: JobId
    reason: str
    message: str


Decision = Start | Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that a decision may look at.

    Attributes:
        avoid: GPUs that must not be given, by UUID, with the clause that says why.
    """

    queue: QueueState
    inventory: Inventory
    host: Host
    policy: Policy
    avoid: Mapping[str, str] = field(default_factory=dict)


def shape_of(spec: JobSpec) -> Shape:
    """What a job asks for. It depends on nothing else, so it holds however long the job waits."""
    return Shape(gpus=spec.gpus, cpus=spec.cpus or 0.0, memory=spec.mem_limit)


def memory_of(shape: Shape, view: View) -> int:
    """The memory limit of a job that starts now, in bytes: what it asks for, else its GPUs' share of the host's.

    The share is of the GPUs that are seen, and there are none while the driver is away: it is made at the start.
    """
    if shape.memory is not None:
        return shape.memory
    usable = view.host.memory * (1 - view.policy.memory_reserve)
    if shape.gpus.count:
        return int(usable * min(1.0, shape.gpus.count / max(1, len(view.inventory.gpus))))
    return int(min(view.policy.cpu_job_memory, usable / 2))


def check_possible(shape: Shape, view: View) -> None:
    """Refuse what this machine can never run.

    Raises:
        Refused: With the reason and what there is instead.
    """
    if shape.cpus > view.host.cpus:
        raise Refused(
            f"cpus: {shape.cpus:g} asked, this machine has {view.host.cpus:g}",
            hint=f"Ask for {view.host.cpus:g} or fewer.",
        )
    if shape.memory is not None and shape.memory > view.host.memory:
        raise Refused(
            f"mem_limit: {shape.memory / GIB:.1f} GiB asked, this machine has {view.host.memory / GIB:.1f} GiB",
            hint="Ask for less memory.",
        )
    if not shape.gpus.count:
        return
    if view.inventory.problem:
        raise Refused(f"no GPU can be given here: {view.inventory.problem}", hint="`gpujobs gpus` shows the state.")
    outcome = place(shape.gpus, {}, {}, view.inventory)
    if isinstance(outcome, NoPlacement) and not outcome.possible_later:
        raise Refused(f"this can never start on this machine: {outcome.message}", hint="`gpujobs gpus` lists its GPUs.")


def holdings(active: Mapping[Key, ActiveJob]) -> dict[str, tuple[Holding, ...]]:
    """What is held on each GPU or MIG device, by UUID."""
    held: dict[str, tuple[Holding, ...]] = {}
    for job in active.values():
        for uuid in job.allocation.gpus:
            held[uuid] = (*held.get(uuid, ()), Holding(job=str(job.id), share=job.share))
    return held


def decide(now: float, view: View) -> tuple[Decision, ...]:
    """What to do now; deciding again on the outcome gives nothing more.

    Args:
        now: Seconds since the epoch.
        view: The queue and the machine.
    """
    return (*_overdue(now, view.queue), *_starts(view))


def _overdue(now: float, queue: QueueState) -> list[Stop]:
    return [
        Stop(job=job.id, reason="time-limit", message=f"its time limit of {job.time_limit:g} s was reached")
        for job in queue.active.values()
        if job.time_limit is not None and job.started_at is not None and not job.stopping
        and now >= job.started_at + job.time_limit
    ]  # fmt: skip


def next_deadline(queue: QueueState) -> float | None:
    """When the next time limit is reached, in seconds since the epoch."""
    return min(
        (
            job.started_at + job.time_limit
            for job in queue.active.values()
            if job.time_limit is not None and job.started_at is not None and not job.stopping
        ),
        default=None,
    )


def _starts(view: View) -> list[Start]:
    starts: list[Start] = []
    queue = view.queue
    held = holdings(queue.active)
    while (head := _head(queue, with_gpus=True)) is not None:
        job, shape = head
        outcome = place(shape.gpus, held, view.avoid, view.inventory)
        if isinstance(outcome, NoPlacement):
            break
        start = _start(job, shape, outcome, view)
        for uuid in start.allocation.gpus:
            held[uuid] = (*held.get(uuid, ()), Holding(job=str(job), share=shape.gpus.share))
        starts.append(start)
        queue = queue.dequeue(job)
    used = cpus_used(queue)
    while (head := _head(queue, with_gpus=False)) is not None:
        job, shape = head
        if not cpus_suffice(shape, used, view.host):
            break
        used += shape.cpus or 1.0
        starts.append(Start(job=job, allocation=Allocation(cpus=shape.cpus, memory=memory_of(shape, view))))
        queue = queue.dequeue(job)
    return starts


def cpus_used(queue: QueueState) -> float:
    """CPUs that the active jobs without GPUs have; one that names no number counts as one CPU."""
    return sum(job.allocation.cpus or 1.0 for job in queue.active.values() if not job.allocation.gpus)


def cpus_suffice(shape: Shape, used: float, host: Host) -> bool:
    """Whether a job without GPUs can start beside those that use so many CPUs; alone it always can."""
    return used == 0 or used + (shape.cpus or 1.0) <= host.cpus


def _head(queue: QueueState, *, with_gpus: bool) -> tuple[JobId, Shape] | None:
    heads = [(lane.head, shape) for shape, lane in queue.lanes.items() if bool(shape.gpus.count) == with_gpus]
    if not heads:
        return None
    key, shape = min(heads, key=lambda pair: pair[0])
    return JobId.of_key(*key), shape


def _start(job: JobId, shape: Shape, placement: Placement, view: View) -> Start:
    allocation = Allocation(gpus=placement.uuids, cpus=shape.cpus, memory=memory_of(shape, view))
    return Start(job=job, allocation=allocation, choices=placement.choices)
