"""A machine on which nothing is written: the parts of a Runner that are about more than containers."""

from __future__ import annotations


class IdleMachine:
    """What :class:`gpujobs.core.ports.Runner` asks of a machine."""

    async def runtimes(self) -> tuple[str, ...]:
        """Those of a machine with GPUs."""
        return ("nvidia", "runc")

    async def disk_free(self) -> int | None:
        """Unknown: there is no disk."""

    async def layer_bytes(self, _: str) -> int:
        """Nothing is ever written."""
        return 0
