"""Pins: bind mounts of what a user opened, made and checked by root.

The half of :mod:`gpujobs.adapters.mounts_helper` that speaks to the kernel; standard library only, like it.
"""
# The helper stays small: it does not load pathlib.
# ruff: noqa: PTH101, PTH102, PTH103, PTH106, PTH108, PTH116, PTH123

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
from collections.abc import Iterable
from typing import NamedTuple

PINS_SOURCE = "gpujobs-pins"

PSEUDO = frozenset(
    (
        *("autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs"),
        *("efivarfs", "fusectl", "mqueue", "nsfs", "proc", "pstore", "resctrl", "rpc_pipefs", "securityfs"),
        *("selinuxfs", "smackfs", "sysfs", "tracefs"),
    )
)
"""File systems that are the kernel's interfaces and hold nobody's data, by their names in mountinfo."""

PSEUDO_PATHS = ("/proc", "/sys", "/dev")  # a /dev may be a plain tmpfs, which its type does not tell

HELD = frozenset(
    (
        *(errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNREFUSED),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO),
        *(errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    )
)
"""What a file server or a machine in trouble answers: the same request may succeed later."""


class MountError(Exception):
    """A request that was not done: ``kind`` is ``invalid``, ``refused`` or ``held``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


def in_words(error: OSError, path: str, user: str, what: str = "directory") -> MountError:
    """The fault that an operating system's error on ``path`` is."""
    number = error.errno or 0
    if number in HELD:
        return MountError("held", f"{path}: {os.strerror(number)}: is its file server there?")
    if number == errno.ENOENT:
        return MountError("invalid", f"no such {what}: {path} (nothing is created for you: make it first)")
    if number in {errno.EACCES, errno.EPERM}:
        return MountError("refused", f"permission denied for {user}: {path}")
    wrong = number in {errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EEXIST}
    return MountError("invalid" if wrong else "refused", f"{path}: {os.strerror(number)}")


# --- the kernel's calls that Python has no function for -----------------------------------------------------

MACHINES = ("x86_64", "aarch64")
"""Where the numbers below hold, by the kernel's syscall_64.tbl and asm-generic/unistd.h."""
OPEN_TREE, MOVE_MOUNT, OPENAT2, FACCESSAT2, MOUNT_SETATTR = 428, 429, 437, 439, 442
CLONE_NEWNS = 0x20000

AT_FDCWD, AT_EACCESS, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x200, 0x1000, 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 2, 4, 8, 16
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_UNBINDABLE, MS_PRIVATE = 2, 4, 8, 4096, 1 << 17, 1 << 18
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(number: int, *args: int | bytes | ctypes.Array[ctypes.c_uint64]) -> int:
    """Call the kernel by a number.

    Raises:
        OSError: It failed.
    """
    # Whole words, for the call is variadic: a plain int would leave the upper half of a register undefined.
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _checked(int(_libc.syscall(ctypes.c_long(number), *words)))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    _checked(_libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data)))


def _umount(target: str, flags: int) -> None:
    _checked(_libc.umount2(os.fsencode(target), flags))


def open_below(directory: int, path: str, resolve: int) -> int:
    """Open a place below a descriptor (O_PATH), resolving its path as openat2(2) can be told to."""
    how = (ctypes.c_uint64 * 3)(os.O_PATH | os.O_CLOEXEC, 0, resolve | RESOLVE_NO_MAGICLINKS)
    return syscall(OPENAT2, directory, os.fsencode(path), how, ctypes.sizeof(how))


def enter_mounts_of(namespace: int) -> None:
    """Move this process into the mount namespace that a descriptor of /proc/PID/ns/mnt is."""
    _checked(_libc.setns(namespace, CLONE_NEWNS))


def set_read_only(mount: int, path: str, wanted: bool, *, recursive: bool) -> None:
    """Set or clear one flag of a mount, or of a whole tree of mounts, at a descriptor or a path."""
    flags = (ATTR_RDONLY, 0) if wanted else (0, ATTR_RDONLY)
    attributes = (ctypes.c_uint64 * 4)(*flags, 0, 0)  # set, clear, propagation, user namespace
    where = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    syscall(MOUNT_SETATTR, mount, os.fsencode(path), where, attributes, ctypes.sizeof(attributes))


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero))


# --- the table of mounts ------------------------------------------------------------------------------------


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo."""

    id: int
    parent: int
    point: str
    options: frozenset[str]
    kind: str
    source: str


def mount_table(process: int | str = "self") -> list[Mount]:
    """All mounts that a process can reach, those that cover others after them."""

    def text(field: bytes) -> str:
        return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes((int(match[1], 8),)), field))

    table = []
    with open(f"/proc/{process}/mountinfo", "rb") as lines:
        for line in lines:
            left, _, right = line.partition(b" - ")
            fields, (kind, source) = left.split(b" "), right.split(b" ")[:2]
            options = frozenset(fields[5].decode().split(","))
            ids = int(fields[0]), int(fields[1])
            table.append(Mount(*ids, text(fields[4]), options, text(kind), text(source.strip())))
    return table


def mount_id(fd: int) -> int:
    """The id of the mount that a descriptor lies on; asks no file server."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


def below(path: str, directories: Iterable[str]) -> bool:
    """Whether ``path`` is one of the directories or lies below one."""
    return any(path == top or path.startswith(f"{top.rstrip('/')}/") for top in directories)


def vet(fd: int, path: str, forbidden: Iterable[str]) -> str:
    """Refuse what must not be mounted or read for anybody, whoever may open it; return the real path."""
    real = os.readlink(f"/proc/self/fd/{fd}")
    number = mount_id(fd)
    kind = next((mount.kind for mount in mount_table() if mount.id == number), None)
    if kind is None:
        # Through /proc/PID/root one reaches mounts of other namespaces, and through /proc/PID/fd what has no
        # path.
        raise MountError("refused", f"{path} is on no file system of this server's mount namespace")
    if kind in PSEUDO or below(real, PSEUDO_PATHS):
        raise MountError("refused", f"{path} is the kernel's own ({kind}), not data: jobs cannot have it")
    if below(real, forbidden):
        raise MountError("refused", f"{path} belongs to the server itself: jobs cannot have it")
    return real


# --- pins ---------------------------------------------------------------------------------------------------


def set_up(pins: str) -> str:
    """Make the directory of pins a mount of its own; return its real path. Pins that are there stay.

    It is a tmpfs on a bind of itself, both unbindable, which does three things. A job that mounts ``/`` gets
    no copies of pins (else each such job would double their number). The pins do not spread into other mount
    namespaces, and where they cannot be seen (after a reboot, or by an Engine in another namespace) their
    names do not exist either: Docker then says so, where an empty directory would have passed for the user's
    data. It must be in the Engine's own mount namespace, so the helper makes none for itself.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise MountError("refused", f"the kernel's mount calls are not known for {machine}")
    try:
        syscall(MOUNT_SETATTR, -1, b"", 0, (ctypes.c_uint64 * 4)(), 32)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise MountError("refused", "pinning mounts needs Linux 5.12 or newer") from None
    os.makedirs(pins, mode=0o700, exist_ok=True)
    pins = os.path.realpath(pins)
    there = [mount for mount in mount_table() if mount.point == pins]
    if there and there[-1].kind == "tmpfs" and there[-1].source == PINS_SOURCE:
        return pins
    status = os.lstat(pins)
    if status.st_uid != 0:
        raise MountError("refused", f"{pins} is not root's")
    os.chmod(pins, 0o700)
    if not there:
        _mount(pins, pins, None, MS_BIND)
    _mount(None, pins, None, MS_UNBINDABLE)
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    _mount(PINS_SOURCE, pins, "tmpfs", flags, "mode=0700,size=64m,nr_inodes=200000")
    _mount(None, pins, None, MS_UNBINDABLE)
    return pins


def tear_down(pins: str) -> None:
    """Remove all pins and their place."""
    for name in os.listdir(pins):
        unpin(f"{pins}/{name}")
    for mount in mount_table():
        if mount.point == pins:
            _umount(pins, MNT_DETACH | UMOUNT_NOFOLLOW)


def unpin(target: str) -> None:
    """Remove a pin; nothing happens where there is none."""
    while True:
        try:
            _umount(target, MNT_DETACH | UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno == errno.EINVAL:  # no mount there (any more)
                break
            raise
    try:
        os.rmdir(target)
    except NotADirectoryError:
        os.unlink(target)


def pin(fd: int, real: str, target: str, read_only: bool, forbidden: Iterable[str]) -> os.stat_result:
    """Mount what ``fd`` is, with all that is mounted below it, at ``target``; return its status there."""
    status = os.fstat(fd)
    if status.st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    unpin(target)  # a half-made one, or the one of an earlier attempt
    if stat.S_ISDIR(status.st_mode):
        os.mkdir(target, 0o700)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        _attach(fd, target, read_only)
        _prune(real, target, forbidden)
        there = os.stat(target)
        if (there.st_dev, there.st_ino) != (status.st_dev, status.st_ino):
            raise _changed(real)
    except (OSError, MountError):
        unpin(target)
        raise
    return status


def _changed(real: str) -> MountError:
    return MountError("held", f"{real} changed while it was mounted")


def _attach(fd: int, target: str, read_only: bool) -> None:
    """Copy the tree of mounts at ``fd``, and set its flags before anybody can reach it at ``target``."""
    tree = syscall(OPEN_TREE, fd, b"", OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE)
    # Private, too. As a peer of its original, removing the pin would unmount the original's submounts; as a
    # slave of it, later mounts would come in without these flags.
    flags = ATTR_NOSUID | ATTR_NODEV | (ATTR_RDONLY if read_only else 0)
    attributes = (ctypes.c_uint64 * 4)(flags, 0, MS_PRIVATE, 0)  # set, clear, propagation, user namespace
    size = ctypes.sizeof(attributes)
    syscall(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH | AT_RECURSIVE, attributes, size)
    syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
    os.close(tree)


def _prune(real: str, target: str, forbidden: Iterable[str]) -> None:
    """Take the kernel's interfaces and the server's own mounts out of a pin of, say, ``/``.

    Copies of containers' root file systems would also keep the Engine from removing those containers.
    """
    barred = (*PSEUDO_PATHS, *forbidden)

    def unwanted() -> list[Mount]:
        table = mount_table()
        covered = {(mount.parent, mount.point) for mount in table}  # by a mount on that one's root
        return [
            mount
            for mount in table
            if mount.point.startswith(f"{target}/")
            and (mount.kind in PSEUDO or below(real.rstrip("/") + mount.point[len(target) :], barred))
            and (mount.id, mount.point) not in covered
        ]

    # One that lies below a mount that covers it is reached when that has gone.
    while left := unwanted():
        if not any(_take_out(mount, target) for mount in left):
            raise _changed(real)


def _take_out(mount: Mount, target: str) -> bool:
    """Unmount one mount of a pin; whether it was the one to be found there.

    The way leads through directories that users can swap for links: it is walked without following any, and what is
    found must be the very mount. Unmounting by name could hit the host's own.
    """
    top = os.open(target, os.O_PATH | os.O_CLOEXEC)
    try:
        found = open_below(top, mount.point[len(target) + 1 :], RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
    except FileNotFoundError:
        return False
    finally:
        os.close(top)
    try:
        if mount_id(found) != mount.id:
            return False
        _umount(f"/proc/self/fd/{found}", MNT_DETACH)
        return True
    finally:
        os.close(found)


def is_same(path: str, file: tuple[int, int], mounted: bool, read_only: bool) -> bool:
    """Whether that device and inode is at ``path``; ``mounted``: as a pin that has all its flags."""
    if mounted:
        there = [mount for mount in mount_table() if mount.point == path]
        if not there or not {"nosuid", "nodev", *(["ro"] if read_only else [])} <= there[-1].options:
            return False
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (status.st_dev, status.st_ino) == file
