"""What the service needs of the world, as small protocols: the adapters satisfy them, and the fakes do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gpujobs.core.inventory import Inventory, XidEvent


class Clock(Protocol):
    """The time."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...


class GpuSource(Protocol):
    """Where inventories come from. Called from one worker thread."""

    def snapshot(self, locate: Callable[[str], str | None] | None = None) -> Inventory:
        """The GPUs as they are now; never raises for a driver that is away: see ``Inventory.problem``.

        Args:
            locate: The job (``12`` or ``12_3``) that a container, by its full id, belongs to.
        """
        ...

    def wait_event(self, timeout_s: float) -> XidEvent | None:
        """The next XID error; None where none came in that many seconds."""
        ...

    def close(self) -> None:
        """Let go of the driver."""
        ...
