"""Build contexts: asked of a submission's client, waited for, kept until the builds are done.

A submission is answered before its contexts have come, with a key for each. Until a context is here its jobs are
queued but take no part in the queue; where it does not come, they fail. All of it is in the ledger, so a restart
changes nothing but that a transfer under way begins again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gpujobs.buildcontext import MAX_BYTES
from gpujobs.core import codec
from gpujobs.core.errors import Refused, Unavailable, UnknownId
from gpujobs.core.job import Job
from gpujobs.core.ports import Clock, Ledger, Store
from gpujobs.core.spec import Build, JobSpec
from gpujobs.service.space import check_space, sync_directory

WAIT_SECONDS = 600.0
"""How long a submission's client may take to begin sending."""

MAX_TAR_BYTES = MAX_BYTES + (512 << 20)
"""Of a context's tar file: its files, and the headers of as many as there may be."""

_WRITE = 1 << 20
_LOOK = 64 << 20


@dataclass(slots=True)
class _Context:
    number: int
    key: str
    context: str
    dockerfile: str
    deadline: float
    received: bool

    def is_of(self, build: Build) -> bool:
        return (self.context, self.dockerfile) == (build.context, build.dockerfile)


class Contexts:
    """The contexts of one server.

    Args:
        store: The ledger.
        directory: Where the files are kept; made if missing.
        clock: The time.
    """

    def __init__(self, store: Store, directory: Path, clock: Clock) -> None:
        self._store = store
        self._directory = directory
        self._clock = clock
        self._kept: dict[int, list[_Context]] = {}
        self._coming: set[tuple[int, str]] = set()
        self.changed = asyncio.Event()

    async def start(self) -> None:
        """Read what the ledger has, and remove files that it does not know."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for row in await self._store.read(lambda ledger: ledger.contexts()):
            self._keep(_Context(row["number"], row["key"], row["context"], row["dockerfile"], row["deadline"],
                                bool(row["received"])))  # fmt: skip
        known = {self._path(c).name for group in self._kept.values() for c in group}
        for path in self._directory.iterdir():
            if path.name not in known:
                path.unlink()

    def ask(self, ledger: Ledger, number: int, specs: Iterable[JobSpec], now: float) -> list[tuple[str, str, str]]:
        """Write down what a submission's client is to send; returns (key, directory, Dockerfile) of each."""
        wanted: dict[tuple[str, str], None] = {
            (spec.build.context, spec.build.dockerfile): None for spec in specs if spec.build is not None
        }
        asked = []
        for context, dockerfile in wanted:
            key = secrets.token_hex(16)
            ledger.add_context(number, key, context, dockerfile, now + WAIT_SECONDS)
            asked.append((key, context, dockerfile))
        return asked

    def asked(self, number: int, contexts: Iterable[tuple[str, str, str]], now: float) -> None:
        """Take note of what :meth:`ask` wrote, now that it is on disk."""
        for key, context, dockerfile in contexts:
            self._keep(_Context(number, key, context, dockerfile, now + WAIT_SECONDS, received=False))
        self.changed.set()

    def _keep(self, context: _Context) -> None:
        self._kept.setdefault(context.number, []).append(context)

    def rows(self, numbers: Iterable[int]) -> list[dict[str, object]]:
        """What the clients of submissions are still to send, as the API tells it."""
        return [
            {"id": number, "key": c.key, "context": c.context, "dockerfile": c.dockerfile}
            for number in numbers
            for c in self._kept.get(number, ())
            if not c.received
        ]

    def awaits(self, job: Job) -> bool:
        """Whether a job's context has not come yet."""
        found = self._of(job)
        return found is not None and not found.received

    def path(self, job: Job) -> Path | None:
        """Where a job's context is; None where it is not there any more."""
        found = self._of(job)
        return None if found is None else self._path(found)

    def _of(self, job: Job) -> _Context | None:
        build = job.spec.build
        if build is None:
            return None
        return next((c for c in self._kept.get(job.id.number, ()) if c.is_of(build)), None)

    def _path(self, context: _Context) -> Path:
        return self._directory / f"{context.number}-{context.key}.tar"

    # -- receiving ---------------------------------------------------------------------------------------------

    async def receive(self, number: int, key: str, chunks: AsyncIterator[bytes]) -> None:
        """Take a context's tar file in; it is on disk when this returns.

        Raises:
            UnknownId: No context of that key is waited for.
            Refused: It is larger than it may be, or comes from two sides.
            Unavailable: The disk is full.
        """
        known = self._kept.get(number, ())
        found = next((c for c in known if secrets.compare_digest(c.key.encode(), key.encode("utf-8", "replace"))), None)
        if found is None:
            raise UnknownId(f"job {number} waits for no build context of that key")
        if found.received:
            return
        if (number, key) in self._coming:
            raise Refused(f"the build context of job {number} is being sent already")
        self._coming.add((number, key))
        temporary = self._path(found).with_suffix(".part")
        try:
            with temporary.open("wb") as file:
                await self._write(file, chunks)
                await asyncio.to_thread(_sync, file)
            temporary.replace(self._path(found))
            await asyncio.to_thread(sync_directory, self._directory)
            await self._store.change(lambda ledger: ledger.context_received(number, key))
            found.received = True
        except OSError as error:
            raise Unavailable(f"the build context could not be stored: {error.strerror}") from error
        finally:
            self._coming.discard((number, key))
            temporary.unlink(missing_ok=True)
            self.changed.set()

    async def _write(self, file: BinaryIO, chunks: AsyncIterator[bytes]) -> None:
        pending, size, looked = bytearray(), 0, -_LOOK
        async for chunk in chunks:
            pending += chunk
            size += len(chunk)
            if size > MAX_TAR_BYTES:
                raise Refused(f"the build context is larger than {MAX_BYTES >> 30} GiB",
                              hint="Name in .dockerignore what the build does not need.")  # fmt: skip
            if len(pending) >= _WRITE:
                if size - looked >= _LOOK:
                    looked = size
                    check_space(self._directory, "a build context")
                await asyncio.to_thread(file.write, bytes(pending))
                pending.clear()
        await asyncio.to_thread(file.write, bytes(pending))

    def numbers(self) -> list[int]:
        """The submissions for which something is waited for or kept."""
        return list(self._kept)

    def next_deadline(self) -> float | None:
        """When the next of the contexts that nobody sends is given up, in seconds since the epoch."""
        return min((c.deadline for c in self._waited()), default=None)

    def overdue(self) -> set[int]:
        """The submissions of which a context has not come in time."""
        now = self._clock.now()
        return {c.number for c in self._waited() if c.deadline <= now}

    def _waited(self) -> list[_Context]:
        return [
            c for group in self._kept.values() for c in group
            if not c.received and (c.number, c.key) not in self._coming
        ]  # fmt: skip

    # -- builds ------------------------------------------------------------------------------------------------

    async def image(self, job: Job) -> str | None:
        """The id of the image that came of a job's build; None where it was not built yet."""
        assert job.spec.build is not None
        done = await self._store.read(lambda ledger: ledger.builds(job.id.number))
        return done.get(_digest(job.spec.build))

    async def built(self, job: Job, image: str) -> None:
        """A job's build is done; the context goes when it was the last that needs it."""
        build = job.spec.build
        assert build is not None
        number = job.id.number
        await self._store.change(lambda ledger: ledger.add_build(number, _digest(build), image))
        done = await self._store.read(lambda ledger: ledger.builds(number))
        group = await self._store.read(lambda ledger: ledger.submission(number))
        builds = {other.spec.build for other in group}
        for context in list(self._kept.get(number, ())):
            if all(_digest(b) in done for b in builds if b is not None and context.is_of(b)):
                await self._remove(context)

    def keeps(self, number: int) -> bool:
        """Whether anything is kept for a submission."""
        return number in self._kept

    async def forget(self, number: int) -> None:
        """All jobs of a submission have ended: nothing of it is needed."""
        for context in list(self._kept.get(number, ())):
            await self._remove(context)

    async def _remove(self, context: _Context) -> None:
        self._path(context).unlink(missing_ok=True)
        await self._store.change(lambda ledger: ledger.context_removed(context.number, context.key))
        group = self._kept.get(context.number, [])
        if context in group:
            group.remove(context)
        if not group:
            self._kept.pop(context.number, None)
        self.changed.set()


def _digest(build: Build) -> str:
    return hashlib.sha256(json.dumps(codec.encode(build), sort_keys=True).encode()).hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
