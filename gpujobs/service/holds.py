"""Holds back the waiting jobs of accounts that are disabled, gone, or cannot be looked up just now.

An account is looked at when one of its jobs could start, and from then on once a minute for as long as it is held:
whole accounts, never their jobs one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from gpujobs.core.errors import GpujobsError, Unavailable
from gpujobs.core.job import Job, JobId, Queued
from gpujobs.core.queue import QueueState, Shape
from gpujobs.service.access import CACHE_SECONDS, Directory

logger = logging.getLogger("gpujobs")

AGAIN_SECONDS = 10.0
"""Before an account database that did not answer is asked again."""

PATIENCE_SECONDS = 1.0
"""For which the queue waits for an account to be looked at, rather than let others pass."""

REASON = "account"
"""The word for why such a job waits."""


class Holds:
    """The waiting jobs of each account, and which accounts are held.

    Args:
        directory: The account database.
        spawn: Runs a task of that name.
        changed: Called when an account is held or let go.
    """

    def __init__(
        self,
        directory: Directory,
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        changed: Callable[[int], None],
    ) -> None:
        self._directory = directory
        self._spawn = spawn
        self._changed = changed
        self._waiting: dict[int, dict[JobId, Shape]] = {}
        self._held: dict[int, str] = {}
        self._asking: set[int] = set()
        self._again = asyncio.Event()

    def reason(self, job: Job) -> str:
        """Why a job's account is held, as a sentence; empty where it is not."""
        return self._held.get(job.owner.uid, "")

    def queued(self, uid: int) -> int:
        """How many jobs of an account wait."""
        return len(self._waiting.get(uid, ()))

    def apply(self, job: Job, shape: Shape) -> None:
        """A job is as it is now."""
        group = self._waiting.setdefault(job.owner.uid, {})
        if isinstance(job.state, Queued):
            group[job.id] = shape
        else:
            group.pop(job.id, None)
        if not group:
            self._waiting.pop(job.owner.uid, None)

    def filter(self, uid: int, queue: QueueState) -> QueueState:
        """The queue without the jobs of an account that is held, and with those of one that is not."""
        for job, shape in self._waiting.get(uid, {}).items():
            queue = queue.dequeue(job) if uid in self._held else queue.enqueue(job, shape)
        return queue

    def may_start(self, uid: int) -> bool:
        """Whether an account's jobs may start now; where that is not known it is asked, and told when it is."""
        account = self._directory.recent(uid)
        if account is not None and not account.expired and uid not in self._held:
            return True
        self.look(uid)
        return False

    def seen(self, uid: int) -> None:
        """An account has just been looked up for another reason, and can be used."""
        if self._held.pop(uid, ""):
            logger.info("the jobs of uid %d are held no longer", uid)
            self._changed(uid)

    def look_again(self) -> None:
        """Look at all held accounts now."""
        self._again.set()
        self._again = asyncio.Event()

    def look(self, uid: int) -> None:
        """Look at an account, unless that is under way; what comes of it is told."""
        if uid not in self._asking:
            self._asking.add(uid)
            self._spawn(self._look(uid), f"account {uid}")

    async def _look(self, uid: int) -> None:
        """Ask until the account can be used, or none of its jobs waits."""
        try:
            while True:
                reason, again = await self._standing_or_held(uid)
                if reason != self._held.get(uid, ""):
                    if reason:
                        self._held[uid] = reason
                        logger.warning("the jobs of uid %d are held: %s", uid, reason)
                    else:
                        del self._held[uid]
                        logger.info("the jobs of uid %d are held no longer", uid)
                if not reason or not self._waiting.get(uid):
                    self._held.pop(uid, None)
                    return
                self._changed(uid)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(again):
                        await self._again.wait()
        finally:
            self._asking.discard(uid)
            self._changed(uid)

    async def _standing_or_held(self, uid: int) -> tuple[str, float]:
        """As :meth:`_standing`; an account that cannot be told of soon is held meanwhile, so that others pass it."""
        asking = asyncio.ensure_future(self._standing(uid))
        try:
            await asyncio.wait({asking}, timeout=PATIENCE_SECONDS)
            if not asking.done() and uid not in self._held:
                self._held[uid] = "the account database has not answered yet"
                self._changed(uid)
            return await asking
        finally:
            asking.cancel()

    async def _standing(self, uid: int) -> tuple[str, float]:
        """Why an account cannot be used, empty where it can, and after how many seconds to ask again."""
        try:
            account = await self._directory.account(uid)
        except Unavailable as error:
            return error.message, AGAIN_SECONDS
        except GpujobsError as error:
            return error.message, CACHE_SECONDS
        return (f"the account {account.owner.name} has expired" if account.expired else ""), CACHE_SECONDS
