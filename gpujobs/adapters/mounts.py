"""Bind mounts of what a submitter may open, never of what root may.

Docker resolves a bind mount's source as root, so a directory inside another user's 0700 home would be
anybody's. Here a child process with the submitter's ids opens the path, and root mounts what was handed back:
``Mounts``. A server of an ordinary user has nothing to give away and pins nothing: ``PlainMounts``. Both look
at paths in the processes of :mod:`gpujobs.adapters.mounts_helper` only, so that no dead file server can hold
up the loop.

A pin is a recursive bind mount with ``nosuid``, ``nodev`` and, where asked, ``ro`` on every mount of it. Give
its path to the Engine as a *writable* bind even where the pin is read-only: for ``ro`` the Engine remounts
its own copy, and drops ``nosuid`` and ``nodev`` from it. A sealed pin is read-only until the container is made:
see :mod:`gpujobs.adapters.mounts_seal`.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpujobs.core.errors import InvalidInput, Refused, Unavailable
from gpujobs.core.job import Owner
from gpujobs.core.ports import MountHeld, Pin

TIME_LIMIT = 10.0
"""Seconds that one look at a path may take before its file server counts as gone."""

IN_FLIGHT = 8
"""Requests of one user at a time: hanging ones of his do not keep others' waiting."""

_START_LIMIT = 15.0
_GRACE = 5.0  # beyond the helper's own limit, after which the helper itself must be stuck
_BUFFER = 256 * 1024
_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from gpujobs.adapters.mounts_helper import main; "


class _Helper:
    """The helper's process as the loop sees it. It is started again when it has gone.

    Args:
        settings: For the helper's command line.
        time_limit: Seconds.
    """

    def __init__(self, settings: Mapping[str, object], time_limit: float) -> None:
        self._settings = json.dumps({**settings, "time_limit": time_limit})
        self._time_limit = time_limit
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: dict[int, tuple[asyncio.Future[tuple[dict[str, Any], bytes]], str | None]] = {}
        self._next = 0
        self._starting = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._ended = asyncio.Event()
        self._closed = False
        self._undoing: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """The process id of the helper while it runs."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> dict[str, Any]:
        """Start the process and wait for its word.

        Raises:
            Unavailable: It could not set itself up; the message says why.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        number = str(theirs.fileno())
        # Isolated (-I) and without site (-S): nothing of the environment or of site-packages runs as root
        # here.
        argv = [sys.executable, "-I", "-S", "-X", "utf8", "-c", f"{_PROGRAM}sys.exit(main(sys.argv))"]
        with theirs:
            # The call blocks for the few milliseconds of a spawn; asyncio's own would start a thread to wait.
            self._process = subprocess.Popen(  # noqa: ASYNC220
                [*argv, str(_ROOT), number, self._settings],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), cwd="/",
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, start_new_session=True,
            )  # fmt: skip
        self._socket = ours
        self._ended.clear()
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[tuple[dict[str, Any], bytes]] = loop.create_future()
        self._waiting[0] = (ready, None)
        loop.add_reader(ours.fileno(), self._readable)
        try:
            async with asyncio.timeout(_START_LIMIT):
                message, _ = await ready
        except TimeoutError:
            await self._end()
            raise Unavailable("the mount helper did not start in time") from None
        except BaseException:
            await self._end()
            raise
        if "ok" not in message:
            await self._end()
            raise Unavailable(f"mounts cannot be pinned: {message['message']}")
        return dict(message["ok"])

    async def ask(self, op: str, **values: object) -> tuple[dict[str, Any], bytes]:
        """One request and its answer, with the content of the file that came along.

        Raises:
            InvalidInput, Refused, MountHeld: As the helper says.
            Unavailable: There is no helper.
        """
        async with self._starting:
            if self._closed:
                raise Unavailable("the mount helper was closed")
            if self._socket is None:
                await self.start()
        self._next += 1
        number, name = self._next, values.get("name")
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = (future, str(name) if op == "pin" else None)
        try:
            async with asyncio.timeout(self._time_limit + _GRACE):
                await self._send({"id": number, "op": op, **values})
                message, content = await future
        except TimeoutError:
            raise MountHeld(f"{values.get('path') or name}: the mount helper does not answer") from None
        if "ok" in message:
            return message["ok"], content
        kinds = {"invalid": InvalidInput, "held": MountHeld}
        raise kinds.get(message["error"], Refused)(message["message"])

    async def _send(self, request: dict[str, object]) -> None:
        data = json.dumps(request).encode()
        async with self._sending:
            if self._socket is None:
                raise Unavailable("the mount helper has ended")
            try:
                await asyncio.get_running_loop().sock_sendall(self._socket, data)
            except (BrokenPipeError, ConnectionResetError):
                raise Unavailable("the mount helper has ended") from None
            except OSError as error:  # EMSGSIZE: an account in tens of thousands of groups
                raise Refused(f"{request.get('path')}: the request is too long: {error.strerror}") from None

    def _readable(self) -> None:
        while self._socket is not None:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, _BUFFER, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data, fds = b"", []
            content = b""
            for fd in fds:  # of a memory file: complete and no disk
                with os.fdopen(fd, "rb") as file:
                    file.seek(0)
                    content = file.read()
            if not data:
                self._gone()
                return
            self._answered(json.loads(data), content)

    def _answered(self, message: dict[str, Any], content: bytes) -> None:
        future, name = self._waiting.pop(message["id"])
        if not future.done():
            future.set_result((message, content))
        elif name is not None and "ok" in message:
            # Whoever asked was cancelled meanwhile and does not know of the pin.
            task = asyncio.get_running_loop().create_task(self._undo(name))
            self._undoing.add(task)
            task.add_done_callback(self._undoing.discard)

    async def _undo(self, name: str) -> None:
        with suppress(Unavailable):
            await self.ask("unpin", name=name)

    def _gone(self) -> None:
        """The other end is closed: free what belongs to it, and tell those who wait."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()  # a formality: it ends by itself with its socket
            self._process.wait()
            self._process = None
        self._ended.set()
        waiting, self._waiting = self._waiting, {}
        for future, _ in waiting.values():
            if not future.done():
                future.set_exception(Unavailable("the mount helper has ended"))

    async def _end(self) -> None:
        """Close the socket, upon which the helper kills its workers and goes; give it a moment to do so."""
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_WR)
            with suppress(TimeoutError):
                async with asyncio.timeout(_GRACE):
                    await self._ended.wait()
        self._gone()

    async def close(self) -> None:
        """End the process for good."""
        self._closed = True
        await self._end()
        if self._undoing:
            await asyncio.wait(self._undoing)


class _Mounts:
    """What both kinds have in common."""

    def __init__(self, helper: _Helper) -> None:
        self._helper = helper
        self._slots: defaultdict[int, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(IN_FLIGHT))

    @property
    def helper_pid(self) -> int | None:
        """The process id of the helper."""
        return self._helper.pid

    async def _as(self, owner: Owner, op: str, path: str, **values: object) -> tuple[dict[str, Any], bytes]:
        if not path.startswith("/") or "\0" in path:
            raise InvalidInput(f"{path!r} is no absolute path")
        if owner.uid == 0:
            raise Refused(f"{path}: nothing is opened as root")
        groups = owner.groups or (owner.gid,)
        account = {"uid": owner.uid, "gid": owner.gid, "groups": groups, "name": owner.name}
        async with self._slots[owner.uid]:
            return await self._helper.ask(op, owner=account, path=path, **values)

    async def _pin(
        self, op: str, owner: Owner, source: str, read_only: bool, name: str, *, sealed: bool = False
    ) -> Pin:
        values, _ = await self._as(owner, op, source, read_only=read_only, name=name, sealed=sealed)
        return Pin(read_only=read_only, **{**values, "writable": tuple(values["writable"])})

    async def _check(self, pin: Pin, mounted: bool) -> bool:
        answer, _ = await self._helper.ask(
            "check",
            path=pin.path,
            device=pin.device,
            inode=pin.inode,
            mounted=mounted,
            read_only=pin.read_only,
        )
        return bool(answer["same"])

    async def make_directory(self, owner: Owner, path: str, mode: int = 0o700) -> None:
        """See :class:`MountSource`."""
        await self._as(owner, "mkdir", path, mode=mode)

    async def remove_empty(self, owner: Owner, path: str) -> None:
        """See :class:`MountSource`."""
        await self._as(owner, "rmdir", path)

    async def read_file(self, owner: Owner, path: str, limit: int) -> bytes:
        """See :class:`MountSource`."""
        _, content = await self._as(owner, "read", path, limit=limit)
        return content

    async def close(self) -> None:
        """See :class:`MountSource`."""
        await self._helper.close()


class Mounts(_Mounts):
    """The mounts of a server that is root: pinned below a directory of its own; :meth:`start` makes one."""

    def __init__(self, helper: _Helper, pins: str) -> None:
        super().__init__(helper)
        self.pins = pins

    @classmethod
    async def start(cls, pins: Path, *, forbidden: Iterable[Path] = (), time_limit: float = TIME_LIMIT) -> Mounts:
        """Start the helper and make ``pins`` ready; pins that are there from before stay.

        Args:
            pins: A directory below one that only root can write; made if missing. It becomes a tmpfs of mode
                0700 in this process's mount namespace, which must be the Engine's.
            forbidden: Directories that no job may have, nor anything in them: the server's state and run
                directories, and the Engine's data. ``pins`` is one of them by itself.
            time_limit: Seconds that one look at a path may take.

        Raises:
            Unavailable: No pins can be made here; the message says why.
        """
        if os.geteuid() != 0:
            raise Unavailable("mounts cannot be pinned: that takes root")
        settings = {"pins": str(pins), "forbidden": [str(path) for path in forbidden]}
        helper = _Helper(settings, time_limit)
        ready = await helper.start()
        return cls(helper, str(ready["pins"]))

    @property
    def note(self) -> str:
        """See :class:`MountSource`."""
        return f"Bind mounts are opened as the user who submits the job, and pinned below {self.pins}."

    @property
    def read_only_itself(self) -> bool:
        """See :class:`MountSource`."""
        return True

    async def pin(self, owner: Owner, source: str, read_only: bool, name: str, *, sealed: bool = False) -> Pin:
        """See :class:`MountSource`."""
        return await self._pin("pin", owner, source, read_only, name, sealed=sealed)

    async def unseal(self, pid: int, pins: Mapping[str, Pin]) -> None:
        """See :class:`MountSource`."""
        doors = [
            {"target": target, "device": pin.device, "inode": pin.inode, "writable": pin.writable}
            for target, pin in pins.items()
            if pin.writable
        ]
        if doors:
            await self._helper.ask("unseal", path=", ".join(pins), pid=pid, doors=doors)

    async def check(self, pin: Pin) -> bool:
        """See :class:`MountSource`; the pin must also still be a mount with all its flags."""
        return await self._check(pin, mounted=True)

    async def unpin(self, name: str) -> None:
        """See :class:`MountSource`."""
        await self._helper.ask("unpin", name=name)

    def list(self) -> tuple[str, ...]:
        """See :class:`MountSource`; asks the tmpfs of the pins only, no file server."""
        return tuple(sorted(os.listdir(self.pins)))  # names are wanted

    async def remove_all(self) -> None:
        """Remove every pin and the tmpfs under them, as an uninstallation does."""
        await self._helper.ask("teardown")


class PlainMounts(_Mounts):
    """The mounts of a server that runs as an ordinary user: that user's own paths, as they are."""

    @classmethod
    async def start(cls, *, forbidden: Iterable[Path] = (), time_limit: float = TIME_LIMIT) -> PlainMounts:
        """Start the helper.

        Args:
            forbidden: As in :meth:`Mounts.start`.
            time_limit: Seconds that one look at a path may take.

        Raises:
            Unavailable: The helper does not start.
        """
        helper = _Helper({"pins": "", "forbidden": [str(path) for path in forbidden]}, time_limit)
        await helper.start()
        return cls(helper)

    @property
    def note(self) -> str:
        """See :class:`MountSource`."""
        try:
            name = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            name = f"uid {os.geteuid()}"
        return f"This server runs as {name}, not as root: it mounts what {name} can open, as it is and unpinned."

    @property
    def read_only_itself(self) -> bool:
        """See :class:`MountSource`."""
        return False

    async def pin(self, owner: Owner, source: str, read_only: bool, name: str, *, sealed: bool = False) -> Pin:
        """See :class:`MountSource`; the path is the source's own, with links resolved, and nothing is sealed."""
        del sealed
        return await self._pin("look", owner, source, read_only, name)

    async def unseal(self, pid: int, pins: Mapping[str, Pin]) -> None:
        """See :class:`MountSource`; there is nothing to open."""

    async def check(self, pin: Pin) -> bool:
        """See :class:`MountSource`."""
        return await self._check(pin, mounted=False)

    async def unpin(self, name: str) -> None:
        """See :class:`MountSource`; there is never one."""

    def list(self) -> tuple[str, ...]:
        """See :class:`MountSource`; always empty."""
        return ()
