"""Who is asking: the account behind a connection, from the kernel, never from what the client says."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from gpujobs.core.errors import InvalidInput, Refused, Unavailable
from gpujobs.core.job import Job, Owner

T = TypeVar("T")

NOBODY = 65534
LOOKUP_SECONDS = 10.0
CACHE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a connection, as it was when it connected (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """The peer of a unix socket."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", data))


def account(uid: int) -> Owner:
    """The account of a uid, with all its groups, from the account database.

    Raises:
        Refused: There is no such account, or it is one that nobody is.
    """
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise Refused(
            f"uid {uid} has no account on this machine", hint="Jobs run as an account of the machine."
        ) from None
    return _owner(entry)


def account_named(name: str) -> Owner:
    """The account of that name.

    Raises:
        InvalidInput: There is none.
        Refused: It may not be used.
    """
    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):
        raise InvalidInput(f"--run-as: there is no account {name[:64]!r} on this machine") from None
    return _owner(entry)


def _owner(entry: pwd.struct_passwd) -> Owner:
    if entry.pw_uid == NOBODY:
        raise Refused(f"{entry.pw_name} (uid {NOBODY}) is nobody's account: it may not use gpujobs")
    groups = tuple(sorted({entry.pw_gid, *os.getgrouplist(entry.pw_name, entry.pw_gid)}))
    return Owner(uid=entry.pw_uid, gid=entry.pw_gid, groups=groups, name=entry.pw_name, home=entry.pw_dir)


def group_names(owner: Owner) -> list[tuple[int, str]]:
    """The names of an account's groups; a group without a name is called by its number."""
    names = []
    for gid in owner.groups:
        try:
            names.append((gid, grp.getgrgid(gid).gr_name))
        except KeyError:
            names.append((gid, f"g{gid}"))
    return names


class Directory:
    """The account database, asked off the loop with a time limit, answers kept for a minute.

    An account database over the network can hang: that must hold up who asks, and nobody else.
    """

    def __init__(self, admins: tuple[str, ...], only_uid: int | None) -> None:
        self._admins = frozenset(admins)
        self._only = only_uid
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="accounts")
        self._cache: dict[int, tuple[float, Owner]] = {}

    async def owner(self, uid: int) -> Owner:
        """The account of a uid.

        Raises:
            Refused: It may not use this server.
            Unavailable: The account database did not answer in time.
        """
        if self._only is not None and uid != self._only:
            raise Refused(f"this server serves uid {self._only} alone", hint="Start one of your own: `gpujobs serve`.")
        now = asyncio.get_running_loop().time()
        if (kept := self._cache.get(uid)) is not None and now - kept[0] < CACHE_SECONDS:
            return kept[1]
        owner = await self.lookup(lambda: account(uid))
        self._cache[uid] = (now, owner)
        return owner

    async def named(self, name: str) -> Owner:
        """The account of a name."""
        return await self.lookup(lambda: account_named(name))

    async def lookup(self, question: Callable[[], T]) -> T:
        """Ask the account database.

        Raises:
            Unavailable: It did not answer in time.
        """
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._pool, question)
        except TimeoutError:
            raise Unavailable(
                f"the account database did not answer in {LOOKUP_SECONDS:g} s", hint="Try again in a moment."
            ) from None

    def is_admin(self, owner_uid: int, name: str) -> bool:
        """Whether that account may act on everybody's jobs."""
        return owner_uid == 0 or name in self._admins

    def may_act(self, asker: Owner, job: Job) -> bool:
        """Whether the asker may see inside a job and act on it: its owner, or an administrator."""
        return asker.uid == job.owner.uid or self.is_admin(asker.uid, asker.name)

    async def submitter(self, asker: Owner, run_as: str | None) -> Owner:
        """Whose job a submission of the asker becomes.

        Raises:
            Refused: Root without ``--run-as``, or somebody else with it.
        """
        if run_as is None:
            if asker.uid == 0:
                raise Refused(
                    "a job does not run as root", hint="Say whose it is: `--run-as USER`; it then runs as that account."
                )
            return asker
        if not self.is_admin(asker.uid, asker.name):
            raise Refused("--run-as: only root and administrators may submit for somebody else")
        owner = await self.named(run_as)
        if owner.uid == 0:
            raise Refused("--run-as root: a job does not run as root", hint="Name an ordinary account.")
        return owner
