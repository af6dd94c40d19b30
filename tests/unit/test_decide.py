"""Policy: what is done now. Examples by hand, and properties over random machines, queues and ends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpujobs import testing
from gpujobs.core.decide import (
    Host,
    Policy,
    Start,
    Stop,
    View,
    check_possible,
    decide,
    holdings,
    memory_of,
    next_deadline,
    shape_of,
)
from gpujobs.core.errors import Refused
from gpujobs.core.explain import Explainer
from gpujobs.core.inventory import Health, Inventory
from gpujobs.core.job import Allocation, JobId
from gpujobs.core.place import Holding, NoPlacement, place
from gpujobs.core.queue import ActiveJob, Key, QueueState, Shape
from gpujobs.core.spec import GpuRequest, JobSpec
from tests.unit.values import GIB, MACHINES

HOST = Host(cpus=8, memory=64 * GIB)
POLICY = Policy()
NOW = 1_700_000_000.0


def gpus(count: int, most: int | None = None, **more: object) -> GpuRequest:
    return GpuRequest(count=count, max_count=count if most is None else most, **more)  # type: ignore[arg-type]


def shape(request: GpuRequest | int = 0, cpus: float = 0.0, memory: int = GIB) -> Shape:
    return Shape(gpus=gpus(request) if isinstance(request, int) else request, cpus=cpus, memory=memory)


def view(inventory: Inventory, *waiting: Shape, host: Host = HOST, **avoid: str) -> View:
    """Jobs 1, 2, 3 … wait for these shapes."""
    queue = QueueState()
    for number, wanted in enumerate(waiting, 1):
        queue = queue.enqueue(JobId(number), wanted)
    return View(queue=queue, inventory=inventory, host=host, policy=POLICY, avoid=avoid)


def running(start: Start, wanted: Shape, now: float = NOW, time_limit: float | None = None) -> ActiveJob:
    return ActiveJob(
        id=start.job,
        uid=5001,
        user="ada",
        name="train",
        allocation=start.allocation,
        share=wanted.gpus.share,
        started_at=now,
        time_limit=time_limit,
    )


def applied(before: View, decisions: Sequence[object]) -> View:
    queue = before.queue
    for decision in decisions:
        if isinstance(decision, Start):
            queue = queue.activate(running(decision, before.queue.shapes[decision.job.key]))
        else:
            assert isinstance(decision, Stop)
            queue = queue.activate(replace(queue.active[decision.job.key], stopping=True))
    return replace(before, queue=queue)


def started(decisions: Sequence[object]) -> list[int]:
    return [decision.job.number for decision in decisions if isinstance(decision, Start)]


# -- examples -------------------------------------------------------------------------------------------------


def test_an_empty_queue_needs_nothing() -> None:
    assert decide(NOW, view(testing.dgx_a100())) == ()


def test_jobs_start_while_there_are_gpus_for_them() -> None:
    assert started(decide(NOW, view(testing.dgx_a100(), *[shape(2)] * 6))) == [1, 2, 3, 4]


def test_a_job_that_does_not_fit_keeps_younger_gpu_jobs_waiting() -> None:
    assert started(decide(NOW, view(testing.dgx_a100(), shape(6), shape(4), shape(1)))) == [1]


def test_a_job_without_gpus_passes_a_gpu_job_that_waits() -> None:
    assert started(decide(NOW, view(testing.one_t4(), shape(1), shape(1), shape(0)))) == [1, 3]


def test_jobs_without_gpus_start_first_in_first_out_within_the_hosts_cpus() -> None:
    six, four, one = shape(cpus=6), shape(cpus=4), shape(cpus=1)
    assert started(decide(NOW, view(Inventory(), six, four, one))) == [1]
    assert started(decide(NOW, view(Inventory(), four, four, one))) == [1, 2]


def test_a_job_that_names_no_cpus_counts_as_one() -> None:
    assert started(decide(NOW, view(Inventory(), *[shape()] * 10))) == list(range(1, 9))


def test_the_cpus_of_gpu_jobs_do_not_keep_other_jobs_waiting() -> None:
    assert started(decide(NOW, view(testing.dgx_a100(), shape(1, cpus=8), shape(cpus=8)))) == [1, 2]


def test_a_job_alone_starts_also_where_the_host_says_that_it_has_no_cpus() -> None:
    assert started(decide(NOW, view(Inventory(), shape(), shape(), host=Host(cpus=0, memory=GIB)))) == [1]


def test_gpus_to_be_avoided_are_not_given() -> None:
    machine = testing.two_socket_rtx()
    avoid = {gpu.uuid: "stranger: python of bob (pid 7)" for gpu in machine.gpus[:3]}
    (start,) = decide(NOW, replace(view(machine, shape(1), shape(1)), avoid=avoid))
    assert isinstance(start, Start)
    assert start.allocation.gpus == (machine.gpus[3].uuid,)


def test_a_lost_gpu_is_not_given() -> None:
    machine = testing.one_t4()
    lost = replace(machine, gpus=(replace(machine.gpus[0], health=Health.LOST),))
    assert decide(NOW, view(lost, shape(1))) == ()


def test_two_shares_of_one_gpu_are_given_as_far_as_its_memory_goes() -> None:
    machine = testing.one_t4()
    share = shape(gpus(1, share=6 * GIB))
    decisions = decide(NOW, view(machine, share, share, share))
    assert started(decisions) == [1, 2]
    assert {d.allocation.gpus for d in decisions if isinstance(d, Start)} == {(machine.gpus[0].uuid,)}


def test_a_start_says_why_each_gpu_was_taken_or_not() -> None:
    (start,) = decide(NOW, view(testing.dgx_a100(), shape(2)))
    assert isinstance(start, Start)
    assert [choice.uuid for choice in start.choices] == [gpu.uuid for gpu in testing.dgx_a100().gpus]
    assert tuple(choice.uuid for choice in start.choices if choice.chosen) == start.allocation.gpus
    assert all(choice.reason for choice in start.choices)


def test_a_start_holds_the_cpus_and_memory_of_its_shape() -> None:
    (start,) = decide(NOW, view(testing.one_t4(), shape(1, cpus=2.5, memory=7)))
    assert isinstance(start, Start)
    assert (start.allocation.cpus, start.allocation.memory) == (2.5, 7)


def test_elements_of_an_array_start_in_the_order_of_their_index() -> None:
    queue = QueueState()
    for index in (2, 0, 1):
        queue = queue.enqueue(JobId(7, index), shape(1))
    decisions = decide(NOW, replace(view(testing.dgx_a100()), queue=queue))
    assert [str(d.job) for d in decisions] == ["7_0", "7_1", "7_2"]


# -- time limits ----------------------------------------------------------------------------------------------


def with_active(*active: ActiveJob) -> View:
    queue = QueueState()
    for job in active:
        queue = queue.activate(job)
    return replace(view(testing.dgx_a100()), queue=queue)


LIMITED = ActiveJob(
    id=JobId(3), uid=1, user="ada", name="x", allocation=Allocation(gpus=("GPU-a",)), started_at=NOW, time_limit=60.0
)


@pytest.mark.parametrize(("later", "stops"), [(0.0, False), (59.999, False), (60.0, True), (1e6, True)])
def test_a_job_is_stopped_when_its_time_limit_is_reached_and_not_before(later: float, stops: bool) -> None:
    expected = (Stop(job=JobId(3), reason="time-limit", message="its time limit of 60 s was reached"),)
    assert decide(NOW + later, with_active(LIMITED)) == (expected if stops else ())


def test_a_job_that_is_being_stopped_is_not_stopped_again() -> None:
    assert decide(NOW + 100, with_active(replace(LIMITED, stopping=True))) == ()


def test_the_time_limit_begins_with_the_program_and_not_with_the_decision() -> None:
    assert decide(NOW + 100, with_active(replace(LIMITED, started_at=None))) == ()
    assert next_deadline(with_active(replace(LIMITED, started_at=None)).queue) is None


def test_the_next_deadline_is_the_nearest_of_those_that_still_count() -> None:
    later = replace(LIMITED, id=JobId(4), time_limit=90.0)
    stopping = replace(LIMITED, id=JobId(5), time_limit=1.0, stopping=True)
    without = replace(LIMITED, id=JobId(6), time_limit=None)
    assert next_deadline(with_active(LIMITED, later, stopping, without).queue) == NOW + 60
    assert next_deadline(QueueState()) is None


# -- what a job needs -----------------------------------------------------------------------------------------


def spec(**more: object) -> JobSpec:
    return JobSpec(name="train", image="x", **more)  # type: ignore[arg-type]


def test_memory_that_is_not_named_is_the_asked_gpus_part_of_what_jobs_may_have() -> None:
    now = replace(view(testing.dgx_a100()), policy=Policy(memory_reserve=0.25))
    assert memory_of(shape_of(spec(gpus=gpus(2))), now) == int(64 * GIB * 0.75 * 2 / 8)


def test_memory_that_is_named_counts() -> None:
    assert memory_of(shape_of(spec(gpus=gpus(2), mem_limit=5 * GIB)), view(testing.dgx_a100())) == 5 * GIB


def test_a_job_without_gpus_that_names_no_memory_gets_the_policys_default_and_at_most_half() -> None:
    assert memory_of(shape_of(spec()), view(Inventory())) == POLICY.cpu_job_memory
    small = Host(cpus=2, memory=4 * GIB)
    assert memory_of(shape_of(spec()), view(Inventory(), host=small)) == int(4 * GIB * 0.9 / 2)


def test_gpus_of_a_machine_that_lost_its_driver_get_memory_within_the_host() -> None:
    assert memory_of(shape_of(spec(gpus=gpus(4))), view(Inventory())) <= HOST.memory


def test_a_job_that_waited_while_the_driver_was_away_gets_its_share_of_the_gpus_that_are_there_at_its_start() -> None:
    away = view(Inventory(problem="the NVIDIA driver is not loaded"), shape_of(spec(gpus=gpus(2))))
    assert decide(NOW, away) == ()
    (start,) = decide(NOW, replace(away, inventory=testing.dgx_a100()))
    assert start.allocation.memory == int(64 * GIB * 0.9 * 2 / 8)


def test_cpus_that_are_not_named_are_no_limit() -> None:
    assert shape_of(spec()).cpus == 0.0


@pytest.mark.parametrize(
    ("wanted", "machine", "words"),
    [
        (shape(cpus=9), testing.one_t4(), "cpus: 9 asked, this machine has 8"),
        (shape(memory=65 * GIB), testing.one_t4(), r"mem_limit: 65.0 GiB asked, this machine has 64.0 GiB"),
        (shape(2), testing.one_t4(), "this can never start on this machine: 2 GPUs asked"),
        (shape(gpus(1, model=("H100",))), testing.one_t4(), "this can never start on this machine"),
        (shape(1), Inventory(problem="The NVIDIA driver is not loaded."), "The NVIDIA driver is not loaded"),
        (shape(1), Inventory(), "this machine has no GPU"),
    ],
)
def test_what_this_machine_can_never_run_is_refused_with_the_reason(
    wanted: Shape, machine: Inventory, words: str
) -> None:
    with pytest.raises(Refused, match=words) as caught:
        check_possible(wanted, view(machine))
    assert caught.value.hint


def test_what_only_has_to_wait_is_not_refused() -> None:
    machine = testing.one_t4()
    full = replace(view(machine, shape(1)), avoid={machine.gpus[0].uuid: "stranger"})
    check_possible(shape(1), full)
    check_possible(shape(1), applied(view(machine, shape(1)), decide(NOW, view(machine, shape(1)))))


def test_a_job_without_gpus_needs_no_driver() -> None:
    check_possible(shape(), view(Inventory(problem="NVML is not there")))


# -- properties -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Submit these shapes, then let some of the active jobs end."""

    submit: tuple[Shape, ...]
    ends: int  # bits: which of the active jobs, oldest first, end


requests = st.one_of(
    st.just(GpuRequest()),
    st.builds(gpus, st.integers(1, 4)),
    st.integers(1, 4).flatmap(lambda low: st.integers(low, 8).map(lambda high: gpus(low, high))),
    st.builds(gpus, st.integers(2, 4), link=st.sampled_from(["same-numa", "nvlink"])),
    st.builds(gpus, st.just(1), share=st.sampled_from([2 * GIB, 9 * GIB, 20 * GIB])),
    st.builds(gpus, st.integers(1, 2), mig=st.sampled_from(["1g.5gb", "3g.20gb"])),
    st.builds(gpus, st.integers(1, 2), memory=st.sampled_from([12 * GIB, 24 * GIB, 40 * GIB])),
    st.builds(gpus, st.integers(1, 2), model=st.sampled_from([("A100",), ("T4",), ("RTX*",)])),
)
shapes = st.builds(
    Shape, gpus=requests, cpus=st.sampled_from([0.0, 0.5, 2.0, 8.0]), memory=st.sampled_from([GIB, 4 * GIB])
)
machines = st.sampled_from(MACHINES).flatmap(
    lambda build: st.sets(st.integers(0, 7), max_size=2).map(lambda lost: losing(build(), lost))
)
steps = st.lists(
    st.builds(Step, submit=st.lists(shapes, max_size=5).map(tuple), ends=st.integers(0, 2**12 - 1)),
    min_size=1,
    max_size=6,
)


def losing(machine: Inventory, positions: set[int]) -> Inventory:
    changed = tuple(
        replace(gpu, health=Health.LOST) if position in positions else gpu for position, gpu in enumerate(machine.gpus)
    )
    return replace(machine, gpus=changed)


def capacity_kept(state: View) -> None:
    """No GPU (or MIG device) is given twice; shares stay within their GPU's memory; free and held are all."""
    devices = {gpu.uuid: gpu for gpu in state.inventory.gpus} | {
        mig.uuid: gpu for gpu in state.inventory.gpus for mig in gpu.mig
    }
    held = holdings(state.queue.active)
    assert set(held) <= set(devices)
    for uuid, holders in held.items():
        if any(holding.share is None for holding in holders):
            assert len(holders) == 1, f"{uuid} was given twice: {holders}"
        else:
            assert sum(holding.share or 0 for holding in holders) <= devices[uuid].memory_bytes
        gpu = devices[uuid]
        if uuid != gpu.uuid:
            assert gpu.uuid not in held, "a GPU and one of its MIG devices were given"
    whole = {uuid for job in state.queue.active.values() if job.share is None for uuid in job.allocation.gpus}
    assert len(whole) == sum(len(job.allocation.gpus) for job in state.queue.active.values() if job.share is None)


def gpus_suffice(state: View, key: Key) -> bool:
    wanted = state.queue.shapes[key]
    return not isinstance(place(wanted.gpus, holdings(state.queue.active), state.avoid, state.inventory), NoPlacement)


@settings(max_examples=150, deadline=None)
@given(machine=machines, history=steps)
def test_over_random_machines_queues_and_ends_every_promise_of_policy_holds(
    machine: Inventory, history: list[Step]
) -> None:
    numbers = itertools.count(1)
    state = view(machine)
    last_gpu_start: Key = (0, -1)
    for step in history:
        for wanted in step.submit:
            try:
                check_possible(wanted, state)
            except Refused:
                continue
            state = replace(state, queue=state.queue.enqueue(JobId(next(numbers)), wanted))
        decisions = decide(NOW, state)
        wanted_of = dict(state.queue.shapes.items())
        state = applied(state, decisions)
        capacity_kept(state)
        for decision in decisions:
            assert isinstance(decision, Start)
            wanted = wanted_of[decision.job.key]
            assert bool(decision.allocation.gpus) is bool(wanted.gpus.count)
            if wanted.gpus.count:
                assert wanted.gpus.count <= len(decision.allocation.gpus) <= wanted.gpus.max_count
                assert decision.job.key > last_gpu_start, "GPU jobs start strictly first in, first out"
                last_gpu_start = decision.job.key
        assert decide(NOW, state) == (), "deciding again on the outcome gives nothing"
        explainer = Explainer(state)
        for key in state.queue.shapes:
            wait = explainer.why(JobId.of_key(*key))
            assert wait.reason in {"resources", "priority"}
            assert wait.message
            assert wait.message != "it starts next"
        waiting = sorted(key for key, wanted in state.queue.shapes.items() if wanted.gpus.count)
        assert not waiting or not gpus_suffice(state, waiting[0]), "the first in line waits for GPUs that are free"
        ends = [key for place_, key in enumerate(sorted(state.queue.active)) if step.ends >> place_ & 1]
        for key in ends:
            state = replace(state, queue=state.queue.release(JobId.of_key(*key)))
    for key in list(state.queue.active):
        state = replace(state, queue=state.queue.release(JobId.of_key(*key)))
    assert holdings(state.queue.active) == {}, "when all have ended, all is free"


@settings(max_examples=60, deadline=None)
@given(machine=machines, waiting=st.lists(shapes, min_size=1, max_size=8), data=st.data())
def test_the_outcome_does_not_depend_on_the_order_of_any_mapping(
    machine: Inventory, waiting: list[Shape], data: st.DataObject
) -> None:
    numbered = list(enumerate(waiting, 1))
    avoid = [(gpu.uuid, "reserved: for carol") for gpu in machine.gpus if data.draw(st.booleans())]
    links, nvlinks = list(machine.links.items()), list(machine.nvlinks.items())
    outcomes = []
    for pick in (list, lambda items: list(reversed(items)), lambda items: data.draw(st.permutations(items))):
        queue = QueueState()
        for number, wanted in pick(numbered):
            queue = queue.enqueue(JobId(number), wanted)
        same = replace(
            machine, links=dict(pick(links)), nvlinks=dict(pick(nvlinks)), pcie=dict(pick(list(machine.pcie.items())))
        )
        state = View(queue=queue, inventory=same, host=HOST, policy=POLICY, avoid=dict(pick(avoid)))
        decisions = decide(NOW, state)
        after = applied(state, decisions)
        explainer = Explainer(after)
        reasons = {key: explainer.why(JobId.of_key(*key)) for key in after.queue.shapes}
        outcomes.append((decisions, reasons))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_what_is_held_is_told_by_device_with_the_job_and_its_share() -> None:
    whole = ActiveJob(id=JobId(1), uid=1, user="ada", name="x", allocation=Allocation(gpus=("GPU-a", "GPU-b")))
    shares = [
        ActiveJob(id=JobId(number), uid=1, user="ada", name="x", allocation=Allocation(gpus=("GPU-c",)), share=GIB)
        for number in (2, 3)
    ]
    held = holdings(with_active(whole, *shares).queue.active)
    assert held["GPU-a"] == held["GPU-b"] == (Holding(job="1"),)
    assert set(held["GPU-c"]) == {Holding(job="2", share=GIB), Holding(job="3", share=GIB)}
