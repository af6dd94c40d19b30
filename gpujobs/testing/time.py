"""Virtual time: an event loop that leaps to the next thing that will happen, and a clock that goes with it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import selectors
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

EPOCH = 1_700_000_000.0
"""Where virtual clocks begin, in seconds since the epoch."""


class Stuck(RuntimeError):
    """Nothing is left that could ever happen, and something waits."""


class Spinning(RuntimeError):
    """The program goes round and round while no time passes."""


SPINNING = 20_000
"""More turns of the loop than any program needs at one moment."""


class _Leaping(selectors.DefaultSelector):
    """A selector that asks what it should do before each wait."""

    before: Callable[[float | None], float | None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(self.before(timeout))


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while there is nothing to do, and then at once.

    What would run in threads runs on the spot, so that the same program takes the same course each time. Threads
    of others' are waited for: see :meth:`await_thread`.

    Attributes:
        iterations: How many turns of the loop there were.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._limit: int | None = None
        self._turns_now = 0
        self._given: list[tuple[Callable[[], None], concurrent.futures.Future[Any]]] = []
        self.iterations = 0
        selector = _Leaping()
        selector.before = self._before_waiting
        super().__init__(selector)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def _before_waiting(self, timeout: float | None) -> float | None:
        self.iterations += 1
        if self._limit is not None:
            self._limit -= 1
            if self._limit <= 0:
                self.stop()
                timeout = 0.0
        if self._given:
            self.hand_over()
        elif timeout is None:
            if self._limit is None:
                raise Stuck
            self.stop()
        else:
            self._turns_now = 0 if timeout else self._turns_now + 1
            self._now += timeout
            if self._turns_now > SPINNING:
                raise Spinning
        return 0.0

    def await_thread(self, begin: Callable[[], None], done: concurrent.futures.Future[Any]) -> None:
        """Give a thread something to do in the loop's next turn, which waits until it is done.

        Where the loop is stopped before that, it has not begun: see :meth:`hand_over` and :meth:`drop`.
        """
        self._given.append((begin, done))

    def hand_over(self) -> None:
        """Give the threads what is waiting, and wait until they have done it."""
        given, self._given = self._given, []
        for begin, _ in given:
            begin()
        concurrent.futures.wait([done for _, done in given])

    def drop(self) -> None:
        """Forget what has not been given to a thread yet."""
        self._given.clear()

    def run_in_executor(
        self, executor: concurrent.futures.Executor | None, func: Callable[..., T], *args: object
    ) -> asyncio.Future[T]:
        """Call it now; the answer comes in the loop's next turn."""
        del executor
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        future = self.create_future()

        def answer() -> None:
            if future.cancelled():
                return
            if (error := done.exception()) is None:
                future.set_result(done.result())
            else:
                future.set_exception(error)

        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to whoever asked
            done.set_exception(error)
        self.call_soon(answer)
        return future

    def run_for(self, seconds: float) -> None:
        """Let that much virtual time pass with all that happens in it; :meth:`stop` ends it early."""
        handle = self.call_later(seconds, self.stop)
        self.run_forever()
        handle.cancel()

    def run_turns(self, count: int) -> None:
        """Go through so many turns of the loop, or as many as there are."""
        self._limit = count
        try:
            self.run_forever()
        finally:
            self._limit = None


class VirtualClock:
    """The time of a virtual loop, as seconds since the epoch.

    Args:
        loop: The loop.

    Attributes:
        offset: Change it for a step of the clock.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.offset = EPOCH

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.offset + self._loop.time()
