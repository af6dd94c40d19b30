"""Gathers the facts that :mod:`gpujobs.core.checkup` judges, from the machine as it is.

Nothing is changed on the machine, and nothing is waited for without a limit: whatever may hang (a driver, a dead
file server, an Engine) is asked in a child process or with a time limit, and is a gap in the facts when it does.
It needs no server, no Engine and no rights.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import grp
import json
import os
import pwd
import re
import shutil
import socket
import sqlite3
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpujobs import init, places
from gpujobs import settings as configuration
from gpujobs.adapters import enginelock, ledgercheck, mounts_kernel, nvmlsession
from gpujobs.adapters.engine import Engine, default_host
from gpujobs.adapters.nvml import Nvml
from gpujobs.adapters.probes import MOST_BYTES, head_of, output_of, within
from gpujobs.core import checkup, toolkit
from gpujobs.core.errors import GpujobsError, InvalidInput
from gpujobs.core.facts import (
    AccessFacts,
    ConfigFile,
    Disk,
    EngineFacts,
    Facts,
    Node,
    NvmlFacts,
    Program,
    ServerFacts,
    StateFacts,
)
from gpujobs.core.finding import Report
from gpujobs.core.inventory import Health
from gpujobs.core.ports import EngineError
from gpujobs.service.peer import peer_of

ENGINE_SECONDS = 5
"""Of one call to the Engine."""
PROGRAM_SECONDS = 5.0
NVML_SECONDS = 15.0
"""A driver that is loaded but not held by anybody initialises each GPU first, about a second each."""
DISK_SECONDS = 3.0
LEDGER_SECONDS = 20.0
SOCKET_SECONDS = 2.0

_KERNEL_MODULE = re.compile(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)")
_NVML_LIBRARY = re.compile(r"/libnvidia-ml\.so\.(\d+(?:\.\d+)+)$", re.MULTILINE)
_CHANGELOG_HEAD = re.compile(r"\S+ \((?:\d+:)?([^)]+)\)")
_CVE = re.compile(r"CVE-\d{4}-\d{4,7}")
_TOOLKIT_SAYS = re.compile(r"NVIDIA Container (?:Toolkit CLI|Runtime)\S* version (\S+)")
_RUNC_SAYS = re.compile(r"^runc version (\S+)", re.MULTILINE)
_CALLS = (
    ("open_tree", mounts_kernel.OPEN_TREE),
    ("move_mount", mounts_kernel.MOVE_MOUNT),
    ("openat2", mounts_kernel.OPENAT2),
    ("mount_setattr", mounts_kernel.MOUNT_SETATTR),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the facts lie; tests set up their own."""

    configuration: Path = Path("/etc/nvidia-container-runtime/config.toml")
    settings: Path = places.SYSTEM_SETTINGS
    devices: Path = Path("/dev")
    kernel_module: Path = Path("/proc/driver/nvidia/version")
    documentation: Path = Path("/usr/share/doc")


def examine(environ: Mapping[str, str] | None = None, sources: Sources | None = None) -> Report:
    """Look at the machine and say what was found."""
    facts = gather(os.environ if environ is None else environ, sources or Sources())
    return Report(checkup.findings(facts), engine_answers=facts.engine is not None or checkup.is_served(facts))


def gather(environ: Mapping[str, str], sources: Sources) -> Facts:
    """All facts that can be had, with this account's rights."""
    nvml = _nvml()  # before the Engine's threads are there: it forks
    state = _state(places.server_state(environ))
    settings, problem = _settings(sources.settings)
    engine, engine_problem, engine_hint, configuration_file = _engine(environ, sources)
    return Facts(
        access=_access(environ),
        server=_server(environ, sources, problem),
        state=state,
        nvml=nvml,
        engine=engine,
        engine_problem=engine_problem,
        engine_hint=engine_hint,
        engine_disk=_disk(Path(engine.root)) if engine is not None and engine.root else None,
        runtime=settings.runtime,
        programs=_programs(environ, engine, sources),
        toolkit_config=_toolkit_config(configuration_file),
        kernel_module=_kernel_module(sources.kernel_module),
        nodes=_nodes(sources.devices),
        release=os.uname().release,
        missing_calls=_missing_calls(),
        init=_init(),
    )


# --- the Engine and what runs containers -----------------------------------------------------------------------------


def _engine(environ: Mapping[str, str], sources: Sources) -> tuple[EngineFacts | None, str, str, Path]:
    """The Engine's facts, or the problem and its hint; and the file that its runtime reads."""
    try:
        engine = Engine(default_host(environ), timeout=ENGINE_SECONDS)
    except InvalidInput as error:
        return None, error.message, error.hint, sources.configuration

    async def ask() -> EngineFacts:
        async with asyncio.timeout(3 * ENGINE_SECONDS):
            return await engine.facts()

    try:
        return asyncio.run(ask()), "", "", _configuration_of(engine.host, sources.configuration)
    except TimeoutError:
        problem, hint = f"the Docker Engine at {engine.host} gives no answer in time", "Look at its log."
    except EngineError as error:
        problem, hint = f"the Docker Engine at {engine.host} refuses: {error}", "Look at its log."
    except GpujobsError as error:
        problem, hint = error.message, error.hint
    finally:
        engine.close()
    return None, problem, hint, sources.configuration


def _configuration_of(host: str, default: Path) -> Path:
    """The config.toml that the Engine's runtime reads: XDG_CONFIG_HOME of the Engine's own environment moves it.

    Where that cannot be read (another account's Engine, or one that systemd listens for), it is taken to be unset.
    """
    pid = None
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SOCKET_SECONDS)
        connection.connect(host.removeprefix("unix://"))
        pid = peer_of(connection).pid
    if not pid or pid == 1:
        return default
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = entry.partition(b"=")
            if name == b"XDG_CONFIG_HOME" and value:
                return Path(os.fsdecode(value)) / "nvidia-container-runtime/config.toml"
    return default


def _programs(environ: Mapping[str, str], engine: EngineFacts | None, sources: Sources) -> tuple[Program, ...]:
    found = []
    if engine is not None:
        mended = _mended(sources.documentation, ("docker.io", "docker.io-app"), engine.version)
        found.append(Program(name="dockerd", version=engine.version, mended=mended))
        if engine.runc:
            found.append(_with_mended(Program(name="runc", version=engine.runc, origin="the Engine's"), sources))
    for name in ("nvidia-ctk", "nvidia-container-runtime"):
        program = _asked("toolkit", name, _TOOLKIT_SAYS, environ)
        if program is not None and program.version not in {item.version for item in found if item.name == "toolkit"}:
            found.append(program)
    runc = _asked("runc", "runc", _RUNC_SAYS, environ)  # NVIDIA's runtime looks for it on the PATH
    if runc is not None and (engine is None or runc.version != engine.runc):
        found.append(_with_mended(runc, sources))
    return tuple(found)


def _asked(kind: str, name: str, says: re.Pattern[str], environ: Mapping[str, str]) -> Program | None:
    path = shutil.which(name, path=environ.get("PATH", os.defpath))
    if path is None:
        return None
    text, problem = output_of([path, "--version"], environ, PROGRAM_SECONDS)
    match = says.search(text)
    if match is None:
        return Program(name=kind, origin=path, problem=problem or f"its --version says {text.strip()[:60]!r}")
    return Program(name=kind, version=match[1].rstrip(","), origin=path)


def _with_mended(program: Program, sources: Sources) -> Program:
    mended = _mended(sources.documentation, ("runc", "runc-app"), program.version)
    return Program(name=program.name, version=program.version, origin=program.origin, mended=mended)


def _mended(documentation: Path, packages: tuple[str, ...], version: str) -> tuple[str, ...]:
    """The CVE numbers that a Debian changelog names, where it is the changelog of that very version.

    Distributions mend holes under the number of the version that they released with.
    """
    for package in packages:
        path = documentation / package / "changelog.Debian.gz"
        try:
            # Decompressed in pieces up to the limit: a few bytes can stand for gigabytes.
            content = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head_of(path), MOST_BYTES)
        except (OSError, zlib.error):
            continue
        text = content.decode("utf-8", "replace")
        head = _CHANGELOG_HEAD.match(text)
        if head is not None and version and head[1].startswith(version):
            return tuple(sorted(set(_CVE.findall(text))))
    return ()


def _toolkit_config(path: Path) -> ConfigFile | None:
    try:
        content = head_of(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return ConfigFile(path=str(path), unreadable=f"cannot be read: {error.strerror}")
    parsed = toolkit.parse(content)
    if isinstance(parsed, str):
        return ConfigFile(path=str(path), broken=parsed)
    return ConfigFile(path=str(path), config=parsed, specifications=_specifications(parsed.cdi_directories))


def _specifications(directories: tuple[str, ...]) -> tuple[str, ...]:
    """The CDI files in some directories that describe NVIDIA's GPUs."""
    found = []
    for directory in directories:
        for pattern in ("*.yaml", "*.json"):
            for path in sorted(Path(directory).glob(pattern)):
                with contextlib.suppress(OSError):
                    if b"nvidia.com/gpu" in head_of(path):
                        found.append(str(path))
    return tuple(found)


# --- GPUs ------------------------------------------------------------------------------------------------------------


def _nvml() -> NvmlFacts:
    answer = within(NVML_SECONDS, NvmlFacts, _ask_nvml)
    return answer or NvmlFacts(code=None, problem=f"NVML crashed or gave no answer in {NVML_SECONDS:.0f} s")


def _ask_nvml() -> NvmlFacts:
    session = nvmlsession.Session()
    try:
        session.start()
    except nvmlsession.Away as away:
        return NvmlFacts(code=away.code, problem=away.problem, library=_nvml_library())
    session.stop()
    source = Nvml()
    inventory = source.snapshot()
    library = _nvml_library()
    source.close()
    return NvmlFacts(
        problem=inventory.problem,
        driver=inventory.driver or "",
        cuda="" if inventory.cuda is None else f"{inventory.cuda[0]}.{inventory.cuda[1]}",
        library=library,
        gpus=len(inventory.gpus),
        lost=tuple(gpu.index for gpu in inventory.gpus if gpu.health is Health.LOST),
        minors=tuple(gpu.minor for gpu in inventory.gpus if gpu.minor is not None),
    )


def _nvml_library() -> str:
    """The version in the name of the NVML library that this process has loaded."""
    with contextlib.suppress(OSError):
        match = _NVML_LIBRARY.search(Path("/proc/self/maps").read_text())
        if match is not None:
            return match[1]
    return ""


def _kernel_module(path: Path) -> str:
    with contextlib.suppress(OSError):
        match = _KERNEL_MODULE.search(path.read_text(errors="replace"))
        if match is not None:
            return match[1]
    return ""


def _nodes(directory: Path) -> tuple[Node, ...]:
    found = []
    for path in sorted(directory.glob("nvidia*")):
        try:
            status = path.stat()
        except OSError:
            continue
        if stat.S_ISCHR(status.st_mode):
            number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
            found.append(
                Node(
                    path=f"/dev/{path.name}",
                    mode=stat.S_IMODE(status.st_mode),
                    uid=status.st_uid,
                    group=_group_name(status.st_gid),
                    linked=(directory / "char" / number).exists(),
                )
            )
    return tuple(found)


# --- disk and state --------------------------------------------------------------------------------------------------


def _disk(path: Path) -> Disk:
    answer = within(DISK_SECONDS, Disk, lambda: _ask_disk(path))
    return answer or Disk(path=str(path), problem=f"no answer in {DISK_SECONDS:.0f} s: is its file server there?")


def _ask_disk(path: Path) -> Disk:
    """The disk on which a path lies or would lie: that of the nearest directory that can be reached."""
    for place in (path, *path.parents):
        try:
            found = os.statvfs(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            # Behind a closed directory another disk may be mounted: its parent's would be a guess.
            mounted = next((m for m in reversed(mounts_kernel.mount_table()) if m.point == str(path)), None)
            if mounted is not None or place == path.parents[-1]:
                return Disk(path=str(path), problem="this account may not look there")
            continue
        except OSError as error:
            return Disk(path=str(path), problem=error.strerror or str(error))
        # A file system without a number of inodes (btrfs) tells 0 of both.
        inodes = found.f_favail if found.f_files else None
        return Disk(
            path=str(path),
            kind=_kind_of(place),
            free=found.f_bavail * found.f_frsize,
            total=found.f_blocks * found.f_frsize,
            inodes=inodes,
        )
    return Disk(path=str(path), problem="this account may not look there")


def _kind_of(place: Path) -> str:
    """The name of the file system that a directory lies on, by the mount that covers it."""
    real = os.path.realpath(place)
    covering = [mount for mount in mounts_kernel.mount_table() if mounts_kernel.below(real, (mount.point,))]
    return max(covering, key=lambda mount: len(mount.point), default=None).kind if covering else ""  # type: ignore[union-attr]


def _state(path: Path) -> StateFacts:
    disk = _disk(path)
    facts = within(LEDGER_SECONDS, StateFacts, lambda: _ask_state(path, disk))
    return facts or StateFacts(
        path=str(path),
        disk=disk,
        sqlite=sqlite3.sqlite_version,
        ledger="unknown",
        problem=f"no answer in {LEDGER_SECONDS:.0f} s",
    )


def _ask_state(path: Path, disk: Disk) -> StateFacts:
    mode = uid = None
    unclean = False
    try:
        status = path.stat()
        mode, uid = stat.S_IMODE(status.st_mode), status.st_uid
        unclean = _unclean(path)
        ledger, problem = ledgercheck.check(path / "state.sqlite")
    except FileNotFoundError:
        ledger, problem = "absent", ""
    except PermissionError:
        ledger, problem = "unknown", "this account may not read it"
    except (OSError, sqlite3.Error) as error:
        ledger, problem = "unknown", str(error)
    return StateFacts(
        path=str(path),
        disk=disk,
        sqlite=sqlite3.sqlite_version,
        mode=mode,
        uid=uid,
        ledger=ledger,
        problem=problem,
        unclean=unclean,
    )


def _unclean(path: Path) -> bool:
    """Whether the record of the last server here says neither that it was stopped nor that it runs."""
    try:
        record = json.loads(head_of(path / "server.json"))
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict) or record.get("clean") is not False or record.get("boot") != enginelock.boot_id():
        return False
    pid = record.get("pid")
    return not (isinstance(pid, int) and Path(f"/proc/{pid}").exists())


# --- who may do what -------------------------------------------------------------------------------------------------


def _access(environ: Mapping[str, str]) -> AccessFacts:
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid {uid}"
    path = default_host(environ).removeprefix("unix://")
    mode: int | None = None
    group = ""
    members: tuple[str, ...] = ()
    with contextlib.suppress(OSError, ValueError):
        status = Path(path).stat()
        if stat.S_ISSOCK(status.st_mode):
            mode = stat.S_IMODE(status.st_mode)
            if mode & 0o020 and status.st_gid != 0:
                group, members = _group_name(status.st_gid), _members(status.st_gid)
    try:
        users: tuple[str, ...] | None = _members(grp.getgrnam(places.GROUP).gr_gid)
    except KeyError:
        users = None
    groups = tuple(sorted({_group_name(gid) for gid in (os.getegid(), *os.getgroups())}))
    return AccessFacts(
        uid=uid,
        name=name,
        groups=groups,
        docker_socket=path,
        docker_mode=mode,
        docker_group=group,
        docker_members=members,
        members=users,
    )


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _members(gid: int) -> tuple[str, ...]:
    """The accounts that a group lists, and those of the local file whose own group it is."""
    try:
        listed = set(grp.getgrgid(gid).gr_mem)
    except KeyError:
        listed = set()
    with contextlib.suppress(OSError):  # not pwd.getpwall: with a directory service that asks for everybody
        for line in Path("/etc/passwd").read_text(errors="replace").splitlines():
            fields = line.split(":")
            if len(fields) > 3 and fields[3] == str(gid):
                listed.add(fields[0])
    return tuple(sorted(listed - {"root"}))


def _settings(path: Path) -> tuple[configuration.Settings, str]:
    """The settings of the system's server, or the defaults with the reason."""
    if not path.exists():
        return configuration.Settings(), ""
    try:
        return configuration.load(path), ""
    except GpujobsError as error:
        if not os.access(path, os.R_OK):
            return configuration.Settings(), ""  # they are not this account's to read
        told = "; ".join(f"{problem.path}: {problem.message}" for problem in error.problems)
        return configuration.Settings(), error.message + (f": {told}" if told else "")


def _server(environ: Mapping[str, str], sources: Sources, settings: str) -> ServerFacts:
    system = places.system_socket()
    installed = os.path.lexists(sources.settings) or os.path.lexists(system)
    try:
        if host := environ.get("GPUJOBS_HOST"):
            path = places.socket_of(host)
        else:
            path = system if installed else places.server_socket(environ)
        answer, pid, uid, mode = _knock(path)
    except InvalidInput as error:
        return ServerFacts(address=environ.get("GPUJOBS_HOST", ""), settings=error.message)
    return ServerFacts(
        address=f"unix://{path}", installed=installed, answer=answer, pid=pid, uid=uid, mode=mode, settings=settings
    )


def _knock(path: Path) -> tuple[str, int | None, int | None, int | None]:
    """Whether a server listens at a path; its pid and uid, and the socket's mode."""
    mode = None
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        with places.short_path(path) as name, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(SOCKET_SECONDS)
            connection.connect(name)
            peer = peer_of(connection)
    except PermissionError:
        return "forbidden", None, None, mode
    except (TimeoutError, BlockingIOError):
        return "silent", None, None, mode
    except OSError:
        return "no", None, None, mode
    return "yes", peer.pid, peer.uid, mode


# --- ourselves -------------------------------------------------------------------------------------------------------


def _init() -> str:
    """Why the containers' init does not run; empty where it does."""
    try:
        path = init.binary()
    except FileNotFoundError as error:
        return str(error)
    text, problem = output_of([str(path), "--version"], {}, PROGRAM_SECONDS)
    if text.startswith("gpujobs-init "):
        return ""
    return f"the container init {path} does not run: {problem or f'it says {text.strip()[:60]!r}'}"


def _missing_calls() -> tuple[str, ...]:
    """The system calls that the pins of a root server need and this kernel, or a sandbox, does not have.

    Each is made with a descriptor that cannot be: what answers anything but "no such call" is there.
    """
    if os.uname().machine not in mounts_kernel.MACHINES:
        return ()
    return tuple(name for name, number in _CALLS if _is_missing(number))


def _is_missing(number: int) -> bool:
    nothing = (ctypes.c_uint64 * 4)()
    size = struct.calcsize("4Q")
    arguments: dict[int, tuple[int | bytes | ctypes.Array[ctypes.c_uint64], ...]] = {
        mounts_kernel.OPEN_TREE: (-1, b"", mounts_kernel.AT_EMPTY_PATH),
        mounts_kernel.MOVE_MOUNT: (-1, b"", -1, b"", mounts_kernel.MOVE_MOUNT_F_EMPTY_PATH),
        mounts_kernel.OPENAT2: (-1, b"nothing", nothing, 24),
        mounts_kernel.MOUNT_SETATTR: (-1, b"", mounts_kernel.AT_EMPTY_PATH, nothing, size),
    }
    try:
        mounts_kernel.syscall(number, *arguments[number])
    except OSError as error:
        return error.errno == errno.ENOSYS
    return False
