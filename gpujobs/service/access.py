"""Who may use this server, as whom, and whose jobs they may act on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from gpujobs.core.accounts import Account, AccountSource
from gpujobs.core.errors import Refused, Unavailable
from gpujobs.core.job import Job, Owner
from gpujobs.core.rules import among, groups_in
from gpujobs.service.peer import Peer
from gpujobs.settings import Settings

T = TypeVar("T")

LOOKUP_SECONDS = 10.0
CACHE_SECONDS = 60.0
"""How long an answer of the account database holds: who is put into a group, out of one, or disabled, is known then."""

_THREADS = 4


@dataclass(frozen=True, slots=True)
class Asker:
    """Who makes a request.

    Attributes:
        owner: The account, with those of its groups that the asking process has.
        admin: Whether it may act on everybody's jobs, as the settings are at this request.
    """

    owner: Owner
    admin: bool

    @property
    def uid(self) -> int:
        """The account's number."""
        return self.owner.uid

    @property
    def name(self) -> str:
        """The account's name."""
        return self.owner.name

    def may_act(self, job: Job) -> bool:
        """Whether they may see inside a job and act on it: its owner, or an administrator."""
        return self.admin or self.uid == job.owner.uid


class Directory:
    """The account database, asked off the loop with a time limit, answers kept for a minute.

    An account database over the network can hang: that must hold up who asks, and nobody else.

    Args:
        only_uid: The one account that is served; None for all that the settings let in.
        source: Where accounts come from.
    """

    def __init__(self, only_uid: int | None, source: AccountSource) -> None:
        self._only = only_uid
        self._source = source
        self._settings = Settings()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="accounts")
        self._known: dict[object, tuple[float, Any]] = {}
        self._asking: dict[object, asyncio.Future[Any]] = {}

    def apply(self, settings: Settings) -> None:
        """From now on these settings say who may do what; accounts are looked up anew."""
        self._settings = settings
        self._known.clear()

    # -- who asks ----------------------------------------------------------------------------------------------

    async def asker(self, peer: Peer) -> Asker:
        """Whose request a connection's is.

        Raises:
            Refused: They may not use this server.
            Unavailable: The account database did not answer in time.
        """
        if peer.whereabouts == "contained":
            raise Refused("the server is not for processes inside containers")
        if peer.whereabouts == "gone":
            raise Refused("the process that connected has ended: whose request this is cannot be told any more")
        if self._only is not None and peer.uid != self._only:
            raise Refused(f"this server serves uid {self._only} alone", hint="Start one of your own: `gpujobs serve`.")
        account = await self.account(peer.uid)
        owner, settings = account.owner, self._settings
        gids = await self.gids()
        admin = owner.uid == 0 or among(owner, settings.admins, gids)
        if settings.users and not admin and self._only is None and not among(owner, settings.users, gids):
            raise Refused(
                f"{owner.name} may not use this server", hint="Its administrator decides: `users` in the settings."
            )
        if account.expired:
            raise Refused(f"the account {owner.name} has expired", hint="Ask the administrator of the machine.")
        return Asker(held_by(peer, owner), admin)

    async def submitter(self, asker: Asker, run_as: str | None) -> Owner:
        """Whose job a submission of the asker becomes.

        Raises:
            Refused: Root without ``--run-as``, or somebody else with it.
        """
        if run_as is None:
            if asker.uid == 0:
                raise Refused(
                    "a job does not run as root", hint="Say whose it is: `--run-as USER`; it then runs as that account."
                )
            return asker.owner
        if not asker.admin:
            raise Refused("--run-as: only root and administrators may submit for somebody else")
        account: Account = await self.lookup(lambda: self._source.by_name(run_as))
        if account.owner.uid == 0:
            raise Refused("--run-as root: a job does not run as root", hint="Name an ordinary account.")
        if account.expired:
            raise Refused(f"--run-as: the account {account.owner.name} has expired")
        self._keep(account.owner.uid, account)
        return account.owner

    # -- accounts ----------------------------------------------------------------------------------------------

    async def account(self, uid: int) -> Account:
        """The account of a uid, as it was at most a minute ago.

        Raises:
            Refused: There is none that may use gpujobs.
            Unavailable: The account database did not answer in time.
        """
        if (kept := self.recent(uid)) is not None:
            return kept
        account: Account = await self._once(uid, lambda: self._source.by_uid(uid))
        self._keep(uid, account)
        return account

    def recent(self, uid: int) -> Account | None:
        """The account of a uid where it was asked for within the last minute."""
        found: Account | None = self._recent(uid)
        return found

    async def present(self, owner: Owner) -> Owner:
        """An account as it is now: with those of these groups that it still has.

        Raises:
            Refused: It is gone.
            Unavailable: The account database did not answer in time.
        """
        now = (await self.account(owner.uid)).owner
        return replace(owner, groups=tuple(gid for gid in owner.groups if gid in now.groups or gid == owner.gid))

    async def gids(self) -> dict[str, int]:
        """The numbers of the groups that the settings name."""
        settings = self._settings
        names = groups_in([settings.users, settings.admins, *settings.rules.lists()])
        if not names:
            return {}
        found: dict[str, int] | None = self._recent(names)
        if found is None:
            found = await self._once(names, lambda: self._source.gids(names))
            self._keep(names, found)
        return found

    async def group_names(self, owner: Owner) -> list[tuple[int, str]]:
        """The names of an account's groups."""
        return await self.lookup(lambda: self._source.group_names(owner))

    def _recent(self, key: object) -> Any:  # noqa: ANN401 - what was kept under that key
        kept = self._known.get(key)
        return kept[1] if kept is not None and asyncio.get_running_loop().time() - kept[0] < CACHE_SECONDS else None

    def _keep(self, key: object, answer: object) -> None:
        self._known[key] = (asyncio.get_running_loop().time(), answer)

    async def _once(self, key: object, question: Callable[[], T]) -> T:
        """As :meth:`lookup`; who asks the same meanwhile gets the same answer, and takes no other thread."""
        future = self._asking.get(key)
        if future is None:
            future = asyncio.get_running_loop().run_in_executor(self._pool, question)
            self._asking[key] = future
            future.add_done_callback(lambda done: self._answered(key, done))
        return await self._in_time(future)

    def _answered(self, key: object, done: asyncio.Future[Any]) -> None:
        self._asking.pop(key, None)
        if not done.cancelled():
            done.exception()  # whoever asked may have given up: it is nobody's mistake then

    async def lookup(self, question: Callable[[], T]) -> T:
        """Ask the account database.

        Raises:
            Unavailable: It did not answer in time.
        """
        return await self._in_time(asyncio.get_running_loop().run_in_executor(self._pool, question))

    async def _in_time(self, future: asyncio.Future[T]) -> T:
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                return await asyncio.shield(future)
        except TimeoutError:
            raise Unavailable(
                f"the account database did not answer in {LOOKUP_SECONDS:g} s", hint="Try again in a moment."
            ) from None


def held_by(peer: Peer, account: Owner) -> Owner:
    """An account with those of its groups that a process really has, and no other.

    A process may have given groups up, and a set-group-id program has one that is not its user's. Its own gid is the
    job's primary one where the account has that group (as after ``newgrp``), else the account's own.

    Raises:
        Refused: It has none of the account's groups.
    """
    groups = tuple(gid for gid in account.groups if gid in peer.groups or gid == peer.gid)
    if not groups:
        raise Refused(
            f"this process has none of the groups of {account.name}", hint="Log in again, or leave setpriv out."
        )
    primary = next(gid for gid in (peer.gid, account.gid, groups[0]) if gid in groups)
    return replace(account, gid=primary, groups=groups)
