"""The waiting and active jobs as persistent values: lanes, and the state made of them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from immutables import Map

from gpujobs.core.job import Allocation, Ended, Job, JobId, Queued, Running, Starting, Stopping
from gpujobs.core.queue import ActiveJob, Lane, QueueState, Shape, active_of
from gpujobs.core.spec import GpuRequest, JobSpec
from tests.unit.values import owner

keys = st.tuples(st.integers(1, 400), st.integers(-1, 8))
ONE_GPU = Shape(gpus=GpuRequest(count=1, max_count=1), cpus=2.0, memory=100)
NO_GPU = Shape(gpus=GpuRequest(), cpus=1.0, memory=10)


def active(number: int, *gpus: str) -> ActiveJob:
    allocation = Allocation(gpus=gpus)
    return ActiveJob(id=JobId(number), uid=5001, user="ada", name="train", allocation=allocation)


# -- lanes against a sorted list ------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), keys), max_size=200))
def test_a_lane_does_what_a_sorted_list_does(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    lane, model = Lane(), []
    for add, key in steps:
        before, remembered = lane, list(lane)
        if add and key not in model:
            lane = lane.add(key)
            model = sorted([*model, key])
        elif not add and key in model:
            lane = lane.remove(key)
            model.remove(key)
        elif not add:
            with pytest.raises(KeyError):
                lane.remove(key)
        assert list(before) == remembered
        assert list(lane) == model
        assert len(lane) == len(model)
        assert bool(lane) is bool(model)
        assert not model or lane.head == model[0]


@pytest.mark.parametrize("seed", range(4))
def test_a_long_lane_keeps_its_order_in_whatever_order_ids_come_and_go(seed: int) -> None:
    pick = random.Random(seed)
    wanted = [(number, -1) for number in range(5000)]
    pick.shuffle(wanted)
    lane = Lane()
    for key in wanted:
        lane = lane.add(key)
    assert list(lane) == sorted(wanted)
    assert max(map(len, lane.chunks)) <= 1024
    gone, stay = wanted[:2500], sorted(wanted[2500:])
    for key in gone:
        lane = lane.remove(key)
    assert list(lane) == stay
    for key in stay:
        assert lane.head == key
        lane = lane.remove(key)
    assert not lane


def test_taking_the_oldest_of_a_hundred_thousand_copies_one_short_tuple() -> None:
    lane = Lane()
    for number in range(100_000):
        lane = lane.add((number, -1))
    after = lane.remove((0, -1))
    shared = {id(chunk) for chunk in lane.chunks} & {id(chunk) for chunk in after.chunks}
    assert len(shared) == len(lane.chunks) - 1
    assert len(lane.chunks) < 250


def test_removing_what_is_not_in_a_lane_is_an_error_and_changes_nothing() -> None:
    lane = Lane().add((5, -1)).add((7, -1))
    for key in ((4, -1), (6, -1), (8, -1)):
        with pytest.raises(KeyError):
            lane.remove(key)
    assert list(lane) == [(5, -1), (7, -1)]


# -- the state ------------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from(["enqueue", "dequeue", "activate", "release"]),
        st.builds(JobId, st.integers(1, 12), st.none() | st.integers(0, 2)),
        st.sampled_from([ONE_GPU, NO_GPU]),
    ),
    max_size=60,
)


def snapshot(state: QueueState) -> tuple[object, ...]:
    lanes = {shape: list(lane) for shape, lane in state.lanes.items()}
    return lanes, dict(state.shapes.items()), dict(state.active.items())


@given(steps)
def test_older_states_never_change_and_lanes_and_shapes_always_agree(
    history: list[tuple[str, JobId, Shape]],
) -> None:
    state = QueueState()
    past = []
    for action, job_id, shape in history:
        past.append((state, snapshot(state)))
        if action == "enqueue":
            state = state.enqueue(job_id, shape)
        elif action == "dequeue":
            state = state.dequeue(job_id)
        elif action == "activate":
            state = state.activate(ActiveJob(id=job_id, uid=1, user="ada", name="x", allocation=Allocation()))
        else:
            state = state.release(job_id)
        listed = {key: shape for shape, lane in state.lanes.items() for key in lane}
        assert listed == dict(state.shapes.items())
        assert len(listed) == sum(len(lane) for lane in state.lanes.values())
        assert all(state.lanes.values()), "an empty lane costs every decision a look"
    for older, was in past:
        assert snapshot(older) == was


def test_a_job_that_is_enqueued_twice_waits_once() -> None:
    once = QueueState().enqueue(JobId(3), ONE_GPU)
    assert once.enqueue(JobId(3), ONE_GPU) is once


def test_a_job_that_is_enqueued_for_something_else_waits_for_that_alone() -> None:
    state = QueueState().enqueue(JobId(3), ONE_GPU).enqueue(JobId(3), NO_GPU)
    assert {shape: list(lane) for shape, lane in state.lanes.items()} == {NO_GPU: [(3, -1)]}


def test_jobs_that_ask_for_the_same_stand_in_one_lane_oldest_first() -> None:
    state = QueueState()
    for number in (9, 2, 5):
        state = state.enqueue(JobId(number), ONE_GPU)
    state = state.enqueue(JobId(1), NO_GPU)
    assert {shape: list(lane) for shape, lane in state.lanes.items()} == {
        ONE_GPU: [(2, -1), (5, -1), (9, -1)],
        NO_GPU: [(1, -1)],
    }


def test_elements_of_an_array_stand_in_the_order_of_their_index() -> None:
    state = QueueState()
    for index in (10, 2, 0):
        state = state.enqueue(JobId(4, index), ONE_GPU)
    assert list(state.lanes[ONE_GPU]) == [(4, 0), (4, 2), (4, 10)]


def test_a_job_that_starts_no_longer_waits() -> None:
    state = QueueState().enqueue(JobId(1), ONE_GPU).activate(active(1, "GPU-a"))
    assert not state.lanes
    assert not state.shapes
    assert state.active[(1, -1)].allocation.gpus == ("GPU-a",)


def test_what_was_not_there_leaves_the_state_as_it_is() -> None:
    state = QueueState().enqueue(JobId(1), ONE_GPU)
    assert state.dequeue(JobId(2)) is state
    assert state.release(JobId(2)) is state


@pytest.mark.parametrize(
    ("state", "waits", "holds"),
    [
        (Queued(), True, False),
        (Starting(allocation=Allocation(gpus=("GPU-a",)), attempt=1), False, True),
        (Running(allocation=Allocation(gpus=("GPU-a",)), attempt=1, started_at=1.0), False, True),
        (Ended(outcome="failed", attempt=1, started_at=1.0, ended_at=2.0, exit_code=1), False, False),
    ],
)
def test_applying_a_job_puts_it_where_its_state_says(state: object, waits: bool, holds: bool) -> None:
    spec = JobSpec(name="train", image="x", gpus=GpuRequest(count=1, max_count=1))
    job = Job(id=JobId(6), owner=owner(), spec=spec, submitted_at=0.0, state=state)  # type: ignore[arg-type]
    for before in (QueueState(), QueueState().enqueue(JobId(6), ONE_GPU)):
        after = before.apply(job, ONE_GPU)
        assert ((6, -1) in after.shapes, (6, -1) in after.active) == (waits, holds)


def test_what_decisions_see_of_an_active_job_is_what_it_holds_and_until_when() -> None:
    spec = JobSpec(name="train", image="x", gpus=GpuRequest(count=1, max_count=1, share=7), time_limit=60.0)
    held = Allocation(gpus=("GPU-a",), cpus=2.0, memory=9)
    state = Stopping(allocation=held, attempt=2, started_at=5.0, reason="cancelled", message="")
    seen = active_of(Job(id=JobId(6), owner=owner(), spec=spec, submitted_at=0.0, state=state))
    assert (seen.allocation, seen.share, seen.started_at, seen.time_limit, seen.stopping) == (held, 7, 5.0, 60.0, True)
    assert (seen.uid, seen.user, seen.name) == (5001, "ada", "train")


def test_a_waiting_job_holds_nothing() -> None:
    job = Job(id=JobId(6), owner=owner(), spec=JobSpec(name="x", image="x"), submitted_at=0.0, state=Queued())
    with pytest.raises(TypeError, match="job 6 holds nothing"):
        active_of(job)


@settings(max_examples=25)
@given(st.permutations([JobId(n) for n in range(1, 9)]))
def test_the_state_is_the_same_in_whatever_order_jobs_came(order: list[JobId]) -> None:
    state = QueueState()
    for job_id in order:
        state = state.enqueue(job_id, ONE_GPU if job_id.number % 2 else NO_GPU)
    assert list(state.lanes[ONE_GPU]) == [(n, -1) for n in (1, 3, 5, 7)]
    assert state.shapes == Map({(n, -1): ONE_GPU if n % 2 else NO_GPU for n in range(1, 9)})
