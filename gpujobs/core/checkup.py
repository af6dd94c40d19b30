"""The check of a machine: facts in, findings out, each with what to do."""

from __future__ import annotations

from collections.abc import Iterator

from gpujobs.core import holes, toolkit
from gpujobs.core.facts import AccessFacts, Disk, Facts, Program, ServerFacts, StateFacts
from gpujobs.core.finding import WORST_FIRST, Finding, Level

AREAS = (
    "engine",
    "runtime",
    "toolkit",
    "runc",
    "driver",
    "devices",
    "cgroup",
    "disk",
    "state",
    "access",
    "server",
    "init",
    "kernel",
)
"""In the order in which findings are shown."""

GIB = 2**30
STATE_FREE = (1 * GIB, 5 * GIB)
"""Free bytes of the state's disk below which there is an error, and a warning: logs and the ledger grow there."""
ENGINE_FREE = (2 * GIB, 20 * GIB)
"""Likewise for the Engine's disk: one image for training takes 5 to 20 GB."""
INODES_FREE = 10_000

NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "gpfs", "beegfs", "ceph", "afs", "glusterfs")
"""How the names of file systems begin on which SQLite's write-ahead log does not work."""

SQLITE_STRICT = (3, 37, 0, holes.RELEASED)
"""The ledger's tables are STRICT, which SQLite knows from 3.37.0 on (its release notes)."""

LIB_RM_VERSION_MISMATCH = 18
LIBRARY_NOT_FOUND = 12
"""NVML's error codes (nvml.h)."""

NVIDIA_PROGRAMS = ("nvidia-container-runtime", "nvidia-container-runtime.cdi", "nvidia-container-runtime.legacy")


def findings(facts: Facts) -> tuple[Finding, ...]:
    """Everything that there is to say: area by area, in each the worst first."""
    found = [
        *_engine(facts),
        *_runtime(facts),
        *_toolkit(facts),
        *_runc(facts),
        *_driver(facts),
        *_devices(facts),
        *_cgroup(facts),
        *_disks(facts),
        *_state(facts),
        *_access(facts),
        *_server(facts),
        *_init(facts),
        *_kernel(facts),
    ]
    return tuple(sorted(found, key=lambda finding: (AREAS.index(finding.area), WORST_FIRST.index(finding.level))))


def is_served(facts: Facts) -> bool:
    """Whether a server of root answers this account, which then needs no Engine of its own: as it should be."""
    return facts.access.uid != 0 and facts.server.answer == "yes" and facts.server.uid == 0


def _unseen(area: str, why: str, facts: Facts) -> Finding:
    return Finding(area, Level.OK if is_served(facts) else Level.WARNING, f"not looked at: {why}")


def _ok(area: str, message: str, hint: str = "") -> Finding:
    return Finding(area, Level.OK, message, hint)


def _warning(area: str, message: str, hint: str = "") -> Finding:
    return Finding(area, Level.WARNING, message, hint)


def _error(area: str, message: str, hint: str = "") -> Finding:
    return Finding(area, Level.ERROR, message, hint)


# --- the Engine and what runs containers -----------------------------------------------------------------------------


def _engine(facts: Facts) -> Iterator[Finding]:
    engine = facts.engine
    if engine is None:
        if is_served(facts):
            yield _ok("engine", "it is not asked: this account uses the system's server and needs no access to Docker")
        else:
            yield _error("engine", facts.engine_problem, facts.engine_hint)
        return
    yield _ok("engine", f"Docker Engine {engine.version} (API {engine.api}) answers at {engine.host}")
    program = next((item for item in facts.programs if item.name == "dockerd"), Program(name="dockerd"))
    yield from _holes(
        "engine",
        f"the Docker Engine {engine.version}",
        holes.ENGINE,
        engine.version,
        program.mended,
        "Update Docker to",
        authorization=bool(engine.authorization),
    )
    if engine.host.startswith("tcp://"):
        yield _warning(
            "engine",
            f"the Engine is reached over the network ({engine.host}): who can reach that is root",
            "Use the Engine's unix socket.",
        )
    if engine.rootless and facts.access.uid == 0:
        yield _warning(
            "engine",
            "the Engine runs without root: it can neither limit nor mount for other accounts",
            "A server for several accounts needs an Engine that runs as root.",
        )
    if engine.user_namespaces:
        yield _warning(
            "engine",
            "the Engine shifts uids (userns-remap): jobs would not be the owners of their own files",
            "Remove userns-remap from /etc/docker/daemon.json; jobs run as their owners without it.",
        )
    if not engine.seccomp:
        yield _warning(
            "engine",
            "the Engine filters no system calls (no seccomp profile)",
            "Remove `seccomp-profile: unconfined` from /etc/docker/daemon.json.",
        )
    for limit in engine.lacks:
        yield _warning(
            "engine",
            f"this kernel does not enforce limits of {limit}: jobs can take more than they ask for",
            f"Enable the cgroup controller for {limit} at boot.",
        )


def _runtime(facts: Facts) -> Iterator[Finding]:
    engine = facts.engine
    if engine is None:
        yield _unseen("runtime", "only the Engine knows its runtimes", facts)
        return
    known = dict(engine.runtimes)
    if facts.runtime not in known:
        yield _error(
            "runtime",
            f"the Engine has no runtime {facts.runtime!r}: no job with GPUs can start",
            "Install the NVIDIA Container Toolkit, then `nvidia-ctk runtime configure --runtime=docker` and"
            " `systemctl restart docker`.",
        )
        return
    path = known[facts.runtime]
    if path and path.rpartition("/")[2] not in NVIDIA_PROGRAMS:
        yield _warning(
            "runtime",
            f"the runtime {facts.runtime!r} is {path}, not NVIDIA's: what it grants is its own affair",
            "Nothing, where that is meant; its configuration is not looked at here.",
        )
    else:
        yield _ok("runtime", f"the Engine's runtime {facts.runtime!r} is {path or 'registered'}")
    if engine.default_runtime == facts.runtime:
        yield _warning(
            "runtime",
            f"{facts.runtime!r} is the Engine's default runtime: hand-made containers of CUDA images get all GPUs",
            "Remove `default-runtime` from /etc/docker/daemon.json; jobs name the runtime themselves.",
        )


def _toolkit(facts: Facts) -> Iterator[Finding]:
    programs = [program for program in facts.programs if program.name == "toolkit"]
    version = next((program.version for program in programs if program.version), "")
    for program in programs:
        yield from _program(
            "toolkit",
            "NVIDIA Container Toolkit",
            program,
            holes.TOOLKIT,
            "Update the packages nvidia-container-toolkit and libnvidia-container1 to",
        )
    if not programs:
        yield _warning(
            "toolkit",
            "its version is not known: neither nvidia-ctk nor nvidia-container-runtime is on the PATH",
            "Install the package nvidia-container-toolkit, 1.17.8 or newer.",
        )
    file = facts.toolkit_config
    if file is None:
        if programs:
            yield _ok("toolkit", "it has no configuration file: NVIDIA's defaults hold")
    elif file.broken:
        yield toolkit.broken(file.path, file.broken)
    elif file.config is None:
        yield _warning(
            "toolkit", f"{file.path} {file.unreadable}", "Run `gpujobs doctor` as root to have it looked at."
        )
    else:
        rootless = facts.engine is not None and facts.engine.rootless
        found = list(toolkit.findings(file.path, file.config, version, file.specifications, rootless=rootless))
        yield from found
        if not found:
            yield _ok("toolkit", f"{file.path} keeps no GPU from a job (mode {file.config.mode})")


def _runc(facts: Facts) -> Iterator[Finding]:
    programs = [program for program in facts.programs if program.name == "runc"]
    for program in programs:
        yield from _program(
            "runc", "runc", program, holes.RUNC, "Update runc (with Docker's packages: containerd.io) to"
        )
    if not programs:
        yield _warning("runc", "its version is not known: the Engine does not tell it and it is not on the PATH")


def _program(area: str, title: str, program: Program, known: tuple[holes.Hole, ...], update: str) -> Iterator[Finding]:
    where = f" ({program.origin})" if program.origin else ""
    if not program.version or holes.version_of(program.version) is None:
        said = program.problem or f"it says {program.version[:60]!r}"
        yield _warning(area, f"{title}{where}: its version is not known: {said}")
        return
    bad = tuple(_holes(area, f"{title} {program.version}{where}", known, program.version, program.mended, update))
    yield from bad
    if not bad:
        mended = ""
        if any(hole.cve in program.mended for hole in holes.holes(known, program.version)):
            mended = "; what its number alone would leave open, its distribution has mended"
        yield _ok(area, f"{title} {program.version}{where} has no hole that is known here{mended}")


def _holes(
    area: str,
    title: str,
    known: tuple[holes.Hole, ...],
    version: str,
    mended: tuple[str, ...],
    update: str,
    *,
    authorization: bool = False,
) -> Iterator[Finding]:
    """One finding for the errors among the holes of a version, one for the rest."""
    bad = holes.holes(known, version, mended, authorization=authorization)
    for level in WORST_FIRST:
        group = [hole for hole in bad if hole.level is level]
        if not group:
            continue
        told = ", ".join(f"{hole.cve} ({hole.gives})" for hole in group)
        fixed = max((hole.fixed for hole in group), key=lambda lines: holes.version_of(lines[-1]) or (0, 0, 0, 0))
        hint = f"{update} {', '.join(fixed)} or newer."
        if holes.is_packaged(version):
            hint += " Your distribution may mend them under the same number; its changelog here does not name them."
        yield Finding(area, level, f"{title} has known holes: {told}", hint)


# --- GPUs ------------------------------------------------------------------------------------------------------------


def _driver(facts: Facts) -> Iterator[Finding]:
    nvml, module = facts.nvml, facts.kernel_module
    mismatch = nvml.code == LIB_RM_VERSION_MISMATCH or (module and nvml.library and module != nvml.library)
    if mismatch:
        versions = f"kernel module {module or '?'}, library {nvml.library or '?'}"
        yield _error(
            "driver",
            f"the NVIDIA driver's halves differ in version, as after an update ({versions}): no GPU can be used",
            "Reboot; or stop what uses the GPUs, then"
            " `rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia && modprobe nvidia`.",
        )
    elif nvml.code is None:
        yield _error(
            "driver",
            nvml.problem or "NVML gave no answer in time",
            "Look at `dmesg` for NVRM and Xid lines; a GPU that hangs needs a reset or a reboot.",
        )
    elif nvml.code == LIBRARY_NOT_FOUND and not module:
        yield _error(
            "driver",
            "there is no NVIDIA driver: libnvidia-ml.so.1 was not found, and no kernel module is loaded",
            "Install the NVIDIA driver; without GPUs, try `gpujobs serve --simulate FILE`.",
        )
    elif nvml.problem:
        yield _error(
            "driver",
            f"NVML does not work: {nvml.problem}",
            "Install the driver's library (libnvidia-ml1) in the module's version."
            if nvml.code == LIBRARY_NOT_FOUND
            else "Look at `nvidia-smi` and `dmesg`.",
        )
    elif not nvml.gpus:
        yield _error("driver", f"the NVIDIA driver {nvml.driver} sees no GPU", "Look at `lspci -d 10de:` and `dmesg`.")
    else:
        cuda = f", up to CUDA {nvml.cuda}" if nvml.cuda else ""
        yield _ok(
            "driver", f"NVML answers: driver {nvml.driver or 'of unknown version'}{cuda}, {_count(nvml.gpus, 'GPU')}"
        )
    if nvml.lost:
        yield _error(
            "driver",
            f"GPU {', '.join(map(str, nvml.lost))} does not answer (fell off the bus?)",
            "Look at `dmesg` for Xid 79; reset it (`nvidia-smi --gpu-reset`) or reboot.",
        )


def _devices(facts: Facts) -> Iterator[Finding]:
    if not facts.nvml.gpus:
        return
    by_path = {node.path: node for node in facts.nodes}
    wanted = ["/dev/nvidiactl", *(f"/dev/nvidia{minor}" for minor in facts.nvml.minors)]
    if missing := [path for path in wanted if path not in by_path]:
        yield _error(
            "devices",
            f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing: such GPUs cannot be given",
            "Make the nodes: `nvidia-modprobe -c 0` (for each minor), or enable nvidia-persistenced.",
        )
    if "/dev/nvidia-uvm" not in by_path:
        yield _warning(
            "devices",
            "/dev/nvidia-uvm is missing: CUDA programs fail to start until it is there",
            "Load the module at boot: `nvidia-modprobe -u -c 0`, or enable nvidia-persistenced.",
        )
    present = [by_path[path] for path in wanted if path in by_path]
    if not present:
        return
    if any(node.mode & 0o006 for node in present):
        yield _warning(
            "devices",
            f"the GPUs' nodes let every account in (mode {present[0].mode:04o}): the queue binds jobs only",
            "Keep logins off them by systemd's device policy: configs/shells/gpujobs-shells.conf; containers do not"
            " notice. (A policy for logins leaves the nodes' mode as it is, and this warning with it.)",
        )
        return
    groups = sorted({node.group for node in present})
    access = facts.access
    if access.uid != 0 and not any(node.uid == access.uid for node in present) and not set(groups) & set(access.groups):
        yield _error(
            "devices",
            f"{access.name} may not open the GPUs: only root and the group {' or '.join(groups)} may",
            f"Ask for the group: `usermod -aG {groups[0]} {access.name}`, then log in again.",
        )
    else:
        yield _ok("devices", f"only root and the group {' or '.join(groups)} may open the GPUs, in jobs too")


def _cgroup(facts: Facts) -> Iterator[Finding]:
    engine = facts.engine
    if engine is None:
        yield _unseen("cgroup", "only the Engine knows its cgroup driver", facts)
        return
    told = f"cgroup version {engine.cgroup}, driver {engine.driver or 'not known'}"
    if engine.driver != "systemd":
        yield _ok("cgroup", told)
        return
    linked = [node for node in facts.nodes if node.linked]
    if facts.nodes and len(linked) == len(facts.nodes):
        yield _ok("cgroup", f"{told}; the links in /dev/char keep GPUs through `systemctl daemon-reload`")
        return
    # NVIDIA's notice "Containers losing access to GPUs", nvidia-docker issue 1730, names both remedies.
    yield _warning(
        "cgroup",
        f"{told}: `systemctl daemon-reload` takes the GPUs from running jobs (NVML: Unknown Error)",
        'Set "exec-opts": ["native.cgroupdriver=cgroupfs"] in /etc/docker/daemon.json, or at each boot run'
        " `nvidia-ctk system create-dev-char-symlinks --create-all`.",
    )


# --- disk, state, permissions ----------------------------------------------------------------------------------------


def _disks(facts: Facts) -> Iterator[Finding]:
    yield from _disk("the state", facts.state.disk, STATE_FREE, "Free some space, or move the state (GPUJOBS_STATE).")
    if facts.engine_disk is not None:
        yield from _disk(
            "the Engine's data",
            facts.engine_disk,
            ENGINE_FREE,
            "Remove what nobody needs: `docker system df`, then `docker image prune`.",
        )


def _disk(what: str, disk: Disk, limits: tuple[int, int], hint: str) -> Iterator[Finding]:
    if disk.free is None:
        yield _warning("disk", f"{what} ({disk.path}): not looked at: {disk.problem}")
        return
    of = f" of {_size(disk.total)}" if disk.total else ""
    told = f"{what} ({disk.path}): {_size(disk.free)}{of} free"
    error, warning = limits
    level = Level.ERROR if disk.free < error else Level.WARNING if disk.free < warning else Level.OK
    yield Finding("disk", level, told, "" if level is Level.OK else hint)
    if disk.inodes is not None and disk.inodes < INODES_FREE:
        yield _warning("disk", f"{what} ({disk.path}): only {disk.inodes} inodes free", "Remove many small files.")


def _state(facts: Facts) -> Iterator[Finding]:
    state = facts.state
    if any(state.disk.kind.startswith(kind) for kind in NETWORK_FILE_SYSTEMS):
        yield _error(
            "state",
            f"{state.path} lies on a network file system ({state.disk.kind}): the ledger is not safe there",
            "Set GPUJOBS_STATE to a directory on a local disk.",
        )
    number = holes.version_of(state.sqlite)
    if number is not None and number < SQLITE_STRICT:
        yield _error(
            "state", f"SQLite {state.sqlite} is too old: the ledger needs 3.37 or newer", "Use a newer Python."
        )
    if state.mode is not None and state.mode & 0o077:
        yield _error(
            "state",
            f"{state.path} is open to others (mode {state.mode:04o}): job files and logs are in there",
            f"`chmod 0700 {state.path}`",
        )
    if state.mode is not None and state.uid is not None and state.uid != facts.access.uid:
        yield _warning("state", f"{state.path} belongs to uid {state.uid}", "Run `gpujobs doctor` as that account.")
    if state.unclean:
        yield _warning(
            "state",
            "the last server here ended without being stopped (crash, kill)",
            f"Look at {state.path}/server.log, then start it: `gpujobs serve`.",
        )
    yield _ledger(state)


def _ledger(state: StateFacts) -> Finding:
    what = f"the ledger {state.path}/state.sqlite"
    if state.ledger == "damaged":
        return _error(
            "state",
            f"{what} is damaged: {state.problem}",
            "Stop the server, keep a copy, and restore a backup or `sqlite3 state.sqlite .recover`.",
        )
    if state.ledger == "newer":
        return _error("state", f"{what} was written by a newer gpujobs: {state.problem}", "Install that version.")
    if state.ledger == "unknown":
        return _warning("state", f"{what} was not looked at: {state.problem}")
    if state.ledger == "absent":
        return _ok("state", f"no ledger in {state.path} yet; SQLite {state.sqlite}")
    return _ok("state", f"{what} is whole; SQLite {state.sqlite}, {state.disk.kind or 'file system not known'}")


def _access(facts: Facts) -> Iterator[Finding]:
    access = facts.access
    if access.docker_mode is not None and access.docker_mode & 0o002:
        yield _error(
            "access",
            f"any account may write to {access.docker_socket}, and so is root",
            f"`chmod 0660 {access.docker_socket}`, and find out what opened it.",
        )
    if access.docker_members:
        yield _ok(
            "access",
            f"{_some(access.docker_members)} may use Docker directly (group {access.docker_group}): that is"
            " root, past the queue",
            "Keep in that group only those who are to be root; jobs need no Docker access.",
        )
    if access.uid == 0:
        yield from _group(access, facts.server)
    elif facts.engine is not None and not facts.engine.rootless:
        yield _ok("access", f"{access.name} may use Docker, and so is root's equal on this machine")
    if access.uid != 0 and facts.server.installed and access.members is not None and "gpujobs" not in access.groups:
        yield _error(
            "access",
            f"{access.name} is not in the group gpujobs, whose members may use the system's server",
            f"Ask for it: `usermod -aG gpujobs {access.name}`, then log in again.",
        )


def _group(access: AccessFacts, server: ServerFacts) -> Iterator[Finding]:
    if access.members is None:
        say = _warning if server.installed else _ok
        yield say(
            "access",
            "there is no group gpujobs: only root can use a server of root",
            "`groupadd --system gpujobs`, add the users, then restart the server.",
        )
    else:
        yield _ok(
            "access", f"{_count(len(access.members), 'account')} in the group gpujobs may use the system's server"
        )


def _server(facts: Facts) -> Iterator[Finding]:
    server, access = facts.server, facts.access
    if server.settings:
        yield _error("server", server.settings, "Mend the settings; the server does not start with these.")
    if server.answer == "yes":
        if server.uid not in {0, access.uid}:
            yield _error(
                "server",
                f"what answers at {server.address} runs as uid {server.uid}, neither root nor you",
                "Do not use it; ask the administrator.",
            )
        else:
            yield _ok("server", f"it runs (pid {server.pid}, uid {server.uid}) and answers at {server.address}")
        if server.mode is not None and server.mode & 0o006 and server.uid == 0:
            yield _error(
                "server",
                f"{server.address} is open to all accounts (mode {server.mode:04o})",
                "Restart the server, which sets it to 0660 for the group gpujobs.",
            )
    elif server.answer == "forbidden":
        yield _error(
            "server",
            f"{access.name} may not use the server at {server.address}",
            "Ask to be added to the group gpujobs.",
        )
    elif server.answer == "silent":
        yield _error(
            "server",
            f"the server at {server.address} takes no connection in time",
            "Look at its log; `systemctl restart gpujobs` leaves jobs running.",
        )
    elif server.installed:
        yield _error(
            "server",
            f"the system's server is set up and does not answer at {server.address}",
            "`systemctl status gpujobs`, then `systemctl start gpujobs`.",
        )
    else:
        yield _ok(
            "server",
            f"none runs at {server.address}; `gpujobs run` and `submit` start one where this account may use Docker",
        )


def _init(facts: Facts) -> Iterator[Finding]:
    if facts.init:
        yield _error("init", facts.init, "Install gpujobs again; building the init needs gcc and libc6-dev.")
    else:
        yield _ok("init", "the program that every container starts with runs here")


def _kernel(facts: Facts) -> Iterator[Finding]:
    release = f"Linux {facts.release}" if facts.release else "this kernel"
    if facts.missing_calls:
        say = _error if facts.access.uid == 0 else _warning
        yield say(
            "kernel",
            f"{release} lacks {', '.join(facts.missing_calls)}: a server of root cannot pin what jobs mount",
            "Use Linux 5.12 or newer (and no sandbox around the server that forbids these calls).",
        )
    else:
        yield _ok("kernel", f"{release} has what a server of root needs")


# --- words -----------------------------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: list[str] | tuple[str, ...], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / GIB:.1f} GiB" if count < 100 * GIB else f"{count // GIB} GiB"
