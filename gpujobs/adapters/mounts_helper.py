"""The process that opens people's paths for the server: as them, never as root.

It runs as a program of its own and needs nothing but the standard library. It is not forked from the server:
a fresh program holds none of the server's memory, locks, threads and descriptors, so what later forks from it
to become a user has nothing to give away, and it can be started at any time.

    server ── one JSON message a request ──▶ helper ── fork ──▶ worker (root) ── fork ──▶ the user
              SOCK_SEQPACKET                                    mounts, stats             opens

Each request has a worker in a session of its own with a time limit. The user's process opens, the worker
checks what it was handed and mounts it. Both may hang on a dead file server: the helper touches no file
system but its own tmpfs, kills what is late, answers, and reaps it whenever the kernel lets it go.

Requests are ``{"id", "op", "owner": {"uid", "gid", "groups", "name"}, "path", …}``; answers ``{"id", "ok":
{…}}`` or ``{"id", "error": "invalid" | "refused" | "held", "message"}``. Ops: ``pin look check unpin
unseal mkdir rmdir read teardown``.
"""

# The helper stays small: it does not load pathlib.
# ruff: noqa: PTH103

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import selectors
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from gpujobs.adapters.mounts_kernel import (
    AT_EACCESS,
    AT_EMPTY_PATH,
    FACCESSAT2,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    MountError,
    in_words,
    is_same,
    pin,
    prctl,
    set_up,
    syscall,
    tear_down,
    unpin,
    vet,
)
from gpujobs.adapters.mounts_seal import seal, unseal

Outcome = tuple[dict[str, Any], list[int]]
"""What an operation gives: values for JSON, and descriptors to hand on."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}", re.ASCII)
BUFFER = 256 * 1024
OPS = frozenset(("pin", "look", "check", "unpin", "unseal", "mkdir", "rmdir", "read", "teardown"))
MAX_ABANDONED = 8
"""Hanging workers of one user, after which the next request is held at once."""


# --- as the user --------------------------------------------------------------------------------------------


def become(owner: dict[str, Any]) -> None:
    """Turn this process into the owner for good, with nothing of root's in its hands."""
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):  # /proc/self/fd/2 would lead to the server's log
        os.dup2(null, number)
    os.close(null)
    uid, gid, groups = int(owner["uid"]), int(owner["gid"]), [int(group) for group in owner["groups"]]
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if os.geteuid() == 0:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        if set(os.getgroups()) != set(groups) or os.getresgid() != (gid, gid, gid):
            raise MountError("refused", f"the groups of {owner['name']} could not be taken on")
    if 0 in os.getresuid() or os.getresuid() != (uid, uid, uid):
        raise MountError("refused", f"this server cannot open paths as {owner['name']} (uid {uid})")
    # The user must not trace what the worker believes; set here too, for fs.suid_dumpable may be 1.
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def as_user(owner: dict[str, Any], path: str, what: str, action: Callable[[], Outcome], close: int) -> Outcome:
    """Do ``action`` in a child that is the owner.

    Args:
        owner: The account.
        path: What is opened, for messages.
        what: What ``path`` should be, for messages.
        action: What to do there.
        close: A descriptor that the child must not keep.

    Raises:
        MountError: What the child came upon.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:

        def act() -> Outcome:
            os.close(close)
            ours.close()
            become(owner)
            return action()

        run_and_exit(lambda: answer(theirs, act, path, str(owner["name"]), what))
    theirs.close()
    try:
        data, fds, _, _ = socket.recv_fds(ours, BUFFER, 1, socket.MSG_CMSG_CLOEXEC)
    finally:
        os.kill(pid, signal.SIGKILL)  # a user may stop processes of his own: no waiting for its courtesy
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ours.close()
    if not data and code > 0:
        raise MountError("refused", f"{path}: opening it for {owner['name']} failed in the server")
    if not data:
        raise MountError("held", f"{path}: opening it for {owner['name']} was ended from outside")
    message = json.loads(data)
    if "ok" not in message:
        raise MountError(message["error"], message["message"])
    return message["ok"], fds


def open_source(path: str) -> int:
    """Open a directory or a regular file that this process may read, as a place only (O_PATH).

    O_PATH alone proves no right to the file itself, so that is asked for the descriptor, not for the path
    again.
    """
    try:
        # O_DIRECTORY also makes an automounter mount what is there, which O_PATH alone would not.
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        kind = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "named pipe"}.get(stat.S_IFMT(mode), "device")
        raise MountError("refused", f"{path} is a {kind}: only directories and regular files can be used")
    need = os.R_OK | os.X_OK if stat.S_ISDIR(mode) else os.R_OK
    syscall(FACCESSAT2, fd, b"", need, AT_EMPTY_PATH | AT_EACCESS)
    return fd


def remove_empty(path: str) -> Outcome:
    """Remove a directory where there is one and it is empty."""
    try:
        os.rmdir(path)  # noqa: PTH106 - a helper process: pathlib would be one more import
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
    return {}, []


def make_directory(path: str, mode: int) -> Outcome:
    """Make a directory and those above it that are missing, each with ``mode``."""
    os.umask(0o777 & ~mode)
    os.makedirs(path, exist_ok=True)
    return {}, []


def read_file(path: str, limit: int, into: int, forbidden: Iterable[str]) -> Outcome:
    """Copy a regular file of at most ``limit`` bytes into the descriptor ``into``."""
    place = open_source(path)
    vet(place, path, forbidden)
    if stat.S_ISDIR(os.fstat(place).st_mode):
        raise MountError("invalid", f"{path} is a directory, not a file")
    source = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
    left = limit + 1
    while left > 0 and (piece := os.read(source, min(left, 2**20))):
        left -= os.write(into, piece)
    if left == 0:
        raise MountError("invalid", f"{path} is larger than {limit} bytes")
    return {}, []


# --- workers ------------------------------------------------------------------------------------------------


def run_and_exit(action: Callable[[], None]) -> NoReturn:
    """End this forked process with the action: no frame of its parent is ever returned to."""
    done = False
    try:
        action()
        done = True
    finally:
        if not done:
            sys.excepthook(*sys.exc_info())
        os._exit(0 if done else 1)


def answer(out: socket.socket, action: Callable[[], Outcome], path: str, user: str, what: str) -> None:
    """Send what an action gives, or its fault, as one message."""
    fds: list[int] = []
    try:
        values, fds = action()
        message: dict[str, Any] = {"ok": values}
    except (MountError, OSError) as error:
        fault = error if isinstance(error, MountError) else in_words(error, path, user, what)
        message = {"error": fault.kind, "message": fault.message}
    with contextlib.suppress(BrokenPipeError):  # the helper has ended: nobody waits for it
        socket.send_fds(out, [json.dumps(message).encode()], fds)


def perform(request: dict[str, Any], pins: str, forbidden: list[str], out: int) -> Outcome:
    """Do one request, in its worker."""
    op, path = str(request["op"]), str(request.get("path", ""))
    if op == "unpin":
        unpin(f"{pins}/{request['name']}")
        return {}, []
    if op == "teardown":
        tear_down(pins)
        return {}, []
    if op == "unseal":
        unseal(int(request["pid"]), request["doors"])
        return {}, []
    if op == "check":
        file = int(request["device"]), int(request["inode"])
        return {"same": is_same(path, file, bool(request["mounted"]), bool(request["read_only"]))}, []
    owner = request["owner"]
    if op == "mkdir":
        return as_user(owner, path, "directory", lambda: make_directory(path, int(request["mode"])), out)
    if op == "rmdir":
        return as_user(owner, path, "directory", lambda: remove_empty(path), out)
    if op == "read":
        memory = os.memfd_create("read", os.MFD_CLOEXEC)
        as_user(owner, path, "file", lambda: read_file(path, int(request["limit"]), memory, forbidden), out)
        return {}, [memory]
    _, (fd,) = as_user(owner, path, "directory", lambda: ({}, [open_source(path)]), out)
    real = vet(fd, path, forbidden)
    writable: list[str] = []
    try:
        if op == "pin":
            target = f"{pins}/{request['name']}"
            status = pin(fd, real, target, bool(request["read_only"]), forbidden)
            if request.get("sealed") and not request["read_only"]:
                writable = seal(target)
        else:
            target, status = real, os.fstat(fd)
    except PermissionError:
        if os.geteuid() != 0:
            raise
        raise MountError("refused", f"{path}: its file system shuts root out, and with it the Engine "
                               "(a FUSE mount needs allow_other)") from None  # fmt: skip
    kind = "dir" if stat.S_ISDIR(status.st_mode) else "file"
    return {"path": target, "device": status.st_dev, "inode": status.st_ino, "kind": kind, "writable": writable}, []


def has_members(group: int) -> bool:
    """Whether a process group has any."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Worker:
    """A request being done.

    Attributes:
        deadline: When it is given up, on the monotonic clock; None once it has been answered.
    """

    def __init__(self, pid: int, inbox: socket.socket, request: dict[str, Any], deadline: float) -> None:
        self.pid, self.inbox, self.request = pid, inbox, request
        self.deadline: float | None = deadline
        self.finished = False

    @property
    def name(self) -> str | None:
        """The pin that it works on."""
        return self.request.get("name")

    @property
    def uid(self) -> int | None:
        """Whom it works for."""
        owner = self.request.get("owner")
        return owner["uid"] if owner else None


class Helper:
    """The loop: requests in, workers out, answers back.

    Args:
        server: The socket to the server; when it closes, the helper ends.
        pins: The directory of pins; empty where it serves one ordinary user and pins nothing.
        forbidden: Directories that no job may have.
        time_limit: Seconds that a worker may take.
    """

    def __init__(self, server: socket.socket, pins: str, forbidden: list[str], time_limit: float) -> None:
        self.server, self.pins, self.time_limit = server, pins, time_limit
        self.forbidden = [os.path.realpath(path) for path in (*forbidden, *filter(None, [pins]))]
        self.workers: dict[int, Worker] = {}
        self.orphans: dict[int, int | None] = {}  # killed workers, by pid, whose user's process hangs on
        self.selector = selectors.DefaultSelector()

    def send(self, number: object, message: dict[str, Any], fds: Iterable[int] = ()) -> None:
        """Answer request ``number``; a request of the helper's own (None) needs none."""
        if number is not None:
            socket.send_fds(self.server, [json.dumps({"id": number, **message}).encode()], list(fds))

    def run(self) -> None:
        """Serve until the server goes."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self.selector.register(self.server, selectors.EVENT_READ)
        self.selector.register(wake_read, selectors.EVENT_READ)
        while True:
            deadlines = [worker.deadline for worker in self.workers.values() if worker.deadline is not None]
            wait = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            for key, _ in self.selector.select(wait):
                if key.fileobj is self.server:
                    data = self.server.recv(BUFFER)
                    if not data:
                        return
                    self.accept(data)
                elif key.fileobj == wake_read:
                    os.read(wake_read, 4096)
                else:
                    self.collect(key.data)
            self.reap()
            self.give_up_late()

    def accept(self, data: bytes) -> None:
        """Begin a request, or say at once why not."""
        try:
            request = json.loads(data)
            number, name = request["id"], request.get("name")
            if request["op"] not in OPS:
                raise KeyError(request["op"])  # noqa: TRY301
            uid = int(request["owner"]["uid"]) if "owner" in request else None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            print(f"gpujobs mounts: a request that is none: {error!r}", file=sys.stderr, flush=True)
            return
        if name is not None and not NAME.fullmatch(str(name)):
            self.send(number, {"error": "invalid", "message": f"{name!r} is no name of a pin"})
            return
        busy = any(name and worker.name == name and not worker.finished for worker in self.workers.values())
        late = [worker.uid for worker in self.workers.values() if worker.deadline is None and not worker.finished]
        hanging = [*late, *self.orphans.values()].count(uid) if uid is not None else 0
        if busy:
            fault = MountError("held", f"{request.get('path') or name}: an earlier attempt still hangs")
        elif hanging >= MAX_ABANDONED:
            fault = MountError("held", f"{request.get('path')}: {hanging} earlier attempts still hang: "
                                  "is the file server there?")  # fmt: skip
        else:
            try:
                self.begin(request)
            except OSError as error:  # no process to be had
                fault = in_words(error, str(request.get("path")), "root")
            else:
                return
        self.send(number, {"error": fault.kind, "message": fault.message})

    def begin(self, request: dict[str, Any]) -> None:
        """Fork the worker of a request."""
        inbox, outbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with outbox:
            pid = os.fork()
            if pid == 0:
                run_and_exit(lambda: self.work(request, outbox))
        inbox.setblocking(False)
        worker = Worker(pid, inbox, request, time.monotonic() + self.time_limit)
        self.workers[pid] = worker
        self.selector.register(inbox, selectors.EVENT_READ, worker)

    def work(self, request: dict[str, Any], outbox: socket.socket) -> None:
        """Be a worker, in a session of its own that can be killed as one, holding only ``outbox``."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.closerange(3, outbox.fileno())
        os.closerange(outbox.fileno() + 1, 2**20)
        user = str(request["owner"]["name"]) if "owner" in request else "root"
        what = "file" if request["op"] == "read" else "directory"

        def action() -> Outcome:
            return perform(request, self.pins, self.forbidden, outbox.fileno())

        answer(outbox, action, str(request.get("path", "")), user, what)

    def collect(self, worker: Worker) -> None:
        """Pass a worker's answer on; one that comes after its time is dropped."""
        try:
            data, fds, _, _ = socket.recv_fds(worker.inbox, BUFFER, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        if data and worker.deadline is not None:
            worker.deadline, worker.finished = None, True
            self.send(worker.request["id"], json.loads(data), fds)
        for fd in fds:
            os.close(fd)
        if not data:
            self.selector.unregister(worker.inbox)

    def reap(self) -> None:
        """Take note of processes that have ended, orphans of killed workers among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            worker = self.workers.pop(pid, None)
            if worker is None:
                self.orphans = {group: uid for group, uid in self.orphans.items() if has_members(group)}
                continue
            if has_members(pid):
                self.orphans[pid] = worker.uid
            if worker.inbox in self.selector.get_map():
                self.collect(worker)  # its answer, unless that was read before
            if worker.inbox in self.selector.get_map():
                self.selector.unregister(worker.inbox)
            worker.inbox.close()
            if worker.deadline is not None:
                crashed = os.waitstatus_to_exitcode(status) > 0
                what = worker.request.get("path") or worker.name
                message = f"{what}: {'this failed in the server' if crashed else 'this was interrupted'}"
                kind = "refused" if crashed else "held"
                self.send(worker.request["id"], {"error": kind, "message": message})
            if not worker.finished and worker.request["op"] == "pin":
                # It may have been killed with the mount made. Nobody else works on that name before this has
                # ended.
                self.begin({"id": None, "op": "unpin", "name": worker.name})

    def give_up_late(self) -> None:
        """Answer for workers that are over their time, and kill them."""
        now = time.monotonic()
        for worker in self.workers.values():
            if worker.deadline is not None and worker.deadline <= now:
                worker.deadline = None
                path = worker.request.get("path") or worker.name
                message = f"{path} timed out after {self.time_limit:g} s: is its file server there?"
                self.send(worker.request["id"], {"error": "held", "message": message})
                kill(worker)

    def stop(self) -> None:
        """Kill all workers; pins stay, for running containers use them."""
        for worker in self.workers.values():
            kill(worker)


def kill(worker: Worker) -> None:
    """End a worker and what it started; one that was forked just now has no group of its own yet."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(worker.pid, signal.SIGKILL)


def main(argv: list[str]) -> int:
    """Serve at descriptor ``argv[1]`` by the JSON settings ``argv[2]``: pins, forbidden, time_limit."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it outlives the server's last request, and ends by its socket
    os.chdir("/")
    os.umask(0o077)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = socket.socket(fileno=int(argv[1]))
    settings = json.loads(argv[2])
    pins = str(settings["pins"])
    try:
        if pins:
            pins = set_up(pins)
    except (MountError, OSError) as error:
        server.send(json.dumps({"id": 0, "error": "refused", "message": str(error)}).encode())
        return 1
    helper = Helper(server, pins, settings["forbidden"], float(settings["time_limit"]))
    helper.send(0, {"ok": {"pins": pins}})
    try:
        helper.run()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server went while it was being answered
    finally:
        helper.stop()
    return 0
