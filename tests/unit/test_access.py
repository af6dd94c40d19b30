"""Who is let in, as whom, and how accounts that cannot be used hold their jobs: with accounts that are not there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import pytest

from gpujobs.core.accounts import Account
from gpujobs.core.errors import GpujobsError, InvalidInput, Refused, Unavailable
from gpujobs.core.job import Job, JobId, Owner, Queued
from gpujobs.core.queue import QueueState, Shape
from gpujobs.core.spec import GpuRequest, JobSpec
from gpujobs.service import access, holds
from gpujobs.service.access import Asker, Directory, held_by
from gpujobs.service.holds import Holds
from gpujobs.service.peer import Peer
from gpujobs.service.quotas import AT_ONCE, Quotas
from gpujobs.settings import Settings
from gpujobs.testing.parts import AnyAccounts

T = TypeVar("T")

ADA = Owner(uid=5001, gid=5001, groups=(44, 5001), name="ada", home="/home/ada")
EVE = Owner(uid=5002, gid=5002, groups=(5002,), name="eve", home="/home/eve")


def accounts(**changes: object) -> AnyAccounts:
    known = {ADA.uid: Account(owner=ADA, **changes), EVE.uid: Account(owner=EVE)}  # type: ignore[arg-type]
    return AnyAccounts(known, {"hpc": 44})


def peer(owner: Owner, **changes: object) -> Peer:
    return replace(Peer(pid=1, uid=owner.uid, gid=owner.gid, groups=frozenset(owner.groups)), **changes)  # type: ignore[arg-type]


def asked(settings: Settings, who: Peer, source: AnyAccounts | None = None, only: int | None = None) -> Asker:
    async def ask() -> Asker:
        directory = Directory(only, source or accounts())
        directory.apply(settings)
        return await directory.asker(who)

    return asyncio.run(ask())


def refused(settings: Settings, who: Peer, source: AnyAccounts | None = None, only: int | None = None) -> str:
    with pytest.raises(Refused) as caught:
        asked(settings, who, source, only)
    return caught.value.message


# -- who is let in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("users", [(), ("ada",), ("@hpc",), ("*",)])
def test_who_is_a_user_is_let_in(users: tuple[str, ...]) -> None:
    assert asked(Settings(users=users), peer(ADA)) == Asker(ADA, admin=False)


def test_who_is_none_is_not_but_administrators_and_root_are() -> None:
    settings = Settings(users=("ada",), admins=("eve",))
    assert asked(settings, peer(EVE)) == Asker(EVE, admin=True)
    assert asked(settings, Peer(pid=1, uid=0, gid=0)).admin
    assert refused(Settings(users=("@hpc",)), peer(EVE)) == "eve may not use this server"


def test_groups_make_administrators_whether_or_not_the_process_has_them() -> None:
    assert asked(Settings(admins=("@hpc",)), peer(ADA, groups=frozenset())).admin
    assert not asked(Settings(admins=("@hpc",)), peer(EVE, groups=frozenset({44}))).admin


@pytest.mark.parametrize(
    ("change", "words"),
    [({"whereabouts": "contained"}, "inside containers"), ({"whereabouts": "gone"}, "has ended"),
     ({"uid": 0, "whereabouts": "contained"}, "inside containers")],
)  # fmt: skip
def test_processes_in_containers_and_those_that_have_ended_are_refused(change: dict[str, object], words: str) -> None:
    assert words in refused(Settings(users=("*",), admins=("ada",)), peer(ADA, **change))


def test_a_server_of_ones_own_serves_its_owner_alone() -> None:
    assert asked(Settings(users=("eve",)), peer(ADA), only=ADA.uid).uid == ADA.uid
    assert "serves uid 5001 alone" in refused(Settings(users=("*",)), peer(EVE), only=ADA.uid)


def test_an_expired_account_is_refused() -> None:
    assert refused(Settings(), peer(ADA), accounts(expired=True)) == "the account ada has expired"


def test_administrators_are_looked_up_at_each_request() -> None:
    async def ask() -> list[bool]:
        directory = Directory(None, accounts())
        found = []
        for admins in ((), ("ada",), ()):
            directory.apply(Settings(admins=admins))
            found.append((await directory.asker(peer(ADA))).admin)
        return found

    assert asyncio.run(ask()) == [False, True, False]


# -- as whom -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gid", "groups", "wanted"),
    [
        (5001, {44, 5001}, (5001, (44, 5001))),
        (5001, {44, 5001, 0, 999}, (5001, (44, 5001))),
        (5001, set(), (5001, (5001,))),
        (44, {5001}, (44, (44, 5001))),
        (44, set(), (44, (44,))),
        (0, {5001}, (5001, (5001,))),
        (0, {44}, (44, (44,))),
    ],
)
def test_a_job_has_the_groups_that_account_and_process_both_have(
    gid: int, groups: set[int], wanted: tuple[int, tuple[int, ...]]
) -> None:
    found = held_by(peer(ADA, gid=gid, groups=frozenset(groups)), ADA)
    assert (found.gid, found.groups) == wanted


def test_a_process_without_any_of_them_submits_nothing() -> None:
    with pytest.raises(Refused, match="none of the groups of ada"):
        held_by(peer(ADA, gid=0, groups=frozenset({999})), ADA)


def test_only_administrators_submit_for_others_and_nobody_for_root() -> None:
    async def go(asker: Asker, run_as: str | None) -> Owner:
        return await Directory(None, accounts()).submitter(asker, run_as)

    root = Asker(Owner(uid=0, gid=0, groups=(0,), name="root", home="/root"), admin=True)
    assert asyncio.run(go(Asker(ADA, admin=False), None)) == ADA
    assert asyncio.run(go(root, "ada")) == ADA
    for asker, run_as in ((root, None), (Asker(ADA, admin=False), "eve"), (root, "user0")):
        with pytest.raises(Refused):
            asyncio.run(go(asker, run_as))
    with pytest.raises(InvalidInput, match="no account 'nobody-there'"):
        asyncio.run(go(root, "nobody-there"))


# -- the account database ------------------------------------------------------------------------------------------


class Slow(AnyAccounts):
    """An account database that answers when it is told to, and counts."""

    def __init__(self) -> None:
        super().__init__({ADA.uid: Account(owner=ADA)})
        self.answers = threading.Event()
        self.questions = 0

    def by_uid(self, uid: int) -> Account:
        self.questions += 1
        assert self.answers.wait(20)
        return super().by_uid(uid)


def test_a_database_that_hangs_is_given_up_and_asked_once_for_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "LOOKUP_SECONDS", 0.05)
    source = Slow()

    async def go() -> None:
        directory = Directory(None, source)
        results = await asyncio.gather(*(directory.account(ADA.uid) for _ in range(50)), return_exceptions=True)
        assert all(isinstance(result, Unavailable) and "did not answer" in result.message for result in results)
        assert source.questions == 1
        source.answers.set()
        monkeypatch.setattr(access, "LOOKUP_SECONDS", 10.0)
        assert (await directory.account(ADA.uid)).owner == ADA
        asked_for = source.questions
        assert (await directory.account(ADA.uid)).owner == ADA
        assert source.questions == asked_for

    asyncio.run(go())


def test_groups_that_an_account_has_lost_are_not_given_to_its_jobs() -> None:
    async def go(owner: Owner) -> Owner:
        return await Directory(None, accounts()).present(owner)

    assert asyncio.run(go(replace(ADA, groups=(44, 60, 5001)))).groups == (44, 5001)


# -- held accounts -------------------------------------------------------------------------------------------------

SHAPE = Shape(gpus=GpuRequest(), cpus=1.0, memory=1)


class Held:
    """Holds over two jobs of ada's and one of eve's."""

    def __init__(self, source: AnyAccounts) -> None:
        self.source = source
        self.directory = Directory(None, source)
        self.queue = QueueState()
        self.changes: asyncio.Queue[int] = asyncio.Queue()
        self.tasks: list[asyncio.Task[None]] = []
        self.holds = Holds(self.directory, self._spawn, self._changed)
        self.jobs = [self._job(1, ADA), self._job(2, ADA), self._job(3, EVE)]

    def _spawn(self, work: object, name: str) -> None:
        self.tasks.append(asyncio.ensure_future(work))  # type: ignore[arg-type]

    def _changed(self, uid: int) -> None:
        self.queue = self.holds.filter(uid, self.queue)
        self.changes.put_nowait(uid)

    def _job(self, number: int, owner: Owner) -> Job:
        job = Job(id=JobId(number), owner=owner, spec=JobSpec(name="t"), submitted_at=0, state=Queued())
        self.holds.apply(job, SHAPE)
        self.queue = self.queue.apply(job, SHAPE)
        return job

    @property
    def queued(self) -> list[int]:
        return [number for lane in self.queue.lanes.values() for number, _ in lane]


def run_held(source: AnyAccounts, go: Callable[[Held], Awaitable[T]]) -> T:
    async def around() -> T:
        held = Held(source)
        try:
            return await go(held)
        finally:
            for task in held.tasks:
                task.cancel()

    return asyncio.run(around())


class Failing(AnyAccounts):
    """A database in which accounts are missing, and come back."""

    def __init__(self, error: GpujobsError | None) -> None:
        super().__init__({ADA.uid: Account(owner=ADA), EVE.uid: Account(owner=EVE)})
        self.error = error

    def by_uid(self, uid: int) -> Account:
        if self.error is not None and uid == ADA.uid:
            raise self.error
        return super().by_uid(uid)


def test_an_account_that_can_be_used_is_asked_for_once_and_starts() -> None:
    async def go(held: Held) -> None:
        assert not held.holds.may_start(EVE.uid)
        await held.changes.get()
        assert held.holds.may_start(EVE.uid)
        assert held.queued == [1, 2, 3]

    run_held(Failing(None), go)


@pytest.mark.parametrize(
    "error", [Refused("uid 5001 has no account on this machine"), Unavailable("the account database did not answer")]
)
def test_jobs_of_an_account_that_cannot_be_used_step_aside_and_come_back(
    error: GpujobsError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(holds, "CACHE_SECONDS", 0.02)
    source = Failing(error)

    async def go(held: Held) -> None:
        assert not held.holds.may_start(ADA.uid)
        assert await held.changes.get() == ADA.uid
        assert held.queued == [3]
        assert held.holds.reason(held.jobs[0]) == error.message
        assert held.holds.reason(held.jobs[2]) == ""
        assert held.holds.queued(ADA.uid) == 2
        source.error = None
        async with asyncio.timeout(10):
            while held.holds.reason(held.jobs[0]):
                await held.changes.get()
        assert held.queued == [1, 2, 3]
        assert held.holds.may_start(ADA.uid)

    run_held(source, go)


def test_an_account_that_is_long_in_coming_lets_others_pass_until_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds, "PATIENCE_SECONDS", 0.02)
    source = Slow()

    async def go(held: Held) -> None:
        assert not held.holds.may_start(ADA.uid)
        await held.changes.get()
        assert held.queued == [3]
        assert held.holds.reason(held.jobs[0]) == "the account database has not answered yet"
        source.answers.set()
        await held.changes.get()
        assert held.queued == [1, 2, 3]
        assert held.holds.may_start(ADA.uid)

    run_held(source, go)


def test_an_expired_account_is_held_until_it_is_seen_again() -> None:
    source = AnyAccounts({ADA.uid: Account(owner=ADA, expired=True), EVE.uid: Account(owner=EVE)})

    async def go(held: Held) -> None:
        assert not held.holds.may_start(ADA.uid)
        await held.changes.get()
        assert held.queued == [3]
        assert held.holds.reason(held.jobs[0]) == "the account ada has expired"
        held.holds.seen(ADA.uid)
        assert held.queued == [1, 2, 3]

    run_held(source, go)


# -- quotas --------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


def quotas(clock: Clock | None = None, **settings: object) -> Quotas:
    found = Quotas(clock or Clock())
    found.apply(Settings(**settings))  # type: ignore[arg-type]
    return found


def test_submissions_are_counted_by_account_and_come_back_with_time() -> None:
    clock = Clock()
    found = quotas(clock, submissions_per_minute=3)
    for _ in range(3):
        found.submission(1)
    with pytest.raises(Refused, match="at most 3 submissions a minute") as caught:
        found.submission(1)
    assert "Try again in 20.0 s" in caught.value.hint
    found.submission(2)
    clock.time += 20
    found.submission(1)
    clock.time -= 5000  # set back: nothing is given away, and nobody is locked out
    with pytest.raises(Refused):
        found.submission(1)
    clock.time += 20
    found.submission(1)
    for _ in range(10):
        found.submission(0)


def test_streams_and_connections_have_their_limits_by_account() -> None:
    found = quotas(streams=1, connections=1)
    with found.stream(1):
        with pytest.raises(Refused, match="1 logs, watched jobs and uploads"), found.stream(1):
            raise AssertionError
        with found.stream(2), found.stream(0), found.stream(0):
            pass
    with found.stream(1):
        pass
    assert found.connected(1) == ""
    assert "uid 1 has 1 connections open" in found.connected(1)
    assert found.connected(2) == ""
    found.disconnected(1)
    found.disconnected(1)
    assert found.connected(1) == ""


def test_who_asks_much_waits_in_a_line_of_their_own() -> None:
    async def go() -> None:
        found, open_, order = quotas(), asyncio.Event(), []

        async def ask(uid: int, name: int) -> None:
            async with found.turn(uid):
                order.append((uid, name))
                if uid == 1:
                    await open_.wait()

        greedy = [asyncio.create_task(ask(1, name)) for name in range(100)]
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await ask(2, 0)
        assert order == [*((1, name) for name in range(AT_ONCE)), (2, 0)]
        open_.set()
        await asyncio.gather(*greedy)
        assert [name for uid, name in order if uid == 1] == list(range(100))

    asyncio.run(go())


