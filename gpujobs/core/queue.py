"""The waiting and the active jobs as one immutable value that shares structure with its predecessors.

Jobs that ask for the same thing stand in one lane, oldest first, so that the work of a decision goes with the
number of distinct requests (shapes), not with the number of jobs. A lane is a tuple of short tuples: taking an
id out copies one of them and the outer tuple, which for 100,000 ids is about 200 references.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from immutables import Map

from gpujobs.core.job import Active, Allocation, Job, JobId, Queued
from gpujobs.core.spec import GpuRequest

_CHUNK = 512

Key = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a waiting job needs to start; jobs of one shape are interchangeable but for their order.

    Attributes:
        memory: The memory that it asks for, in bytes; None where that is left to its start.
    """

    gpus: GpuRequest
    cpus: float
    memory: int | None


@dataclass(frozen=True, slots=True)
class Lane:
    """Ids in ascending order."""

    chunks: tuple[tuple[Key, ...], ...] = ()

    @property
    def head(self) -> Key:
        """The oldest; the lane must not be empty."""
        return self.chunks[0][0]

    def __bool__(self) -> bool:
        return bool(self.chunks)

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    def __iter__(self) -> Iterator[Key]:
        for chunk in self.chunks:
            yield from chunk

    def _chunk_of(self, key: Key) -> int:
        return max(0, bisect_left(self.chunks, key, key=lambda chunk: chunk[-1]))

    def add(self, key: Key) -> Lane:
        """With this id, at its place."""
        if not self.chunks or (key > self.chunks[-1][-1] and len(self.chunks[-1]) >= _CHUNK):
            return Lane((*self.chunks, (key,)))
        at = min(self._chunk_of(key), len(self.chunks) - 1)
        grown = list(self.chunks[at])
        insort(grown, key)
        parts = (tuple(grown),) if len(grown) <= 2 * _CHUNK else (tuple(grown[:_CHUNK]), tuple(grown[_CHUNK:]))
        return Lane((*self.chunks[:at], *parts, *self.chunks[at + 1 :]))

    def remove(self, key: Key) -> Lane:
        """Without this id.

        Raises:
            KeyError: It is not in the lane.
        """
        at = self._chunk_of(key)
        if at >= len(self.chunks):
            raise KeyError(key)
        chunk = self.chunks[at]
        position = bisect_left(chunk, key)
        if position >= len(chunk) or chunk[position] != key:
            raise KeyError(key)
        shrunk = chunk[:position] + chunk[position + 1 :]
        return Lane((*self.chunks[:at], *((shrunk,) if shrunk else ()), *self.chunks[at + 1 :]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveJob:
    """What decisions need to know of a job that holds something."""

    id: JobId
    uid: int
    user: str
    name: str
    allocation: Allocation
    share: int | None = None
    started_at: float | None = None
    time_limit: float | None = None
    stopping: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """All jobs that have not ended.

    Attributes:
        lanes: The waiting ones by shape.
        shapes: The shape of each waiting job.
        active: Those that hold something.
    """

    lanes: Map[Shape, Lane] = field(default_factory=Map)
    shapes: Map[Key, Shape] = field(default_factory=Map)
    active: Map[Key, ActiveJob] = field(default_factory=Map)

    def enqueue(self, job_id: JobId, shape: Shape) -> QueueState:
        """With this job waiting, once, for what the shape says."""
        if self.shapes.get(job_id.key) == shape:
            return self
        state = self.dequeue(job_id)
        lane = state.lanes.get(shape, Lane()).add(job_id.key)
        return replace(state, lanes=state.lanes.set(shape, lane), shapes=state.shapes.set(job_id.key, shape))

    def dequeue(self, job_id: JobId) -> QueueState:
        """Without this waiting job; the same value where it was not waiting."""
        shape = self.shapes.get(job_id.key)
        if shape is None:
            return self
        lane = self.lanes[shape].remove(job_id.key)
        lanes = self.lanes.set(shape, lane) if lane else self.lanes.delete(shape)
        return replace(self, lanes=lanes, shapes=self.shapes.delete(job_id.key))

    def activate(self, job: ActiveJob) -> QueueState:
        """With this job holding its allocation, no longer waiting."""
        state = self.dequeue(job.id)
        return replace(state, active=state.active.set(job.id.key, job))

    def release(self, job_id: JobId) -> QueueState:
        """With this job gone and what it held free."""
        state = self.dequeue(job_id)
        if job_id.key not in state.active:
            return state
        return replace(state, active=state.active.delete(job_id.key))

    def apply(self, job: Job, shape: Shape) -> QueueState:
        """With this job as it now is."""
        if isinstance(job.state, Queued):
            return self.enqueue(job.id, shape)
        if isinstance(job.state, Active):
            return self.activate(active_of(job))
        return self.release(job.id)


def active_of(job: Job) -> ActiveJob:
    """The part of an active job that decisions look at."""
    state = job.state
    if not isinstance(state, Active):
        raise TypeError(f"job {job.id} holds nothing")
    return ActiveJob(
        id=job.id,
        uid=job.owner.uid,
        user=job.owner.name,
        name=job.spec.name,
        allocation=state.allocation,
        share=job.spec.gpus.share,
        started_at=getattr(state, "started_at", None),
        time_limit=job.spec.time_limit,
        stopping=type(state).__name__ == "Stopping",
    )
