"""What one account may take of the server itself, so that no other account notices."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from gpujobs.core.errors import Refused
from gpujobs.core.ports import Clock
from gpujobs.core.rules import Bucket, take
from gpujobs.settings import Settings

AT_ONCE = 4
"""Short requests of one account that are worked on at a time; its others wait in line, and nobody else's."""


class Quotas:
    """Counts of each account, and their limits.

    Args:
        clock: For rates; it may be set back.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._settings = Settings()
        self._connections: Counter[int] = Counter()
        self._streams: Counter[int] = Counter()
        self._buckets: dict[int, Bucket] = {}
        self._turns: dict[int, tuple[asyncio.Semaphore, int]] = {}

    def apply(self, settings: Settings) -> None:
        """From now on these are the limits."""
        self._settings = settings

    def connected(self, uid: int) -> str:
        """Count a connection; why it is one too many, empty where it is not. Root has no limit."""
        self._connections[uid] += 1
        most = self._settings.connections
        if uid != 0 and self._connections[uid] > most:
            return f"uid {uid} has {most} connections open, which is the limit"
        return ""

    def disconnected(self, uid: int) -> None:
        """A connection is closed."""
        _drop(self._connections, uid)

    @contextmanager
    def stream(self, uid: int) -> Iterator[None]:
        """Something that goes on: a log that is followed, jobs that are watched, an upload.

        Raises:
            Refused: The account has as many as it may.
        """
        most = self._settings.streams
        if uid != 0 and self._streams[uid] >= most:
            raise Refused(
                f"you have {most} logs, watched jobs and uploads open, which is the limit",
                hint="End some of the commands that follow jobs.",
            )
        self._streams[uid] += 1
        try:
            yield
        finally:
            _drop(self._streams, uid)

    @asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait in the account's own line until one of its short requests may be worked on."""
        semaphore, users = self._turns.get(uid) or (asyncio.Semaphore(AT_ONCE), 0)
        self._turns[uid] = (semaphore, users + 1)
        try:
            async with semaphore:
                yield
        finally:
            _, users = self._turns[uid]
            if users == 1:
                del self._turns[uid]
            else:
                self._turns[uid] = (semaphore, users - 1)

    def submission(self, uid: int) -> None:
        """Count a submission.

        Raises:
            Refused: The account has made as many in the last minute as it may.
        """
        if uid == 0:
            return
        most = self._settings.submissions_per_minute
        self._buckets[uid], wait = take(self._buckets.get(uid), self._clock.now(), most)
        if wait:
            raise Refused(
                f"at most {most} submissions a minute are taken from one account",
                hint=f"Try again in {wait:.1f} s. One submission can hold many files, and an array many jobs.",
            )


def _drop(counts: Counter[int], uid: int) -> None:
    counts[uid] -= 1
    if counts[uid] <= 0:
        del counts[uid]
