"""The logs of all attempts: one directory each, ``<number>/<index>.<attempt>.log``, -1 for no index."""

from __future__ import annotations

from pathlib import Path

from gpujobs.adapters.logfile import HEAD_LIMIT, TAIL_LIMIT, LogReader, LogWriter
from gpujobs.core.job import JobId


class LogStore:
    """The logs below a directory; see :class:`gpujobs.core.ports.Logs`.

    Args:
        root: Made with mode 0700 where it is missing.
        head_limit: Bytes kept of each log's beginning.
        tail_limit: Bytes kept of its end, beyond that.
    """

    def __init__(self, root: Path, head_limit: int = HEAD_LIMIT, tail_limit: int = TAIL_LIMIT) -> None:
        self._root = root
        self._limits = (head_limit, tail_limit)
        self._open: dict[tuple[JobId, int], LogWriter] = {}

    def _path(self, job: JobId, attempt: int) -> Path:
        number, index = job.key
        return self._root / str(number) / f"{index}.{attempt}.log"

    def log(self, job: JobId, attempt: int) -> LogWriter:
        """The log of an attempt, to be written."""
        key = (job, attempt)
        if key not in self._open:
            path = self._path(job, attempt)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open[key] = LogWriter(path, *self._limits)
        return self._open[key]

    def is_open(self, job: JobId, attempt: int) -> bool:
        """Whether it is being written."""
        return (job, attempt) in self._open

    def reader(self, job: JobId, attempt: int) -> tuple[LogReader, bool] | None:
        """A reader, and whether the log is still being written; None where there is no log."""
        live = self._open.get((job, attempt))
        if live is not None:
            return live.reader(), True
        path = self._path(job, attempt)
        return (LogReader(path), False) if path.exists() else None

    async def finish(self, job: JobId, attempt: int) -> None:
        """It is complete: brought to the disk, for the Engine's own copy may go from now on."""
        if (log := self._open.get((job, attempt))) is not None:
            await log.finish()
            self._open.pop((job, attempt), None)

    def close(self) -> None:
        """Stop writing all of them; what is there stays."""
        for log in self._open.values():
            log.close()
        self._open.clear()
