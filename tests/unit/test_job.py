"""Ids, states, and which changes of state are legal."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given

from gpujobs.core import job as jobs
from gpujobs.core.errors import InvalidInput
from gpujobs.core.job import (
    Allocation,
    Ended,
    IllegalTransition,
    Job,
    JobId,
    Pulling,
    Queued,
    Running,
    Starting,
    Stopping,
    name_of,
)
from gpujobs.core.spec import JobSpec
from tests.unit.values import job_ids, owner, states

HELD = Allocation(gpus=("GPU-a", "GPU-b"), cpus=2.0, memory=2**30)
EVERY = {
    "queued": Queued(),
    "pulling": Pulling(allocation=HELD, attempt=1),
    "starting": Starting(allocation=HELD, attempt=1),
    "running": Running(allocation=HELD, attempt=1, started_at=1.0),
    "stopping": Stopping(allocation=HELD, attempt=1, started_at=1.0, reason="cancelled", message=""),
    **{
        outcome: Ended(outcome=outcome, attempt=1, started_at=1.0, ended_at=2.0, exit_code=0)
        for outcome in ("succeeded", "failed", "cancelled")
    },
}
ARROWS = {
    "queued": {"pulling", "starting", "succeeded", "failed", "cancelled"},
    "pulling": {"starting", "stopping", "succeeded", "failed", "cancelled"},
    "starting": {"pulling", "running", "stopping", "succeeded", "failed", "cancelled"},
    "running": {"stopping", "succeeded", "failed", "cancelled"},
    "stopping": {"succeeded", "failed", "cancelled"},
}


def job(state: jobs.State) -> Job:
    return Job(id=JobId(12), owner=owner(), spec=JobSpec(name="train", image="x"), submitted_at=0.0, state=state)


def test_the_states_have_the_contracts_names() -> None:
    assert [name_of(state) for state in EVERY.values()] == list(EVERY)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(EVERY, EVERY)))
def test_only_the_arrows_of_the_diagram_are_legal(before: str, after: str) -> None:
    start = job(EVERY[before])
    if after in ARROWS.get(before, set()):
        changed = start.to(EVERY[after])
        assert changed.state is EVERY[after]
        assert start.state is EVERY[before], "the job before stays what it was"
    else:
        with pytest.raises(IllegalTransition, match=f"job 12: {before} -> {after}"):
            start.to(EVERY[after])


def test_what_has_ended_never_changes_again() -> None:
    for outcome in jobs.ENDED:
        for state in EVERY.values():
            with pytest.raises(IllegalTransition):
                job(EVERY[outcome]).to(state)


def test_a_job_holds_its_allocation_from_the_decision_to_its_end_and_not_longer() -> None:
    holding = {name for name, state in EVERY.items() if job(state).allocation == HELD}
    assert holding == {"pulling", "starting", "running", "stopping"}
    assert all(job(EVERY[name]).allocation is None for name in ("queued", *jobs.ENDED))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", JobId(12)),
        ("12_0", JobId(12, 0)),
        ("12_3", JobId(12, 3)),
        ("1", JobId(1)),
        ("999999999999999", JobId(10**15 - 1)),
    ],
)
def test_ids_are_read_as_people_write_them(text: str, expected: JobId) -> None:
    assert JobId.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "012",
        "-1",
        "+1",
        "12_",
        "_3",
        "12_03",
        "12_-1",
        "12_3_4",
        "12.3",
        "1e3",
        " 12",
        "12 ",
        "12\n",
        "twelve",
        "١٢",
        "1" * 16,
        "1_" + "9" * 10,
        "12_³",
    ],
)
def test_what_is_no_id_is_refused_with_what_ids_look_like(text: str) -> None:
    with pytest.raises(InvalidInput, match="is no job id") as caught:
        JobId.parse(text)
    assert "12_3" in caught.value.hint


def test_a_long_text_that_is_no_id_is_not_repeated_in_full() -> None:
    with pytest.raises(InvalidInput) as caught:
        JobId.parse("x" * 100_000)
    assert len(str(caught.value)) < 120


@given(job_ids)
def test_an_id_comes_back_from_its_text_and_from_its_stored_pair(job_id: JobId) -> None:
    assert JobId.parse(str(job_id)) == job_id
    assert JobId.of_key(*job_id.key) == job_id


@given(states)
def test_every_state_has_a_name_of_the_contract(state: jobs.State) -> None:
    assert name_of(state) in EVERY
