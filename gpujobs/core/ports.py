"""What the service needs of the world, as small protocols: the adapters satisfy them, and so do the fakes.

Values and errors that pass through a port stand here too, so that neither side needs to know the other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from gpujobs.core.container import Image
from gpujobs.core.errors import Unavailable
from gpujobs.core.inventory import Inventory, XidEvent
from gpujobs.core.job import Allocation, Job, JobId, Owner
from gpujobs.core.pulls import Progress
from gpujobs.core.reconcile import Seen
from gpujobs.core.spec import Build, JobSpec
from gpujobs.logwire import LogRecord

T = TypeVar("T")


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


# -- containers ------------------------------------------------------------------------------------------------


class EngineAway(Unavailable):
    """The Engine does not answer: whatever was asked of it can be asked again when it does."""


class EngineError(Exception):
    """The Engine answered that it will not: its own sentence."""


class Gone(EngineError):
    """There is no such container or image."""


class Conflict(EngineError):
    """The name is taken, or the container is in another state."""


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something that happened in the Engine: a hint to look, the truth is what inspecting says.

    Attributes:
        time_ns: When, in ns since the epoch, by the Engine's clock.
        type: ``container``, ``volume``, ``network``, ``image`` …
        action: ``die``, ``start``, ``destroy``, ``oom`` …
        id: Of the container, or the name of the volume or network.
        attributes: Labels and, for ``die``, ``exitCode``.
    """

    time_ns: int
    type: str
    action: str
    id: str
    attributes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The Engine does not answer; it is tried again until `Reconnected`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The Engine answers again: events may have been missed, so list and inspect."""


@dataclass(frozen=True, slots=True)
class LogEnd:
    """A container's log has come to its end.

    Attributes:
        gone: The container was removed before its end had been read: the end may be missing.
        gaps: Gap records that were written by this call.
    """

    gone: bool
    gaps: int


class Runner(Protocol):
    """What runs containers. Every call may raise :class:`EngineAway` and :class:`EngineError`."""

    @property
    def log_config(self) -> Mapping[str, object]:
        """The LogConfig that containers must be made with for :meth:`follow` to lose nothing."""
        ...

    def ceilings(self) -> dict[str, int]:
        """The hard resource limits that cannot be raised for a container: by name, empty where all can."""
        ...

    async def network(self) -> str:
        """The network for a container, on which it is reached by no other."""
        ...

    async def runtimes(self) -> tuple[str, ...]:
        """The names of the OCI runtimes that there are."""
        ...

    async def disk_free(self) -> int | None:
        """Free bytes of the disk that containers' own files are on; None where that cannot be told."""
        ...

    async def layer_bytes(self, container: str) -> int:
        """The bytes that a container has written into its own file system: all of it is looked at."""
        ...

    async def image(self, reference: str) -> Image:
        """An image that is there; :class:`Gone` where it is not."""
        ...

    async def create(self, name: str, request: Mapping[str, Any]) -> str:
        """Make a container and return its id; :class:`Conflict` where one of that name is there."""
        ...

    async def start(self, container: str) -> None:
        """Start a created container."""
        ...

    async def inspect(self, container: str) -> dict[str, Any]:
        """Everything that is known of a container."""
        ...

    async def seen(self, container: str) -> Seen:
        """What reconciliation needs of a container."""
        ...

    async def containers(self) -> list[Seen]:
        """Every container, of whomever."""
        ...

    async def kill(self, container: str, signal: str) -> None:
        """Send a signal to a container's first process; nothing happens where it has ended."""
        ...

    async def unthrottle(self, container: str) -> None:
        """Take a container's limit of CPU time away; nothing happens where it is gone."""
        ...

    async def remove(self, container: str) -> None:
        """Remove a container and its anonymous volumes; nothing happens where it is gone."""
        ...

    async def granted(self, container: str, pid: int, minors: Iterable[int]) -> frozenset[int]:
        """The GPU device minors that a container may open, asked of the kernel's device policy.

        Args:
            container: Its id.
            pid: Its first process on the host.
            minors: Numbers to try besides the usual ones.
        """
        ...

    def events(self, since: float) -> AsyncIterator[EngineEvent | Disconnected | Reconnected]:
        """What happens to containers from a time on, in seconds since the epoch, until it is closed."""
        ...

    async def follow(self, container: str, log: Log) -> LogEnd:
        """Copy a container's output until it has ended and everything is stored."""
        ...


@dataclass(frozen=True, slots=True)
class BuildLimits:
    """What each step of a build may use: bytes of memory, CPUs; and the seconds that all of it may take."""

    memory: int
    cpus: float
    seconds: float


class Images(Protocol):
    """Where images come from."""

    async def local(self, reference: str, owner: Owner) -> Image:
        """An image that is there and that this account may use; :class:`Gone` where there is none."""
        ...

    async def pull(self, reference: str, progress: Callable[[Progress], None]) -> Image:
        """Fetch an image from its registry."""
        ...

    async def build(
        self, context: Path, build: Build, owner: Owner, limits: BuildLimits, output: Callable[[str], None],
        progress: Callable[[Progress], None] = ...,
    ) -> Image:  # fmt: skip
        """Build an image from a client's tar file, told line by line."""
        ...


# -- logs ------------------------------------------------------------------------------------------------------


class LogReader(Protocol):
    """Reads one attempt's log in bounded memory."""

    def batches(
        self, *, since_ns: int | None = None, tail: int | None = None, follow: bool = False
    ) -> AsyncIterator[list[LogRecord]]:
        """The records in order: since a time, the last lines, and on while it is written, as asked."""
        ...


class Log(Protocol):
    """One attempt's log that is being written."""

    def append_gap(self, text: str, time_ns: int) -> None:
        """Add a line of our own words."""
        ...

    def reader(self) -> LogReader:
        """A reader that can follow."""
        ...

    def close(self) -> None:
        """Stop writing for now; what is there stays."""
        ...

    async def finish(self) -> None:
        """It is complete: bring it to the disk and stop writing."""
        ...


class Logs(Protocol):
    """The logs of all attempts."""

    def log(self, job: JobId, attempt: int) -> Log:
        """The log of an attempt, to be written."""
        ...

    def reader(self, job: JobId, attempt: int) -> tuple[LogReader, bool] | None:
        """A reader, and whether the log is still being written; None where there is no log."""
        ...

    def is_open(self, job: JobId, attempt: int) -> bool:
        """Whether it is being written."""
        ...

    async def finish(self, job: JobId, attempt: int) -> None:
        """It is complete."""
        ...

    def close(self) -> None:
        """Stop writing all of them."""
        ...


# -- mounts ----------------------------------------------------------------------------------------------------


class MountHeld(Unavailable):
    """The path cannot be used just now: its file server is silent or in trouble. The job can wait for it."""

    @property
    def reason(self) -> str:
        """The sentence for people."""
        return self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """What a container is given as the source of a bind mount.

    Attributes:
        path: For the Engine.
        device: The file's ``st_dev``.
        inode: The file's ``st_ino``.
        kind: A directory or a regular file.
        read_only: Whether it is to be read only; a pin of ``Mounts`` is so by itself.
        writable: Of a sealed pin, the paths below it of the mounts that are to be writable; the pin itself is "".
    """

    path: str
    device: int
    inode: int
    kind: Literal["dir", "file"]
    read_only: bool
    writable: tuple[str, ...] = ()


class MountSource(Protocol):
    """Whatever opens paths in a user's name. All errors are sentences that name the path.

    Every method that takes an owner raises ``Refused`` (no permission, or never to be given to a job),
    ``InvalidInput`` (nothing there, or no absolute path) and ``MountHeld`` (the file server is silent).
    """

    @property
    def note(self) -> str:
        """How mounts are made here, in a sentence for people."""

    @property
    def read_only_itself(self) -> bool:
        """Whether a read-only pin is so by itself: the Engine's own remount would drop nosuid and nodev from it."""

    async def pin(self, owner: Owner, source: str, read_only: bool, name: str, *, sealed: bool = False) -> Pin:
        """Make ``source`` ready as a bind mount's source under ``name``, replacing what had that name.

        Args:
            owner: Who must be able to read it: a directory of ``r-x``, a file of ``r--``. Links are followed.
            source: The absolute path of a directory or a regular file.
            read_only: Whether the container must not write, in submounts neither.
            name: The caller's, ``[A-Za-z0-9][A-Za-z0-9_.-]*``.
            sealed: It is read-only until :meth:`unseal`: what the Engine makes as root it cannot make in there.
        """

    async def unseal(self, pid: int, pins: Mapping[str, Pin]) -> None:
        """Let a container write through its sealed pins; nothing changes where that is done already.

        Args:
            pid: The container's first process, which must not be the user's program yet.
            pins: By their targets in the container.
        """

    async def check(self, pin: Pin) -> bool:
        """Whether the very same file is still there: to be asked before each start of a container.

        Raises:
            MountHeld: Its file server is silent.
        """

    async def unpin(self, name: str) -> None:
        """Remove a pin; containers that run keep theirs. Nothing happens where there is none.

        Raises:
            MountHeld: An earlier attempt at that name still hangs.
        """

    def list(self) -> tuple[str, ...]:
        """The names of all pins, those of earlier servers among them, sorted."""

    async def make_directory(self, owner: Owner, path: str, mode: int = 0o700) -> None:
        """Make a directory, and those above it that are missing, as the owner; one that is there stays."""

    async def remove_empty(self, owner: Owner, path: str) -> None:
        """Remove a directory as the owner, where there is one and it is empty."""

    async def read_file(self, owner: Owner, path: str, limit: int) -> bytes:
        """The content of a regular file that the owner may read, of at most ``limit`` bytes."""

    async def close(self) -> None:
        """End the helper; pins stay."""


# -- the ledger ------------------------------------------------------------------------------------------------


class Ledger(Protocol):
    """What is recorded: within :meth:`Store.change` it can be changed, within :meth:`Store.read` only read."""

    def meta(self, name: str) -> str | None:
        """A named value."""
        ...

    def set_meta(self, name: str, value: str) -> None:
        """Set a named value."""
        ...

    def submit(
        self, owner: Owner, now: float, file: str, text: str, specs: list[tuple[int | None, JobSpec]]
    ) -> list[Job]:
        """Write a submission and its jobs, all queued; returns them with their ids."""
        ...

    def set_state(self, job: Job) -> None:
        """Write a job's state."""
        ...

    def add_attempt(self, job: Job, name: str, nonce: str, allocation: Allocation, choices: str, now: float) -> None:
        """Record a decision to start: what is held from now on."""
        ...

    def on_attempt(self, statement: str, job: JobId, attempt: int, /, **values: object) -> None:
        """Run one of the statements that change an attempt."""
        ...

    def active(self) -> list[Job]:
        """Every job that has not ended, oldest first."""
        ...

    def job(self, job_id: JobId) -> Job | None:
        """One job."""
        ...

    def submission(self, number: int) -> list[Job]:
        """The jobs of one submission: one, or an array's elements."""
        ...

    def page(self, *, every: bool, limit: int, before: JobId | None = None) -> list[Job]:
        """The jobs that have not ended, or the latest of all; oldest first."""
        ...

    def attempts(self, job_id: JobId) -> list[dict[str, Any]]:
        """A job's attempts as rows, oldest first."""
        ...

    def attempt(self, job_id: JobId, attempt: int) -> dict[str, Any] | None:
        """One attempt's row."""
        ...

    def kept(self) -> list[dict[str, Any]]:
        """The attempts whose containers may still exist, with their jobs' ``state`` and ``active``."""
        ...

    def expired(self, before: float) -> list[dict[str, Any]]:
        """The attempts that ended before that time and whose containers can go."""
        ...

    def next_expiry(self) -> float | None:
        """When the first of the ended attempts that still have a container ended."""
        ...

    def open_logs(self) -> list[dict[str, Any]]:
        """Ended attempts whose log was not read to its end."""
        ...

    def add_context(self, number: int, key: str, context: str, dockerfile: str, deadline: float) -> None:
        """A build context that a submission's client was asked for."""
        ...

    def contexts(self) -> list[dict[str, Any]]:
        """Every build context that is awaited or here."""
        ...

    def context_received(self, number: int, key: str) -> None:
        """It is here."""
        ...

    def context_removed(self, number: int, key: str) -> None:
        """It is no longer kept."""
        ...

    def add_build(self, number: int, build: str, image: str) -> None:
        """The image that a build of a submission gave."""
        ...

    def builds(self, number: int) -> dict[str, str]:
        """The images of a submission's builds."""
        ...

    def add_secrets(self, number: int, file: str) -> None:
        """The name of the file with a submission's secrets."""
        ...

    def secrets(self) -> dict[int, str]:
        """The names of the files with secrets, by their submissions."""
        ...

    def secrets_removed(self, number: int) -> None:
        """A submission's secrets are no longer kept."""
        ...


class Store(Protocol):
    """Where the ledger is kept."""

    async def change(self, action: Callable[[Ledger], T]) -> T:
        """Run a change and return once it is on disk.

        Raises:
            Unavailable: It could not be written: nothing of it is kept.
        """
        ...

    async def read(self, query: Callable[[Ledger], T]) -> T:
        """Run a query on what is committed."""
        ...


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the server keeps what.

    Attributes:
        init: The init's binary, beside the state.
        nodes: A private directory for the device probe.
    """

    state: Path
    attempts: Path
    logs: Path
    pins: Path
    nodes: Path
    init: Path
