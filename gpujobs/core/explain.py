"""Why a job waits: the word and the sentence, made when somebody asks, never for the whole queue."""

from __future__ import annotations

from dataclasses import dataclass

from gpujobs.core.decide import View, cpus_suffice, cpus_used, holdings
from gpujobs.core.job import JobId
from gpujobs.core.place import NoPlacement, place
from gpujobs.core.queue import Lane, Shape


@dataclass(frozen=True, slots=True)
class Wait:
    """One word of the contract, and the sentence."""

    reason: str
    message: str


PASSING = Wait("resources", "its place in the queue is changing at this moment")
"""Of a job that the queue has not, for the blink between what is on disk and what the view was made of."""


class Explainer:
    """Answers for one view; the work for the jobs in front is done once.

    Args:
        view: The queue and the machine as they are.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._fronts: dict[bool, tuple[JobId, Wait] | None] = {}

    def why(self, job: JobId) -> Wait:
        """Why a waiting job has not started; there is always a reason."""
        shape = self._view.queue.shapes.get(job.key)
        if shape is None:
            return PASSING
        front = self._front(with_gpus=bool(shape.gpus.count))
        if front is None or front[0] == job:
            return front[1] if front is not None else Wait("resources", "it starts next")
        first, wait = front
        return Wait("priority", f"job {first} is first in line: {wait.message}")

    def _front(self, *, with_gpus: bool) -> tuple[JobId, Wait] | None:
        if with_gpus not in self._fronts:
            self._fronts[with_gpus] = self._find_front(with_gpus=with_gpus)
        return self._fronts[with_gpus]

    def _find_front(self, *, with_gpus: bool) -> tuple[JobId, Wait] | None:
        view = self._view
        heads: list[tuple[tuple[int, int], Shape, Lane]] = [
            (lane.head, shape, lane) for shape, lane in view.queue.lanes.items() if bool(shape.gpus.count) == with_gpus
        ]
        if not heads:
            return None
        key, shape, _ = min(heads, key=lambda head: head[0])
        job = JobId.of_key(*key)
        if not with_gpus:
            if cpus_suffice(shape, cpus_used(view.queue), view.host):
                return job, Wait("resources", "it starts next")
            return job, Wait("resources", "all CPUs for jobs without GPUs are in use")
        if view.inventory.problem:
            return job, Wait("resources", f"no GPU can be given now: {view.inventory.problem}")
        outcome = place(shape.gpus, holdings(view.queue.active), view.avoid, view.inventory)
        if isinstance(outcome, NoPlacement):
            return job, Wait("resources", outcome.message)
        return job, Wait("resources", "it starts next")
