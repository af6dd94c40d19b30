"""One server per Engine: a lock that lives in the Engine itself.

Two servers on one Engine would give a GPU twice. The lock is a named volume of the Engine, since only an account
that may use Docker (and so is root's equal) can make one: a file or a socket that any account could reach, any
account could squat. Making a volume is atomic in the Engine: who makes a name first finds its own label on it.
A holder that died is told by its pid, start time and boot; the next one takes the next number, so that two
contenders can never remove each other's.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

import docker
from docker.errors import APIError, NotFound

from gpujobs.adapters.engine import Engine
from gpujobs.core.errors import Refused

_NAME = re.compile(r"gpujobs-lock-([0-9]{1,12})", re.ASCII)
_LABEL = "gpujobs.lock."


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that holds the lock, so that others can tell whether it lives."""

    nonce: str
    pid: int
    uid: int
    start: int
    boot: str
    namespace: str

    @staticmethod
    def me() -> Holder:
        """This process."""
        return Holder(
            nonce=secrets.token_hex(16),
            pid=os.getpid(),
            uid=os.getuid(),
            start=int(_stat(os.getpid())[_START]),
            boot=boot_id(),
            namespace=os.readlink("/proc/self/ns/pid"),
        )

    def labels(self) -> dict[str, str]:
        """As the volume's labels."""
        return {f"{_LABEL}{name}": str(getattr(self, name)) for name in self.__slots__}

    @staticmethod
    def of(labels: dict[str, str]) -> Holder | None:
        """The holder that labels tell of; None where they are not ours."""
        try:
            return Holder(
                nonce=labels[f"{_LABEL}nonce"],
                pid=int(labels[f"{_LABEL}pid"]),
                uid=int(labels[f"{_LABEL}uid"]),
                start=int(labels[f"{_LABEL}start"]),
                boot=labels[f"{_LABEL}boot"],
                namespace=labels[f"{_LABEL}namespace"],
            )
        except (KeyError, ValueError):
            return None

    def alive(self) -> bool:
        """Whether it may still be running; where that cannot be told, it is taken to be."""
        if self.boot != boot_id():
            return False
        if self.namespace != os.readlink("/proc/self/ns/pid"):
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        fields = _stat(self.pid)
        if not fields:
            return True
        return int(fields[_START]) == self.start and fields[_STATE] not in "ZX"  # a zombie holds nothing


def boot_id() -> str:
    """The kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


_STATE, _START = 0, 19
"""Fields 3 and 22 of proc(5)'s stat, counted after the name: the state's letter, the start in ticks since the boot."""


def _stat(pid: int) -> list[str]:
    """What /proc says of a process after its name; empty where that is hidden or it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


async def acquire(engine: Engine) -> Holder:
    """Take the lock of this Engine for this process.

    Raises:
        Refused: A living server holds it; its pid and uid are named.
    """
    mine = Holder.me()
    await engine.call(lambda client: _acquire(client, mine))
    return mine


async def holds(engine: Engine, mine: Holder) -> bool:
    """Whether the lock is still this process's: somebody may have pruned it; then it is made again."""

    def check(client: docker.APIClient) -> bool:
        if any(holder is not None and holder.nonce == mine.nonce for holder in _volumes(client).values()):
            return True
        try:
            _acquire(client, mine)
        except Refused:
            return False
        return True

    return await engine.call(check)


def _acquire(client: docker.APIClient, mine: Holder) -> None:
    """Make the next volume, and look again: the lock is ours where ours is there and no other holder lives.

    Who looked long ago may make a volume beside a newer holder's. The later look of the two sees both, and gives way.
    """
    while True:
        taken = _volumes(client)
        own = [number for number, holder in taken.items() if holder is not None and holder.nonce == mine.nonce]
        others = {n: holder for n, holder in taken.items() if holder is not None and holder.nonce != mine.nonce}
        if living := [holder for _, holder in sorted(others.items()) if holder.alive()]:
            for number in own:
                _remove(client, f"gpujobs-lock-{number}")
            raise _held(living[0])
        if own:
            break
        number = max(taken, default=0) + 1
        made = client.create_volume(f"gpujobs-lock-{number}", labels=mine.labels())
        holder = Holder.of(made.get("Labels") or {})
        if holder is not None and holder.nonce != mine.nonce and holder.alive():
            raise _held(holder)
    for number in others:
        _remove(client, f"gpujobs-lock-{number}")


def _volumes(client: docker.APIClient) -> dict[int, Holder | None]:
    rows = client.volumes(filters={"name": "gpujobs-lock-"}).get("Volumes") or []
    return {
        int(match[1]): Holder.of(row.get("Labels") or {})
        for row in rows
        if (match := _NAME.fullmatch(str(row["Name"])))
    }


def _remove(client: docker.APIClient, name: str) -> None:
    try:
        client.remove_volume(name)
    except (NotFound, APIError):
        return


async def release(engine: Engine, mine: Holder) -> None:
    """Give the lock back, where it is still this process's."""

    def drop(client: docker.APIClient) -> None:
        for number, holder in _volumes(client).items():
            if holder is not None and holder.nonce == mine.nonce:
                _remove(client, f"gpujobs-lock-{number}")

    await engine.call(drop)


def _held(holder: Holder) -> Refused:
    return Refused(
        f"another gpujobs server (pid {holder.pid}, uid {holder.uid}) uses this Docker Engine; "
        "two would give a GPU twice",
        hint="Use that server, or stop it first.",
    )
