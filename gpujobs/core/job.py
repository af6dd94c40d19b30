"""A job: who asked for what, where it stands, and which changes of state are legal.

    queued ──▶ starting ──▶ running ──▶ stopping ──▶ succeeded | failed | cancelled
                │    ▲
                ▼    │           (each may also end directly)
               pulling

Each state is a type of its own that carries only what is true in it. Times are seconds since the epoch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TypeAlias

from gpujobs.core.errors import InvalidInput
from gpujobs.core.spec import JobSpec


@dataclass(frozen=True, slots=True)
class JobId:
    """A job's id: ``12``, or ``12_3`` for the element 3 of the array 12."""

    number: int
    index: int | None = None

    def __str__(self) -> str:
        return str(self.number) if self.index is None else f"{self.number}_{self.index}"

    @property
    def key(self) -> tuple[int, int]:
        """For sorting and storing, where an index that is not there is -1."""
        return (self.number, -1 if self.index is None else self.index)

    @staticmethod
    def of_key(number: int, index: int) -> JobId:
        """The id of a stored pair."""
        return JobId(number, None if index < 0 else index)

    @staticmethod
    def parse(text: str) -> JobId:
        """Read an id as people write it.

        Raises:
            InvalidInput: It is no id.
        """
        match = re.fullmatch(r"([1-9][0-9]{0,14})(?:_(0|[1-9][0-9]{0,8}))?", text, re.ASCII)
        if match is None:
            raise InvalidInput(
                f"{text[:80]!r} is no job id",
                hint="Ids look like 12, or 12_3 for an element of an array; `gpujobs ps` lists them.",
            )
        return JobId(int(match[1]), None if match[2] is None else int(match[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose job it is: the account that its processes run as.

    Attributes:
        gid: The primary group.
        groups: All groups by number, the primary one among them, ascending.
        home: The home directory as the account database gives it.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What an attempt holds: GPUs (or MIG devices) by UUID, CPUs (0 means no limit), memory in bytes."""

    gpus: tuple[str, ...] = ()
    cpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """Waiting for its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulling:
    """It holds its allocation; its image is fetched or built."""

    allocation: Allocation
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting:
    """Its container is being made; its program has not run yet."""

    allocation: Allocation
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Its program was released."""

    allocation: Allocation
    attempt: int
    started_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """It is being ended for ``reason``; ``started_at`` is None where its program never ran."""

    allocation: Allocation
    attempt: int
    started_at: float | None
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """It will not run again by itself.

    Attributes:
        outcome: ``succeeded``, ``failed`` or ``cancelled``.
        attempt: The number of the last attempt; 0 where there was none.
        exit_code: The container's own; None where it never ran.
        gpus: What its last attempt held.
        reason: One word; empty where it succeeded.
        message: The sentence for people.
    """

    outcome: str
    attempt: int
    started_at: float | None
    ended_at: float
    exit_code: int | None
    gpus: tuple[str, ...] = ()
    reason: str = ""
    message: str = ""


Active: TypeAlias = Pulling | Starting | Running | Stopping
State: TypeAlias = Queued | Active | Ended

_NAMES: dict[type, str] = {
    Queued: "queued", Pulling: "pulling", Starting: "starting", Running: "running", Stopping: "stopping",
}  # fmt: skip

ENDED = ("succeeded", "failed", "cancelled")

_LEGAL: dict[str, frozenset[str]] = {
    "queued": frozenset({"pulling", "starting", *ENDED}),
    "pulling": frozenset({"starting", "stopping", *ENDED}),
    "starting": frozenset({"pulling", "running", "stopping", *ENDED}),
    "running": frozenset({"stopping", *ENDED}),
    "stopping": frozenset({*ENDED}),
}


def name_of(state: State) -> str:
    """The state's word in the contract: ``queued`` … ``cancelled``."""
    return state.outcome if isinstance(state, Ended) else _NAMES[type(state)]


class IllegalTransition(ValueError):
    """A change of state that the diagram does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job.

    Attributes:
        submitted_at: Seconds since the epoch.
    """

    id: JobId
    owner: Owner
    spec: JobSpec
    submitted_at: float
    state: State

    def to(self, state: State) -> Job:
        """This job in another state.

        Raises:
            IllegalTransition: The diagram has no such arrow.
        """
        before, after = name_of(self.state), name_of(state)
        if after not in _LEGAL.get(before, frozenset()):
            raise IllegalTransition(f"job {self.id}: {before} -> {after}")
        return replace(self, state=state)

    @property
    def allocation(self) -> Allocation | None:
        """What it holds now; None where it holds nothing."""
        return self.state.allocation if isinstance(self.state, Active) else None
