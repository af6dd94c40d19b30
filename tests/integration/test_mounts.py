"""Mounts as submitters may have them: real accounts, mounts and an Engine, and file systems that hang."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from gpujobs.adapters.mounts import Mounts, PlainMounts
from gpujobs.core.errors import InvalidInput, Refused, Unavailable
from gpujobs.core.job import Owner
from gpujobs.core.ports import MountHeld, Pin
from tests.lab import accounts, images
from tests.lab import engine as lab
from tests.lab.accounts import Account, command_as, run_as
from tests.lab.fuse import Fuse

ROOT = Path(__file__).parents[2]


def owner_of(account: Account, *extra: int) -> Owner:
    groups = tuple(sorted({account.gid, *extra}))
    return Owner(uid=account.uid, gid=account.gid, groups=groups, name=account.name, home=str(account.home))


@pytest.fixture(scope="module")
def people() -> tuple[Account, ...]:
    return accounts.ensure()


@pytest.fixture
def anna(people) -> Account:
    return people[0]


@pytest.fixture
def ben(people) -> Account:
    return people[1]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may enter and only root may write; its mounts go with it."""
    path = Path(tempfile.mkdtemp(prefix="gpujobs-mounts-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    for line in reversed(mounts_below(path)):
        subprocess.run(["umount", "--lazy", line], check=True)
    shutil.rmtree(path)


@pytest.fixture
def shared(people) -> Iterator[Path]:
    """A directory of Anna's beside her home, below /home, for what must lie on her way."""
    path = Path(tempfile.mkdtemp(prefix="work-", dir=people[0].home))
    os.chown(path, people[0].uid, people[0].gid)
    yield path
    for line in reversed(mounts_below(path)):
        subprocess.run(["umount", "--lazy", line], check=True)
    shutil.rmtree(path)


@asynccontextmanager
async def mounts_at(place: Path, **options) -> AsyncIterator[Mounts]:
    mounts = await Mounts.start(place / "pins", **options)
    try:
        yield mounts
    finally:
        with suppress(Unavailable):
            await mounts.remove_all()
        await mounts.close()


def mounts_below(path: Path | str) -> list[str]:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point == str(path) or point.startswith(f"{path}/")]


def run(*argv: str | Path) -> None:
    subprocess.run([*map(str, argv)], check=True)


def mount(*args: str | Path) -> None:
    run("mount", *args)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descriptors_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def until(condition: Callable[[], object], limit: float = 10.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        await asyncio.sleep(0.01)


@contextmanager
def running(account: Account, script: str, *args: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A Python script that runs as the account and prints a line when it is ready."""
    process = subprocess.Popen(
        command_as(account, ["/usr/bin/python3", "-c", script, *map(str, args)]),
        stdout=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# --- whose right it is --------------------------------------------------------------------------------------


def test_a_directory_below_another_users_0700_home_is_refused_and_ones_own_is_not(place, anna, ben, shared):
    data = ben.home / "data"
    run_as(ben, ["mkdir", "-p", "-m", "777", str(data)])
    (link := shared / "link").symlink_to(data)

    async def scenario():
        async with mounts_at(place) as mounts:
            for path in (data, link, ben.home):
                with pytest.raises(Refused, match=f"permission denied for {anna.name}: {path}"):
                    await mounts.pin(owner_of(anna), str(path), False, "theirs")
            assert mounts.list() == ()
            pin = await mounts.pin(owner_of(ben), str(data), False, "mine")
            assert (pin.device, pin.inode) == (data.stat().st_dev, data.stat().st_ino)
            assert pin.kind == "dir"
            assert Path(pin.path).stat().st_ino == data.stat().st_ino
            assert run_as(ben, ["ls", pin.path]).returncode != 0, "nobody but root may use pins"
            assert await mounts.check(pin)

    asyncio.run(scenario())


def test_a_file_of_roots_of_mode_0600_is_refused_though_a_place_can_be_opened(place, anna, shared):
    secret = shared / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    (alias := shared / "alias").symlink_to(secret)

    async def scenario():
        async with mounts_at(place) as mounts:
            for path in (secret, alias, Path("/etc/shadow")):
                with pytest.raises(Refused, match="permission denied"):
                    await mounts.pin(owner_of(anna), str(path), True, "file")
                with pytest.raises(Refused, match="permission denied"):
                    await mounts.read_file(owner_of(anna), str(path), 1000)
            secret.chmod(0o604)
            pin = await mounts.pin(owner_of(anna), str(alias), True, "file")
            assert pin.kind == "file"
            assert Path(pin.path).read_text() == "root's"
            with pytest.raises(OSError, match="Read-only"):
                Path(pin.path).write_text("x")

    asyncio.run(scenario())


def test_a_directory_needs_both_reading_and_entering_and_groups_count(place, anna):
    directory = place / "group"
    directory.mkdir()
    os.chown(directory, 0, 7001)

    async def pinned(mounts: Mounts, mode: int, *groups: int) -> bool:
        directory.chmod(mode)
        try:
            await mounts.pin(owner_of(anna, *groups), str(directory), False, "group")
        except Refused:
            return False
        return True

    async def scenario():
        async with mounts_at(place) as mounts:
            assert await pinned(mounts, 0o750, 7001)
            assert not await pinned(mounts, 0o750, 7002)
            assert not await pinned(mounts, 0o710, 7001)
            assert not await pinned(mounts, 0o740, 7001)
            assert not await pinned(mounts, 0o750)

    asyncio.run(scenario())


def test_nothing_is_opened_as_root(place, anna):
    root = Owner(uid=0, gid=0, groups=(0,), name="root", home="/root")

    async def scenario():
        async with mounts_at(place) as mounts:
            with pytest.raises(Refused, match="as root"):
                await mounts.pin(root, "/usr", True, "usr")
            # The rule holds in the process that opens, too, whoever asks it.
            account = {"uid": 0, "gid": 0, "groups": [0], "name": "root"}
            with pytest.raises(Refused, match="cannot open paths as root"):
                await mounts._helper.ask("pin", owner=account, path="/usr", read_only=True, name="usr")

    asyncio.run(scenario())


def test_a_link_that_is_swapped_while_it_is_pinned_leads_nowhere_else(place, anna, ben, shared):
    secret = ben.home / "secret"
    run_as(ben, ["mkdir", "-p", str(secret)])
    (mine := shared / "mine").mkdir()
    os.chown(mine, anna.uid, anna.gid)
    swap = """
import os, sys
base, mine, other = sys.argv[1:]
n = 0
while True:
    for target in (mine, other):
        os.symlink(target, base + "/new"); os.rename(base + "/new", base + "/link")
    n += 1
    if n == 1: print("ready", flush=True)
"""

    async def scenario():
        seen = {"mine": 0, "refused": 0}
        async with mounts_at(place) as mounts:
            deadline = time.monotonic() + 20
            while min(seen.values()) < 10 and time.monotonic() < deadline:
                try:
                    pin = await mounts.pin(owner_of(anna), f"{shared}/link", False, "swapped")
                except Refused:
                    seen["refused"] += 1
                else:
                    assert pin.inode == mine.stat().st_ino == Path(pin.path).stat().st_ino
                    seen["mine"] += 1
        assert min(seen.values()) >= 10, seen

    with running(anna, swap, shared, mine, secret):
        asyncio.run(scenario())


# --- what nobody gets ---------------------------------------------------------------------------------------


def test_interfaces_of_the_kernel_and_what_is_the_servers_are_refused(place, anna, shared):
    (state := place / "state").mkdir(mode=0o755)
    (state / "inside").mkdir(mode=0o755)
    (around := shared / "around").symlink_to("/proc")
    mount("--bind", "/sys/kernel", made(place / "bound"))
    mount("-t", "devtmpfs", "dev", made(place / "devices"))

    async def scenario():
        async with mounts_at(place, forbidden=[state]) as mounts:
            kernel = ("/proc", "/proc/self", "/sys", "/sys/fs/cgroup", "/dev", "/dev/shm", "/dev/null")
            for path in (*kernel, around, place / "bound", place / "devices", f"{shared}/../../../proc/sys"):
                with pytest.raises(Refused, match=r"the kernel's own|is a device"):
                    await mounts.pin(owner_of(anna), str(path), True, "kernel")
            for path in (state, state / "inside"):
                with pytest.raises(Refused, match="belongs to the server itself"):
                    await mounts.pin(owner_of(anna), str(path), True, "server")
            with pytest.raises(Refused, match="permission denied"):
                await mounts.pin(owner_of(anna), mounts.pins, True, "pins")
            assert mounts.list() == ()

    asyncio.run(scenario())


def made(path: Path) -> Path:
    path.mkdir()
    return path


def test_sockets_pipes_and_devices_are_refused_without_being_opened(place, anna, shared):
    os.mkfifo(shared / "pipe", 0o666)
    os.mknod(shared / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(shared / "docker.sock"))
    (shared / "docker.sock").chmod(0o666)

    async def scenario():
        async with mounts_at(place) as mounts:
            for name, word in (("pipe", "named pipe"), ("null", "device"), ("docker.sock", "socket")):
                with pytest.raises(Refused, match=f"is a {word}: only directories and regular files"):
                    await mounts.pin(owner_of(anna), f"{shared}/{name}", True, "special")
                with pytest.raises(Refused, match=f"is a {word}"):
                    await mounts.read_file(owner_of(anna), f"{shared}/{name}", 10)

    asyncio.run(scenario())
    listener.close()


def test_what_is_not_there_is_not_made(place, anna):
    async def scenario():
        async with mounts_at(place) as mounts:
            with pytest.raises(InvalidInput, match=r"no such directory: /home/nobody/x \(nothing is"):
                await mounts.pin(owner_of(anna), "/home/nobody/x", False, "absent")
            with pytest.raises(InvalidInput, match="Not a directory"):
                await mounts.pin(owner_of(anna), "/etc/passwd/x", False, "absent")
            for path in ("data", "", "/a\0b"):
                with pytest.raises(InvalidInput, match="no absolute path"):
                    await mounts.pin(owner_of(anna), path, False, "absent")
            for name in ("", "..", "../x", "a/b", ".hidden", "x" * 300):
                with pytest.raises(InvalidInput, match="no name of a pin"):
                    await mounts.pin(owner_of(anna), "/usr", False, name)
            assert mounts.list() == ()
        assert not Path("/home/nobody").exists()

    asyncio.run(scenario())


def test_a_mount_of_another_namespace_is_refused(place, anna, shared):
    script = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.getuid(), os.getgid()
assert libc.unshare(0x10000000 | 0x00020000) == 0, os.strerror(ctypes.get_errno())  # user, mount
for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
    open("/proc/self/" + name, "w").write(line)
assert libc.mount(b"mine", sys.argv[1].encode(), b"tmpfs", 0, b"mode=755") == 0, ctypes.get_errno()
os.mkdir(sys.argv[1] + "/planted")
print("ready", flush=True)
time.sleep(600)
"""
    where = shared / "tmpfs"
    where.mkdir()
    os.chown(where, anna.uid, anna.gid)

    async def scenario(pid: int):
        async with mounts_at(place) as mounts:
            with pytest.raises(Refused, match="no file system of this server's mount namespace"):
                await mounts.pin(owner_of(anna), f"/proc/{pid}/root{where}/planted", False, "planted")

    with running(anna, script, where) as process:
        asyncio.run(scenario(process.pid))  # setpriv and env have become it


# --- what a pin is ------------------------------------------------------------------------------------------


def make_tree(top: Path) -> None:
    """Two tmpfs below each other and below ``top``, with a device and a setuid program in the inner one."""
    mount("-t", "tmpfs", "-o", "mode=777,suid,dev", "outer", made(top / "outer"))
    mount("--make-shared", top / "outer")
    mount("-t", "tmpfs", "-o", "mode=777,suid,dev", "inner", made(top / "outer" / "inner"))
    inner = top / "outer" / "inner"
    os.mknod(inner / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (inner / "zero").chmod(0o666)
    shutil.copy("/usr/bin/id", inner / "id")
    (inner / "id").chmod(0o4755)


def test_nosuid_nodev_and_read_only_hold_in_every_submount(place, anna):
    make_tree(place)

    async def scenario():
        async with mounts_at(place) as mounts:
            source = str(place / "outer")
            for read_only in (True, False):
                pin = await mounts.pin(owner_of(anna), source, read_only, "tree")
                assert pin.read_only is read_only
                assert await mounts.check(pin)
                inner = Path(pin.path) / "inner"
                for path in (Path(pin.path), inner):
                    flags = os.statvfs(path).f_flag
                    assert flags & os.ST_NOSUID
                    assert flags & os.ST_NODEV
                    assert bool(flags & os.ST_RDONLY) is read_only
                with pytest.raises(PermissionError):
                    (inner / "zero").open("rb")
                if read_only:
                    with pytest.raises(OSError, match="Read-only"):
                        (inner / "new").write_text("x")
                else:
                    (inner / "new").write_text("x")
                    assert (place / "outer/inner/new").read_text() == "x"
            with (place / "outer/inner/zero").open("rb") as zero:
                assert zero.read(1) == b"\0", "the original was changed"

    asyncio.run(scenario())


def test_removing_a_pin_leaves_the_mounts_below_its_shared_original(place, anna):
    make_tree(place)
    before = mounts_below(place / "outer")

    async def scenario():
        async with mounts_at(place) as mounts:
            await mounts.pin(owner_of(anna), str(place / "outer"), False, "tree")
            await mounts.unpin("tree")
            await mounts.unpin("tree")
            assert mounts.list() == ()
            assert mounts_below(mounts.pins) == [mounts.pins, mounts.pins]
            assert mounts_below(place / "outer") == before
            # A later mount below the original does not come into the pin without the pin's flags.
            pin = await mounts.pin(owner_of(anna), str(place / "outer"), True, "tree")
            mount("-t", "tmpfs", "later", made(place / "outer/later"))
            assert not os.path.ismount(f"{pin.path}/later")

    asyncio.run(scenario())


def test_a_pin_of_everything_holds_no_pins_and_nothing_of_the_kernels_or_servers(place, anna):
    (engine := place / "engine").mkdir(mode=0o755)
    mount("-t", "tmpfs", "rootfs-of-a-container", made(engine / "merged"))

    async def scenario():
        async with mounts_at(place, forbidden=[engine]) as mounts:
            await mounts.pin(owner_of(anna), "/usr", True, "usr")
            for number in range(4):
                pin = await mounts.pin(owner_of(anna), "/", True, f"all{number}")
                inside = [point.removeprefix(pin.path) for point in mounts_below(pin.path)]
                barred = ("/proc", "/sys", "/dev", str(engine), mounts.pins)
                assert not any(point.startswith(barred) for point in inside)
                assert Path(pin.path, "usr/bin").exists()
                assert not list(Path(pin.path, "proc").iterdir())

    asyncio.run(scenario())


PIN_OF_EVERYTHING = """
import os, sys
from gpujobs.adapters import mounts_kernel
pins = mounts_kernel.set_up(sys.argv[1])
mounts_kernel.pin(os.open("/", os.O_PATH), "/", f"{pins}/all", True, [pins])
print(*(mount.point for mount in mounts_kernel.mount_table() if mount.point.startswith(f"{pins}/all")))
"""


def test_a_dev_that_is_a_plain_tmpfs_is_in_no_pin_of_everything(place):
    # What programs see there is the one of this mount namespace alone, which ends with them.
    script = 'mount -t tmpfs dev /dev && mkdir /dev/shm && mount -t tmpfs shm /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", PIN_OF_EVERYTHING, str(place / "pins")],
        check=True, capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    pins = f"{place}/pins/all"
    assert pins in done.stdout.split()
    assert not [point for point in done.stdout.split() if point.startswith(f"{pins}/dev")]


def test_copies_of_the_directory_above_have_no_pins_and_not_even_their_names(place, anna, shared):
    copy = made(shared / "copy")

    async def scenario():
        async with mounts_at(place) as mounts:
            await mounts.pin(owner_of(anna), "/usr", True, "usr")
            mount("--rbind", place, copy)
            assert mounts_below(copy) == [str(copy)]
            assert not list((copy / "pins").iterdir())

    asyncio.run(scenario())


def test_taking_proc_out_of_a_pin_cannot_be_led_to_the_hosts_own(place, anna, shared):
    """Anna's directory holds a /proc that root mounted, as for a chroot; she swaps the way for a link."""
    (tree := shared / "tree").mkdir()
    (tree / "chroot").mkdir()
    os.chown(tree, anna.uid, anna.gid)
    mount("-t", "proc", "proc", made(tree / "chroot" / "proc"))
    swap = """
import os, sys
os.chdir(sys.argv[1])
n = 0
while True:
    os.rename("chroot", "aside"); os.symlink("/", "chroot")
    os.unlink("chroot"); os.rename("aside", "chroot")
    n += 1
    if n == 1: print("ready", flush=True)
"""
    host = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4] == "/proc"]

    async def scenario():
        outcomes = {"pinned": 0, "refused": 0}
        async with mounts_at(place) as mounts:
            deadline = time.monotonic() + 8
            while time.monotonic() < deadline and min(outcomes.values()) < 40:
                try:
                    pin = await mounts.pin(owner_of(anna), str(tree), False, "tree")
                except (Refused, InvalidInput, MountHeld):
                    outcomes["refused"] += 1
                    assert mounts.list() == ()
                else:
                    outcomes["pinned"] += 1
                    assert mounts_below(pin.path) == [pin.path]
        assert min(outcomes.values()) > 0, outcomes  # both happened, so the way was swapped in time

    with running(anna, swap, tree):
        asyncio.run(scenario())
    assert host == [
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4] == "/proc"
    ]


def test_a_pin_is_known_again_only_as_the_very_same_file(place, anna, shared):
    (shared / "data").mkdir()
    os.chown(shared / "data", anna.uid, anna.gid)

    async def scenario():
        async with mounts_at(place) as mounts:
            pin = await mounts.pin(owner_of(anna), f"{shared}/data", False, "data")
            # Its owner moves it away and puts another there: the pin stays what it was.
            (shared / "data").rename(shared / "moved")
            (shared / "data").mkdir()
            assert await mounts.check(pin)
            assert Path(pin.path).stat().st_ino == (shared / "moved").stat().st_ino
            run("umount", pin.path)
            assert not await mounts.check(pin), "the mount is lost, and an empty directory is there"
            again = await mounts.pin(owner_of(anna), f"{shared}/moved", False, "data")
            assert again == pin
            other = Pin(path=pin.path, device=pin.device, inode=pin.inode + 1, kind="dir", read_only=False)
            assert not await mounts.check(other)
            run("mount", "-o", "remount,bind,dev,suid", pin.path)
            assert not await mounts.check(pin), "its flags are gone"

    asyncio.run(scenario())


def test_two_hundred_pins_leak_nothing(place, anna):
    async def scenario():
        async with mounts_at(place) as mounts:

            async def once(number: int) -> None:
                pin = await mounts.pin(owner_of(anna), "/usr/share", True, f"pin{number}")
                assert await mounts.check(pin)
                await mounts.unpin(f"pin{number}")

            await once(0)
            helper = mounts.helper_pid
            await until(lambda: not children_of(helper))
            before = descriptors_of(helper), descriptors_of(os.getpid()), len(mounts_below(place))
            for start in range(0, 200, 20):
                await asyncio.gather(*(once(number) for number in range(start, start + 20)))
            await until(lambda: not children_of(helper))
            assert (descriptors_of(helper), descriptors_of(os.getpid()), len(mounts_below(place))) == before
            assert mounts.list() == ()
            assert mounts.helper_pid == helper

    asyncio.run(scenario())


# --- as the user, without mounts ----------------------------------------------------------------------------


def test_directories_are_made_and_files_are_read_as_their_owner(place, anna, ben, shared):
    run_as(anna, ["sh", "-c", "printf %s hello > $0/file; mkdir $0/kept; chmod 755 $0/kept", str(shared)])

    async def scenario():
        async with mounts_at(place) as mounts:
            await mounts.make_directory(owner_of(anna), f"{shared}/a/b/c")
            await mounts.make_directory(owner_of(anna), f"{shared}/kept")
            for name in ("a", "a/b", "a/b/c"):
                status = (shared / name).stat()
                assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (
                    anna.uid,
                    anna.gid,
                    0o700,
                )
            assert stat.S_IMODE((shared / "kept").stat().st_mode) == 0o755
            with pytest.raises(Refused, match=f"permission denied for {ben.name}"):
                await mounts.make_directory(owner_of(ben), f"{shared}/a/d")
            with pytest.raises(Refused, match="permission denied"):
                await mounts.make_directory(owner_of(anna), "/etc/gpujobs-made-by-a-user")
            with pytest.raises(InvalidInput, match="File exists"):
                await mounts.make_directory(owner_of(anna), f"{shared}/file")
            assert await mounts.read_file(owner_of(anna), f"{shared}/file", 5) == b"hello"
            with pytest.raises(InvalidInput, match="larger than 4 bytes"):
                await mounts.read_file(owner_of(anna), f"{shared}/file", 4)
            with pytest.raises(InvalidInput, match="is a directory"):
                await mounts.read_file(owner_of(anna), f"{shared}/a", 4)
            with pytest.raises(InvalidInput, match="no such file"):
                await mounts.read_file(owner_of(anna), f"{shared}/absent", 4)
            big = os.urandom(3 * 2**20)
            (shared / "big").write_bytes(big)
            (shared / "big").chmod(0o644)
            assert await mounts.read_file(owner_of(anna), f"{shared}/big", 4 * 2**20) == big
            for path in ("/proc/self/maps", "/proc/self/fd/2", "/proc/self/environ", "/proc/version"):
                with pytest.raises(Refused):
                    await mounts.read_file(owner_of(anna), path, 10**6)

    asyncio.run(scenario())


def test_the_servers_own_open_files_are_not_the_users(place, anna):
    """The log of the server, readable by its mode, lies in a directory that is not."""
    (private := place / "private").mkdir(mode=0o700)
    log = private / "log"
    script = """
import asyncio, sys
from pathlib import Path
from gpujobs.adapters.mounts import Mounts
from gpujobs.core.errors import GpujobsError
from gpujobs.core.job import Owner
anna = Owner(uid=int(sys.argv[2]), gid=int(sys.argv[2]), groups=(), name="anna", home="/")
async def main():
    mounts = await Mounts.start(Path(sys.argv[1]))
    for number in range(100):
        for work in (mounts.read_file(anna, f"/proc/self/fd/{number}", 1000),
                     mounts.pin(anna, f"/proc/self/fd/{number}", True, "x")):
            try:
                print("got", number, await work)
            except GpujobsError as error:
                print("refused", number, error)
    await mounts.remove_all()
    await mounts.close()
asyncio.run(main())
"""
    with log.open("w") as stderr:
        log.chmod(0o644)
        done = subprocess.run(
            [sys.executable, "-c", script, str(place / "pins"), str(anna.uid)],
            stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, check=True,
        )  # fmt: skip
    assert log.read_text() == ""
    assert "got" not in done.stdout
    assert done.stdout.count("refused") == 200


# --- what hangs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mood", ["ignore", "swallow"])
def test_a_silent_file_server_holds_its_own_requests_only(place, anna, ben, mood):
    point = made(place / "silent")

    async def scenario(fuse: Fuse):
        async with mounts_at(place, time_limit=1.0) as mounts:
            before = time.monotonic()
            hanging = [
                asyncio.create_task(mounts.pin(owner_of(anna), f"{point}", False, "root")),
                asyncio.create_task(mounts.pin(owner_of(anna), f"{point}/below", False, "below")),
                asyncio.create_task(mounts.make_directory(owner_of(anna), f"{point}/new")),
                asyncio.create_task(mounts.read_file(owner_of(anna), f"{point}/file", 10)),
            ]
            await until(lambda: len(children_of(mounts.helper_pid)) == len(hanging))
            pin = await mounts.pin(owner_of(ben), "/usr/share", True, "ben")
            assert await mounts.check(pin)
            assert await mounts.read_file(owner_of(anna), "/etc/hostname", 1000)
            assert time.monotonic() - before < 1.0, "others had to wait"
            assert not any(task.done() for task in hanging)
            for answer in await asyncio.gather(*hanging, return_exceptions=True):
                assert isinstance(answer, MountHeld)
                assert str(point) in answer.reason
                assert answer.reason.endswith("timed out after 1 s: is its file server there?")
            assert time.monotonic() - before < 3.0
            if mood == "swallow":  # the kernel does not let those go that were read and not answered
                await until(lambda: len(children_of(mounts.helper_pid)) <= len(hanging))
                assert children_of(mounts.helper_pid)
            fuse.abort()
            await until(lambda: not children_of(mounts.helper_pid))
            await mounts.pin(owner_of(anna), "/usr", False, "root")
            assert mounts.list() == ("ben", "root")

    with Fuse(point, mood) as fuse:
        asyncio.run(scenario(fuse))


def test_a_name_is_not_given_again_while_root_itself_hangs_on_it(place, anna):
    point = made(place / "silent")

    async def scenario(fuse: Fuse):
        async with mounts_at(place, time_limit=0.5) as mounts:
            with pytest.raises(MountHeld, match=r"timed out after 0\.5 s"):
                await mounts.pin(owner_of(anna), str(point), False, "data")
            with pytest.raises(MountHeld, match="an earlier attempt still hangs"):
                await mounts.pin(owner_of(anna), "/usr", False, "data")
            with pytest.raises(MountHeld, match="an earlier attempt still hangs"):
                await mounts.unpin("data")
            await mounts.pin(owner_of(anna), "/usr", False, "other")
            fuse.abort()
            await until(lambda: not children_of(mounts.helper_pid))
            assert mounts.list() == ("other",)
            await mounts.pin(owner_of(anna), "/usr", False, "data")

    with Fuse(point, "swallow") as fuse:
        fuse.silent_to = 0
        asyncio.run(scenario(fuse))


def test_one_users_many_hanging_requests_are_soon_answered_without_trying(place, anna, ben):
    point = made(place / "silent")

    async def scenario():
        async with mounts_at(place, time_limit=0.5) as mounts:

            async def attempt(owner: Owner, number: int) -> str:
                with pytest.raises(MountHeld) as held:
                    await mounts.pin(owner, str(point), False, f"{owner.name}-{number}")
                return held.value.reason

            first = await asyncio.gather(*(attempt(owner_of(anna), number) for number in range(8)))
            assert all("timed out" in reason for reason in first)
            before = time.monotonic()
            assert "8 earlier attempts still hang" in await attempt(owner_of(anna), 8)
            assert time.monotonic() - before < 0.4
            assert "timed out" in await attempt(owner_of(ben), 0), "Ben's own turn is not Anna's to use up"

    with Fuse(point, "swallow"):
        asyncio.run(scenario())


def test_a_pin_whose_file_server_dies_is_held_not_taken_for_lost(place, anna):
    point = made(place / "remote")

    async def scenario(fuse: Fuse):
        async with mounts_at(place, time_limit=1.0) as mounts:
            pin = await mounts.pin(owner_of(anna), str(point), False, "remote")
            assert await mounts.check(pin)
            fuse.mood = "ignore"
            with pytest.raises(MountHeld, match="timed out"):
                await mounts.check(pin)
            fuse.abort()
            with pytest.raises(MountHeld, match=r"not connected|aborted"):
                await mounts.check(pin)
            with pytest.raises(MountHeld, match="is its file server there"):
                await mounts.pin(owner_of(anna), str(point), False, "again")
            await mounts.unpin("remote")
            assert mounts.list() == ()

    with Fuse(point, "answer") as fuse:
        asyncio.run(scenario(fuse))


def test_a_file_system_that_shuts_root_out_is_refused_in_plain_words(place, anna, ben):
    point = made(place / "private")

    async def scenario():
        async with mounts_at(place) as mounts:
            with pytest.raises(Refused, match=rf"{point}: its file system shuts root out.*allow_other"):
                await mounts.pin(owner_of(anna), str(point), False, "private")
            with pytest.raises(Refused, match="permission denied"):
                await mounts.pin(owner_of(ben), str(point), False, "private")
            assert mounts.list() == ()

    with Fuse(point, "answer", uid=anna.uid, allow_other=False):
        asyncio.run(scenario())


def test_a_user_who_stops_or_kills_what_acts_for_him_gains_nothing(place, anna, ben):
    hunt = """
import os, signal, sys
print("ready", flush=True)
number = getattr(signal, sys.argv[1])
while True:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                if os.stat("/proc/" + name).st_uid in (0, os.getuid()): os.kill(int(name), number)
            except OSError: pass
"""

    async def scenario():
        async with mounts_at(place, time_limit=1.0) as mounts:
            for _ in range(20):
                with suppress(MountHeld):
                    await mounts.pin(owner_of(anna), "/usr", True, "anna")
                await mounts.pin(owner_of(ben), "/usr", True, "ben")
            await until(lambda: not children_of(mounts.helper_pid))

    for name in ("SIGSTOP", "SIGKILL"):
        with running(anna, hunt, name):
            asyncio.run(scenario())


# --- the helper's life --------------------------------------------------------------------------------------


def test_the_helper_survives_requests_that_are_none(place, anna, capfd):
    async def scenario():
        async with mounts_at(place) as mounts:
            helper = mounts.helper_pid
            for junk in (b"junk", b"\xff", b"[]", b"{}", b'{"id": 5}', b'{"id": 5, "op": "rm"}', b"null"):
                await asyncio.get_running_loop().sock_sendall(mounts._helper._socket, junk)
            for values in ({"op": "mkdir"}, {"op": "pin", "name": "x"}, {"op": "check", "path": "/usr"}):
                with pytest.raises(Refused, match="failed in the server"):
                    await mounts._helper.ask(**values)
            await mounts.pin(owner_of(anna), "/usr", True, "usr")
            assert mounts.helper_pid == helper

    asyncio.run(scenario())
    assert capfd.readouterr().err.count("a request that is none") == 7


def test_a_helper_that_was_killed_is_started_again_and_pins_stay(place, anna):
    point = made(place / "silent")

    async def scenario():
        async with mounts_at(place) as mounts:
            pin = await mounts.pin(owner_of(anna), "/usr", True, "usr")
            first = mounts.helper_pid
            waiting = asyncio.create_task(mounts.pin(owner_of(anna), str(point), True, "silent"))
            await until(lambda: children_of(first))
            os.kill(first, signal.SIGKILL)
            with pytest.raises(Unavailable, match="the mount helper has ended"):
                await waiting
            assert await mounts.check(pin)
            assert mounts.helper_pid not in (None, first)

    with Fuse(point, "ignore"):
        asyncio.run(scenario())


def test_the_helper_goes_with_a_server_that_is_killed_and_the_next_finds_its_pins(place, anna):
    script = """
import asyncio, json, sys
from pathlib import Path
from gpujobs.adapters.mounts import Mounts
from gpujobs.core.job import Owner
from dataclasses import asdict
async def main():
    mounts = await Mounts.start(Path(sys.argv[1]))
    pin = await mounts.pin(Owner(**{**json.loads(sys.argv[2]), "groups": ()}), "/usr", True, "usr")
    print(json.dumps({"helper": mounts.helper_pid, "pin": asdict(pin)}), flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    owner = {"uid": anna.uid, "gid": anna.gid, "name": anna.name, "home": str(anna.home)}
    server = subprocess.Popen(
        [sys.executable, "-c", script, str(place / "pins"), json.dumps(owner)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    with server:
        told = json.loads(server.stdout.readline())
        os.kill(told["helper"], signal.SIGTERM)  # as a service manager does to all processes at once: it waits
        server.kill()

    async def scenario():
        await until(lambda: not Path(f"/proc/{told['helper']}").exists())
        async with mounts_at(place) as mounts:
            assert mounts.list() == ("usr",)
            assert await mounts.check(Pin(**told["pin"]))
            assert mounts_below(mounts.pins).count(mounts.pins) == 2, "the place of pins was mounted over"

    asyncio.run(scenario())


def test_a_pin_that_nobody_waits_for_any_more_is_removed(place, anna):
    async def scenario():
        async with mounts_at(place) as mounts:
            for number in range(10):
                with suppress(TimeoutError):
                    await asyncio.wait_for(mounts.pin(owner_of(anna), "/usr", True, f"pin{number}"), 0.002)
                    await mounts.unpin(f"pin{number}")
            await until(lambda: mounts.list() == () and not children_of(mounts.helper_pid))

    asyncio.run(scenario())


def test_pins_are_refused_where_users_own_their_directory(place, anna):
    (place / "pins").mkdir()
    os.chown(place / "pins", anna.uid, anna.gid)
    with pytest.raises(Unavailable, match="is not root's"):
        asyncio.run(Mounts.start(place / "pins"))


# --- with an Engine -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> lab.Engine:
    engine = lab.ensure()
    images.ensure(engine, images.BUSYBOX)
    return engine


def in_container(engine: lab.Engine, account: Account, pin: Pin, script: str, *, docker_ro: bool = False) -> str:
    bind = f"type=bind,src={pin.path},dst=/data" + (",readonly" if docker_ro else "")
    return engine.docker(
        "run", "--rm", "--runtime", "runc", "--network", "none", "--user", f"{account.uid}:{account.gid}",
        "--mount", bind, images.BUSYBOX, "sh", "-c", script,
    )  # fmt: skip


def test_what_a_job_writes_is_its_owners_and_anothers_home_stays_shut(place, anna, ben, shared, engine):
    async def scenario():
        async with mounts_at(place) as mounts:
            pin = await mounts.pin(owner_of(anna), str(shared), False, "work")
            in_container(engine, anna, pin, "echo result > /data/result")
            status = (shared / "result").stat()
            assert (status.st_uid, status.st_gid) == (anna.uid, anna.gid)
            assert run_as(anna, ["cat", f"{shared}/result"]).stdout == "result\n"
            homes = await mounts.pin(owner_of(anna), "/home", False, "home")
            seen = in_container(engine, anna, homes, f"ls /data/{ben.name} 2>&1; ls /data/{anna.name}")
            assert "Permission denied" in seen
            assert shared.name in seen

    asyncio.run(scenario())


@pytest.mark.parametrize("docker_ro", [False, True])
def test_the_flags_hold_in_a_container_after_the_engines_own_mount(place, anna, engine, docker_ro):
    make_tree(place)

    async def scenario():
        async with mounts_at(place) as mounts:
            pin = await mounts.pin(owner_of(anna), str(place / "outer"), True, "tree")
            seen = in_container(
                engine, anna, pin,
                "grep ' /data' /proc/self/mountinfo; touch /data/x /data/inner/x; cat /data/inner/zero; "
                "/data/inner/id -u 2>/dev/null; exit 0",
                docker_ro=docker_ro,
            )  # fmt: skip
            fields = [line.split() for line in seen.splitlines() if " - " in line]
            flags = {field[4]: set(field[5].split(",")) for field in fields}
            assert set(flags) == {"/data", "/data/inner"}
            assert {"ro", "nosuid", "nodev"} <= flags["/data/inner"]
            assert "ro" in flags["/data"]
            # This is why the Engine is to be asked for a writable bind of a pin that is read-only by itself.
            assert ({"nosuid", "nodev"} <= flags["/data"]) is not docker_ro
            assert sorted(path.name for path in (place / "outer/inner").iterdir()) == ["id", "zero"]

    asyncio.run(scenario())


def test_a_lost_pin_stops_a_container_and_is_not_an_empty_directory(place, anna, shared, engine):
    async def scenario():
        async with mounts_at(place) as mounts:
            pin = await mounts.pin(owner_of(anna), str(shared), False, "work")
            name = f"gpujobs-mounts-{os.getpid()}"
            engine.docker("create", "--name", name, "--mount", f"type=bind,src={pin.path},dst=/data",
                          "--runtime", "runc", "--network", "none", images.BUSYBOX, "true")  # fmt: skip
            try:
                engine.docker("start", "--attach", name)
                await mounts.unpin("work")
                with pytest.raises(lab.LabError, match="bind source path does not exist"):
                    engine.docker("start", "--attach", name)
            finally:
                engine.docker("rm", "--force", name)

    asyncio.run(scenario())


def test_a_running_container_keeps_its_data_when_its_pin_goes(place, anna, shared, engine):
    (shared / "word").write_text("kept")
    (shared / "word").chmod(0o644)

    async def scenario():
        async with mounts_at(place) as mounts:
            pin = await mounts.pin(owner_of(anna), str(shared), False, "work")
            name = f"gpujobs-mounts-{os.getpid()}"
            engine.docker(
                "run",
                "--detach",
                "--name",
                name,
                "--mount",
                f"type=bind,src={pin.path},dst=/data",
                "--runtime",
                "runc",
                "--network",
                "none",
                images.BUSYBOX,
                "sleep",
                "60",
            )
            try:
                await mounts.unpin("work")
                assert engine.docker("exec", name, "cat", "/data/word") == "kept"
            finally:
                engine.docker("rm", "--force", name)

    asyncio.run(scenario())


# --- an ordinary user's server ------------------------------------------------------------------------------


def test_a_users_own_server_mounts_that_users_paths_only_and_says_so(place, anna, ben, shared):
    (shared / "data").mkdir()
    os.chown(shared / "data", anna.uid, anna.gid)
    (shared / "link").symlink_to("data")
    (shared / "state").mkdir(mode=0o755)
    # A copy of the package: the checkout may lie where this account cannot go.
    shutil.copytree(ROOT / "gpujobs", place / "lib" / "gpujobs", ignore=shutil.ignore_patterns("__pycache__"))
    script = """
import asyncio, json, sys
from pathlib import Path
from dataclasses import asdict, replace
from gpujobs.adapters.mounts import Mounts, PlainMounts
from gpujobs.core.errors import GpujobsError
from gpujobs.core.job import Owner
me, ben, base = Owner(**json.loads(sys.argv[1])), Owner(**json.loads(sys.argv[2])), sys.argv[3]
async def main():
    mounts = await PlainMounts.start(forbidden=[Path(base, "state")])
    told = {"note": mounts.note}
    async def attempt(name, work):
        try:
            told[name] = await work
        except GpujobsError as error:
            told[name] = f"{type(error).__name__}: {error}"
    pin = await mounts.pin(me, base + "/link", True, "x")
    told["pin"] = asdict(pin)
    await attempt("check", mounts.check(pin))
    await attempt("proc", mounts.pin(me, "/proc/self", True, "x"))
    await attempt("state", mounts.pin(me, base + "/state", True, "x"))
    await attempt("shadow", mounts.pin(me, "/etc/shadow", True, "x"))
    await attempt("absent", mounts.pin(me, base + "/absent", True, "x"))
    await attempt("ben", mounts.pin(ben, "/usr", True, "x"))
    await attempt("mkdir", mounts.make_directory(me, base + "/made"))
    await attempt("root", Mounts.start(Path(base, "pins")))
    await mounts.unpin("x")
    Path(base, "data").rmdir()
    await attempt("gone", mounts.check(pin))
    told["list"] = mounts.list()
    await mounts.close()
    print(json.dumps(told))
asyncio.run(main())
"""

    def as_json(account: Account) -> str:
        owner = owner_of(account)
        return json.dumps({name: getattr(owner, name) for name in ("uid", "gid", "groups", "name", "home")})

    status = (shared / "data").stat()
    done = run_as(
        anna, ["/usr/bin/python3", "-W", "error", "-c", script, as_json(anna), as_json(ben), str(shared)],
        env={"PYTHONPATH": str(place / "lib"), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert f"runs as {anna.name}, not as root" in told["note"]
    assert told["pin"] == {
        "path": f"{shared}/data",
        "device": status.st_dev,
        "inode": status.st_ino,
        "kind": "dir",
        "read_only": True,
        "writable": [],
    }
    assert told["check"] is True
    assert told["gone"] is False
    assert told["list"] == []
    assert told["mkdir"] is None
    assert (shared / "made").stat().st_uid == anna.uid
    assert told["proc"].startswith("Refused: /proc/self is the kernel's own")
    assert told["state"].startswith(f"Refused: {shared}/state belongs to the server")
    assert told["shadow"] == f"Refused: permission denied for {anna.name}: /etc/shadow"
    assert told["absent"].startswith("InvalidInput: no such directory")
    assert told["ben"] == f"Refused: this server cannot open paths as {ben.name} (uid {ben.uid})"
    assert told["root"] == "Unavailable: mounts cannot be pinned: that takes root"


def test_a_users_own_server_is_not_held_up_by_a_silent_file_server_either(place, anna):
    """The same helper serves it; here as root's test process asks, for its own account only."""
    point = made(place / "silent")

    async def scenario():
        mounts = await PlainMounts.start(time_limit=0.5)
        try:
            with pytest.raises(MountHeld, match=r"timed out after 0\.5 s"):
                await mounts.pin(owner_of(anna), str(point), False, "x")
        finally:
            await mounts.close()

    with Fuse(point, "swallow"):
        asyncio.run(scenario())
