"""Tells everybody who watches a submission that one of its jobs has changed."""

from __future__ import annotations

import asyncio

TELL_SECONDS = 0.2
"""The pause between two tellings of progress, which comes many times a second."""


class Broadcast:
    """The watchers of all submissions."""

    def __init__(self) -> None:
        self._watchers: dict[int, set[asyncio.Event]] = {}
        self._later: set[int] = set()

    def watch(self, number: int) -> asyncio.Event:
        """An event that is set at each change of a submission's jobs; give it back with :meth:`unwatch`."""
        event = asyncio.Event()
        self._watchers.setdefault(number, set()).add(event)
        return event

    def unwatch(self, number: int, event: asyncio.Event) -> None:
        """No longer tell this event."""
        group = self._watchers.get(number, set())
        group.discard(event)
        if not group:
            self._watchers.pop(number, None)

    def tell(self, number: int) -> None:
        """A job of this submission has changed."""
        self._later.discard(number)
        for event in self._watchers.get(number, ()):
            event.set()

    def tell_soon(self, number: int) -> None:
        """As :meth:`tell`, a few times a second at most."""
        if number not in self._later:
            self._later.add(number)
            asyncio.get_running_loop().call_later(TELL_SECONDS, self.tell, number)
