"""The secrets of jobs that have not ended: one file for each submission, which the server's account alone can read.

They are on disk before the submission is answered, so that no restart loses them, and in no table: what a backup of
the ledger holds, what ``show`` reads and what a new submission copies has none of them. The ledger has the file's name,
which nobody can guess, so that a file belongs to the submission that was committed with it and to no other.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from gpujobs.core.errors import Refused, Unavailable
from gpujobs.core.job import Job
from gpujobs.core.ports import Store
from gpujobs.core.secrets import too_large
from gpujobs.core.spec import JobSpec
from gpujobs.service.space import check_space, sync_directory


class SecretStore:
    """The secrets of one server's jobs.

    Args:
        store: The ledger.
        directory: Where the files are kept; made if missing.
    """

    def __init__(self, store: Store, directory: Path) -> None:
        self._store = store
        self._directory = directory
        self._kept: dict[int, str] = {}

    async def start(self) -> None:
        """Read what the ledger has, and remove files that it does not know."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._kept = await self._store.read(lambda ledger: ledger.secrets())
        known = set(self._kept.values())
        for path in self._directory.iterdir():
            if path.name not in known:
                path.unlink()

    async def write(self, specs: Iterable[JobSpec], values: Mapping[str, bytes]) -> str | None:
        """Bring the secrets of a submission to disk, before it is committed; returns the file's name, None for none.

        Raises:
            Refused: They are larger than they may be, or one is missing.
            Unavailable: The disk is full.
        """
        named = {secret.name for spec in specs for secret in spec.secrets}
        if not named:
            return None
        if missing := sorted(named - values.keys()):
            raise Refused(f"the value of the secret {missing[0]} was not sent")
        if problem := too_large(len(values[name]) for name in named):
            raise Refused(f"secrets: {problem}")
        content = json.dumps({name: base64.b64encode(values[name]).decode() for name in sorted(named)}).encode()
        name = secrets.token_hex(16)
        try:
            await asyncio.to_thread(self._write, name, content)
        except OSError as error:
            self.drop(name)
            raise Unavailable(f"the secrets could not be stored: {error.strerror}") from error
        return name

    def _write(self, name: str, content: bytes) -> None:
        check_space(self._directory, "secrets")
        descriptor = os.open(self._directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self._directory)

    def drop(self, name: str) -> None:
        """Remove a file whose submission was not committed."""
        (self._directory / name).unlink(missing_ok=True)

    def committed(self, number: int, name: str) -> None:
        """A submission is on disk, and its secrets' file is its own from now on."""
        self._kept[number] = name

    def of(self, job: Job) -> dict[str, bytes]:
        """The values of a job's secrets, by their names.

        Raises:
            Refused: They are not there any more.
        """
        name = self._kept.get(job.id.number)
        try:
            if name is None:
                raise FileNotFoundError
            kept = json.loads((self._directory / name).read_bytes())
            return {secret.name: base64.b64decode(kept[secret.name]) for secret in job.spec.secrets}
        except (OSError, ValueError, KeyError) as error:
            raise Refused(
                "its secrets are not in the server's state any more", hint="Submit it again."
            ) from error

    def keeps(self, number: int) -> bool:
        """Whether there are any of a submission."""
        return number in self._kept

    def numbers(self) -> list[int]:
        """The submissions of which there are any."""
        return list(self._kept)

    async def forget(self, number: int) -> None:
        """All jobs of a submission have ended: its secrets go."""
        name = self._kept.get(number)
        if name is None:
            return
        self.drop(name)
        await self._store.change(lambda ledger: ledger.secrets_removed(number))
        self._kept.pop(number, None)


def hand_over(path: Path, content: bytes, uid: int, gid: int) -> None:
    """Write what the init reads of a job's secrets, for its user alone; what was there before goes."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    with os.fdopen(descriptor, "wb") as file:
        if os.geteuid() == 0:
            os.fchown(file.fileno(), uid, gid)
        file.write(content)

