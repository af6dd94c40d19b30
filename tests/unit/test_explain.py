"""Why a job waits: one word and the sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpujobs import testing
from gpujobs.core.decide import Host, Policy, View
from gpujobs.core.explain import PASSING, Explainer, Wait
from gpujobs.core.inventory import Health, Inventory
from gpujobs.core.job import Allocation, JobId
from gpujobs.core.queue import ActiveJob, QueueState, Shape
from gpujobs.core.spec import GpuRequest
from tests.unit.values import GIB

HOST = Host(cpus=4, memory=64 * GIB)


def shape(count: int, cpus: float = 0.0) -> Shape:
    return Shape(gpus=GpuRequest(count=count, max_count=count), cpus=cpus, memory=GIB)


def view(machine: Inventory, waiting: dict[JobId, Shape], active: list[ActiveJob] | None = None) -> View:
    queue = QueueState()
    for job in active or []:
        queue = queue.activate(job)
    for job_id, wanted in waiting.items():
        queue = queue.enqueue(job_id, wanted)
    return View(queue=queue, inventory=machine, host=HOST, policy=Policy())


def holder(number: int, *gpus: str, cpus: float = 0.0) -> ActiveJob:
    return ActiveJob(id=JobId(number), uid=1, user="ada", name="x", allocation=Allocation(gpus=gpus, cpus=cpus))


def test_the_first_in_line_waits_for_resources_and_is_told_what_is_free_and_what_is_taken() -> None:
    machine = testing.two_socket_rtx()
    taken = [holder(number, gpu.uuid) for number, gpu in enumerate(machine.gpus[:3], 1)]
    explainer = Explainer(view(machine, {JobId(9): shape(2)}, taken))
    assert explainer.why(JobId(9)) == Wait("resources", "2 GPUs asked, 1 free: 3 taken")


def test_whoever_stands_behind_is_told_who_is_first_and_why_that_one_waits() -> None:
    machine = testing.one_t4()
    state = view(machine, {JobId(2): shape(1), JobId(3): shape(1)}, [holder(1, machine.gpus[0].uuid)])
    assert Explainer(state).why(JobId(3)) == Wait("priority", "job 2 is first in line: 1 GPU asked, 0 free: 1 taken")


def test_a_job_that_would_fit_still_waits_behind_the_first_in_line() -> None:
    machine = testing.two_socket_rtx()
    state = view(machine, {JobId(2): shape(4), JobId(3): shape(1)}, [holder(1, machine.gpus[0].uuid)])
    assert Explainer(state).why(JobId(3)).reason == "priority"


def test_a_lost_gpu_is_named_as_the_reason() -> None:
    machine = testing.one_t4()
    lost = replace(machine, gpus=(replace(machine.gpus[0], health=Health.LOST),))
    assert Explainer(view(lost, {JobId(1): shape(1)})).why(JobId(1)) == Wait("resources", "1 GPU asked, 0 free: 1 lost")


def test_a_gpu_that_is_avoided_is_told_with_its_clause() -> None:
    machine = testing.one_t4()
    state = replace(
        view(machine, {JobId(1): shape(1)}), avoid={machine.gpus[0].uuid: "a process of job 7 is still on it"}
    )
    assert "a process of job 7 is still on it" in Explainer(state).why(JobId(1)).message


def test_without_a_driver_the_drivers_problem_is_the_reason() -> None:
    state = view(Inventory(problem="The NVIDIA driver is not loaded."), {JobId(1): shape(1), JobId(2): shape(1)})
    explainer = Explainer(state)
    assert explainer.why(JobId(1)) == Wait("resources", "no GPU can be given now: The NVIDIA driver is not loaded.")
    assert explainer.why(JobId(2)).message.endswith("The NVIDIA driver is not loaded.")


def test_a_job_that_is_about_to_start_is_told_so() -> None:
    state = view(testing.dgx_a100(), {JobId(1): shape(2), JobId(2): shape(0)})
    explainer = Explainer(state)
    assert explainer.why(JobId(1)) == explainer.why(JobId(2)) == Wait("resources", "it starts next")


def test_a_job_without_gpus_waits_for_cpus_and_not_behind_gpu_jobs() -> None:
    machine = testing.one_t4()
    active = [holder(1, machine.gpus[0].uuid), holder(2, cpus=4.0)]
    explainer = Explainer(view(machine, {JobId(3): shape(1), JobId(4): shape(0, 2.0), JobId(5): shape(0, 1.0)}, active))
    assert explainer.why(JobId(4)) == Wait("resources", "all CPUs for jobs without GPUs are in use")
    assert explainer.why(JobId(5)).message.startswith("job 4 is first in line: ")


def test_a_job_that_was_read_as_waiting_and_is_not_in_the_queue_has_a_reason_too() -> None:
    machine = testing.one_t4()
    state = view(machine, {}, [holder(1, machine.gpus[0].uuid)])
    assert Explainer(state).why(JobId(1)) == Explainer(state).why(JobId(99)) == PASSING
    assert PASSING.reason
    assert PASSING.message


def test_the_work_for_the_first_in_line_is_done_once_for_any_number_of_questions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gpujobs.core import explain

    asked = []
    real = explain.place
    monkeypatch.setattr(explain, "place", lambda *arguments: asked.append(1) or real(*arguments))
    machine = testing.one_t4()
    waiting = {JobId(number): shape(1) for number in range(2, 200)}
    explainer = Explainer(view(machine, waiting, [holder(1, machine.gpus[0].uuid)]))
    assert all(explainer.why(job_id).message for job_id in waiting)
    assert len(asked) == 1
