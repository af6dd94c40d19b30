"""Images, mounts and accounts that are not there, for tests of what uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gpujobs.core.accounts import Account
from gpujobs.core.container import Image
from gpujobs.core.errors import InvalidInput, Refused
from gpujobs.core.job import Owner
from gpujobs.core.ports import BuildLimits, EngineAway, Gone, MountHeld, Pin
from gpujobs.core.pulls import Progress
from gpujobs.core.spec import Build
from gpujobs.testing.engine import FakeEngine


class FakeImages:
    """Images of an Engine in memory, and a registry.

    Args:
        engine: Where they are: its absences are theirs.
        there: References of the images that are there.
        registry: References of those that can be pulled.

    Attributes:
        pull_seconds: How long a pull takes.
    """

    def __init__(self, engine: FakeEngine, there: set[str], registry: set[str]) -> None:
        self.engine = engine
        self.there = there
        self.registry = registry
        self.pull_seconds = 5.0
        self._cut = False

    def cut(self) -> None:
        """The process that uses it is dead: nothing that it has begun goes on."""
        self._cut = True

    async def _reach(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._cut:
            await asyncio.get_running_loop().create_future()
        if self.engine.away:
            raise EngineAway("the Docker Engine does not answer")

    @staticmethod
    def _image(reference: str) -> Image:
        return Image(id=f"sha256:{reference.removeprefix('sha256:')}", reference=reference)

    async def local(self, reference: str, owner: Owner) -> Image:
        """An image that is there."""
        del owner
        await self._reach(self.engine.latency())
        if reference.removeprefix("sha256:") not in self.there:
            raise Gone(f"No such image: {reference}")
        return self._image(reference)

    async def pull(self, reference: str, progress: Callable[[Progress], None]) -> Image:
        """Fetch one from the registry."""
        await self._reach(self.pull_seconds / 2)
        progress(Progress((), f"pulling {reference}: 50 %"))
        await self._reach(self.pull_seconds / 2)
        if reference not in self.registry:
            raise Refused(f"the registry has no image {reference}")
        self.there.add(reference)
        return self._image(reference)

    async def build(
        self, context: Path, build: Build, owner: Owner, limits: BuildLimits, output: Callable[[str], None],
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> Image:  # fmt: skip
        """Build one: its reference is the context's name."""
        del build, owner, limits
        await self._reach(self.pull_seconds)
        progress(Progress((), "step 1 of 1"))
        output("Step 1/1")
        self.there.add(context.name)
        return self._image(context.name)


class FakeMounts:
    """Paths that any owner can open, but for those said otherwise.

    Attributes:
        held: Paths on a file server that is silent.
        refused: Paths that nobody may read.
        stuck: No pin can be removed.
        pins: The names of all pins; shared by whoever is given the same set.
    """

    def __init__(self, pins: set[str] | None = None) -> None:
        self.held: set[str] = set()
        self.refused: set[str] = set()
        self.stuck = False
        self.pins = set() if pins is None else pins

    @property
    def note(self) -> str:
        """None."""
        return ""

    @property
    def read_only_itself(self) -> bool:
        """As the real one of root's."""
        return True

    def _check(self, path: str) -> None:
        if path in self.held:
            raise MountHeld(f"{path}: its file server does not answer")
        if path in self.refused:
            raise Refused(f"{path}: permission denied")

    async def pin(self, owner: Owner, source: str, read_only: bool, name: str, *, sealed: bool = False) -> Pin:
        """Make it ready."""
        del owner
        await asyncio.sleep(0)
        self._check(source)
        self.pins.add(name)
        return Pin(path=f"/pins/{name}", device=1, inode=1, kind="dir", read_only=read_only,
                   writable=("",) if sealed else ())  # fmt: skip

    async def unseal(self, pid: int, pins: Mapping[str, Pin]) -> None:
        """Nothing is sealed."""
        del pid, pins
        await asyncio.sleep(0)

    async def check(self, pin: Pin) -> bool:
        """It is there."""
        return pin.path.removeprefix("/pins/") in self.pins

    async def unpin(self, name: str) -> None:
        """Remove it."""
        await asyncio.sleep(0)
        if self.stuck:
            raise MountHeld(f"{name}: an earlier attempt still hangs")
        self.pins.discard(name)

    def list(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(sorted(self.pins))

    async def make_directory(self, owner: Owner, path: str, mode: int = 0o700) -> None:
        """Nothing is made."""
        del owner, mode
        await asyncio.sleep(0)
        self._check(path)

    async def remove_empty(self, owner: Owner, path: str) -> None:
        """Nothing is removed."""
        del owner
        await asyncio.sleep(0)
        self._check(path)

    async def read_file(self, owner: Owner, path: str, limit: int) -> bytes:
        """Every file is empty."""
        del owner, limit
        self._check(path)
        return b""

    async def close(self) -> None:
        """Nothing is to be closed."""


class AnyAccounts:
    """A machine on which every number is an account: ``user5001`` of uid 5001, its own group, and no other.

    Attributes:
        known: Accounts that are otherwise, by uid.
        groups: Numbers of groups by name.
    """

    def __init__(self, known: Mapping[int, Account] | None = None, groups: Mapping[str, int] | None = None) -> None:
        self.known = dict(known or {})
        self.groups = dict(groups or {})

    def by_uid(self, uid: int) -> Account:
        """The account of a uid."""
        name = f"user{uid}"
        return self.known.get(uid) or Account(
            owner=Owner(uid=uid, gid=uid, groups=(uid,), name=name, home=f"/home/{name}")
        )

    def by_name(self, name: str) -> Account:
        """The account of a name."""
        for account in self.known.values():
            if account.owner.name == name:
                return account
        digits = name.removeprefix("user")
        if not digits.isdecimal():
            raise InvalidInput(f"--run-as: there is no account {name!r} on this machine")
        return self.by_uid(int(digits))

    def gids(self, names: Iterable[str]) -> dict[str, int]:
        """The numbers of groups."""
        return {name: self.groups[name] for name in names if name in self.groups}

    def group_names(self, owner: Owner) -> list[tuple[int, str]]:
        """The names of an account's groups."""
        named = {gid: name for name, gid in self.groups.items()}
        return [(gid, named.get(gid, f"g{gid}")) for gid in owner.groups]
