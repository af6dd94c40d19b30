"""The parts of a server that die with it, and what befalls them: its ledger, its mounts, its accounts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gpujobs.adapters.store import Ledger, Store
from gpujobs.core.accounts import Account
from gpujobs.core.errors import Unavailable
from gpujobs.core.job import Owner
from gpujobs.testing.parts import AnyAccounts, FakeMounts
from gpujobs.testing.time import VirtualLoop

T = TypeVar("T")


class Died(BaseException):
    """The server was killed at a fault point."""


class WatchedStore(Store):
    """The real store, on a loop that waits for its writer, and which dies with its server.

    Args:
        path: The database.
        virtual: The loop.
        lag: How many seconds later an answer comes: what was read may not be so any more, and what was
            written is not known yet.
    """

    def __init__(self, path: Path, virtual: VirtualLoop, lag: Callable[[], float]) -> None:
        super().__init__(path)
        self._lag = lag
        self._virtual = virtual
        self._dead = False
        self._told = 0.0
        self.full = False

    async def change(self, action: Callable[[Ledger], T]) -> T:
        await self._alive()
        if self.full:
            await asyncio.sleep(0)
            raise Unavailable("nothing was written: the disk is full")
        future: Future[T] = Future()
        answer, told = asyncio.wrap_future(future), Future[None]()
        future.add_done_callback(lambda _: told.set_result(None))  # after the one that wakes the loop
        self._virtual.await_thread(lambda: self._inbox.put((action, future)), told)
        made = await answer
        # The writer's answers come late too, but in the order of what it has written.
        now = self._virtual.time()
        self._told = max(now + self._lag(), self._told + 1e-6)
        await asyncio.sleep(self._told - now)
        return made

    async def read(self, query: Callable[[Ledger], T]) -> T:
        await self._alive()
        found = await super().read(query)
        await asyncio.sleep(self._lag())
        return found

    async def _alive(self) -> None:
        if self._dead:
            await asyncio.get_running_loop().create_future()

    def cut(self) -> None:
        """Its process is dead; what has been handed over is written or not."""
        self._dead = True


class MortalMounts(FakeMounts):
    """Mounts whose caller can die."""

    def __init__(self, pins: set[str]) -> None:
        super().__init__(pins)
        self.dead = False

    def _check(self, path: str) -> None:
        if self.dead:
            raise asyncio.CancelledError
        super()._check(path)

    async def unpin(self, name: str) -> None:
        if not self.dead:
            await super().unpin(name)


class Accounts(AnyAccounts):
    """Accounts that expire, in a database that may not answer."""

    silent = False

    def by_uid(self, uid: int) -> Account:
        self._check()
        return super().by_uid(uid)

    def group_names(self, owner: Owner) -> list[tuple[int, str]]:
        self._check()
        return super().group_names(owner)

    def _check(self) -> None:
        if self.silent:
            raise Unavailable("the account database did not answer")

    def expire(self, uid: int, *, expired: bool) -> None:
        self.known[uid] = replace(self.known[uid], expired=expired)


class Complaints(logging.Handler):
    """Takes note of tasks that died."""

    def __init__(self, wrong: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._wrong = wrong

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and not isinstance(record.exc_info[1], Died):
            self._wrong.append(logging.Formatter().format(record))
