"""Containers as the service asks for them: the Engine's calls, its streams, and the device probe, in one place."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

from gpujobs.adapters import devices, streams
from gpujobs.adapters.engine import Engine, seen_of
from gpujobs.adapters.logfile import LogWriter
from gpujobs.core.ports import Disconnected, EngineEvent, Log, LogEnd, Reconnected
from gpujobs.core.reconcile import Seen


class DockerRunner(Engine):
    """The Docker Engine as a :class:`gpujobs.core.ports.Runner`.

    Args:
        host: ``DOCKER_HOST``.
        init: The init's binary on this host.
        nodes: A private directory for the device probe.
    """

    def __init__(self, host: str, init: Path, nodes: Path) -> None:
        super().__init__(host)
        self._init = init
        self._nodes = nodes

    @property
    def log_config(self) -> Mapping[str, object]:
        """See :data:`gpujobs.adapters.streams.LOG_CONFIG`."""
        return streams.LOG_CONFIG

    async def seen(self, container: str) -> Seen:
        """What reconciliation needs of a container."""
        return seen_of(await self.inspect(container))

    async def granted(self, container: str, pid: int, minors: Iterable[int]) -> frozenset[int]:
        """See :func:`gpujobs.adapters.devices.granted`."""
        return await devices.granted(self, self._init, self._nodes, container, pid, minors)

    def events(self, since: float) -> AsyncIterator[EngineEvent | Disconnected | Reconnected]:
        """What happens to containers and volumes from a time on, in seconds since the epoch."""
        return streams.engine_events(self.host, since, {"type": ["container", "volume"]})

    async def follow(self, container: str, log: Log) -> LogEnd:
        """See :func:`gpujobs.adapters.streams.follow_log`."""
        if not isinstance(log, LogWriter):
            raise TypeError("only a log on disk can be followed into")
        return await streams.follow_log(self.host, container, log)
