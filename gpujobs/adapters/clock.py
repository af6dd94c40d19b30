"""The server's time."""

from __future__ import annotations

import time
from collections.abc import Callable


def since_boot() -> float:
    """Seconds that have passed since the machine was started, asleep or not; nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SteadyClock:
    """What the machine's clock showed at first, and the time that has passed since.

    Somebody who sets the machine's clock, by hand or by NTP, brings no job to its time limit and gives none more time.
    What the clock shows then counts from the next start of the server on.

    Args:
        shown: The machine's clock, in seconds since the epoch.
        passed: A clock that is never set, in seconds.
    """

    def __init__(self, shown: Callable[[], float] = time.time, passed: Callable[[], float] = since_boot) -> None:
        self._passed = passed
        self._zero = shown() - passed()

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._zero + self._passed()
