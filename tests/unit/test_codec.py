"""What the ledger keeps comes back as it was, also from a version that knew more or fewer fields."""

from __future__ import annotations

import json
from dataclasses import dataclass

from hypothesis import given

from gpujobs.core import codec
from gpujobs.core.job import Allocation, Owner, State
from gpujobs.core.spec import GpuRequest, JobSpec
from tests.unit.values import allocations, owners, specs, states


def through_json(value: object) -> object:
    """A value as it comes back from the ledger: by way of JSON text."""
    return json.loads(json.dumps(codec.encode(value)))


@given(specs)
def test_any_specification_comes_back_as_it_was(spec: JobSpec) -> None:
    assert codec.decode(JobSpec, through_json(spec)) == spec


@given(owners)
def test_any_owner_comes_back_as_it_was(owner: Owner) -> None:
    assert codec.decode(Owner, through_json(owner)) == owner


@given(allocations)
def test_any_allocation_comes_back_as_it_was(allocation: Allocation) -> None:
    assert codec.decode(Allocation, through_json(allocation)) == allocation


@given(states)
def test_any_state_comes_back_as_it_was(state: State) -> None:
    assert codec.decode(type(state), through_json(state)) == state


@given(specs)
def test_what_comes_back_can_be_hashed_as_the_original_can(spec: JobSpec) -> None:
    assert hash(codec.decode(JobSpec, through_json(spec))) == hash(spec)


def test_what_equals_its_default_is_not_written() -> None:
    spec = JobSpec(name="train", image="x", gpus=GpuRequest(count=2, max_count=2))
    assert codec.encode(spec) == {"name": "train", "image": "x", "gpus": {"count": 2, "max_count": 2}}


def test_an_empty_tuple_is_not_the_same_as_none() -> None:
    spec = JobSpec(name="train", image="x", command=(), entrypoint=None)
    assert codec.decode(JobSpec, through_json(spec)).command == ()
    assert codec.decode(JobSpec, through_json(spec)).entrypoint is None


def test_whole_numbers_come_back_as_the_kind_that_the_field_has() -> None:
    found = codec.decode(JobSpec, {"name": "train", "cpus": 2, "time_limit": 60})
    assert (type(found.cpus), type(found.time_limit)) == (float, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    name: str
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class After:
    name: str
    pair: tuple[str, tuple[int, int]] | None = None
    colours: tuple[str, ...] = ("red",)


def test_fields_that_a_later_version_wrote_are_ignored() -> None:
    written = codec.encode(After(name="x", pair=(">=", (8, 0)), colours=("blue",)))
    assert codec.decode(Before, written) == Before(name="x")


def test_fields_that_an_earlier_version_did_not_write_have_their_defaults() -> None:
    assert codec.decode(After, codec.encode(Before(name="x", size=3))) == After(name="x")


def test_nested_tuples_of_a_fixed_length_come_back() -> None:
    value = After(name="x", pair=(">=", (8, 6)), colours=())
    assert codec.decode(After, through_json(value)) == value
