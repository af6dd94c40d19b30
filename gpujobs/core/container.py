"""What the Engine is asked for: a specification, an owner and an allocation become one create request.

Everything that the request may hold is written down here; nothing of a job file is passed through unread. The
rules behind each line, and the attacks that they stop, are in docs/security.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpujobs.core import secrets
from gpujobs.core.errors import Refused
from gpujobs.core.inventory import Gpu
from gpujobs.core.job import Allocation, JobId, Owner
from gpujobs.core.rules import capability_mask
from gpujobs.core.spec import Healthcheck, JobSpec, Port

CONTROL = "/.gpujobs"
"""How the path begins at which a container sees its control directory: see :func:`control_path`."""

INIT_REFUSED = 125
"""The init's exit code when who it runs as is not who it was told to be."""

PIDS_LIMIT = 16384
"""Processes and threads of one container. A data loader has tens, a hub's client hundreds; a fork bomb stops here."""

MINIMUM_SHM = 64 * 2**20

DRIVER_CAPABILITIES = "compute,utility"
"""What a job gets of NVIDIA's driver that does not ask for more."""

_IDENTITY = ("SETGID", "SETPCAP", "SETUID")
"""What the init needs to become the owner and keep a capability; it has given them up before any program runs."""

Json = dict[str, Any]

CONTROL_FILE_MAX = 1 << 20
"""Bytes that the init reads of its control file."""

_IMAGE_DROPPED = re.compile(r"NVIDIA_.*|CUDA_MPS_.*|LD_.*|GLIBC_TUNABLES|GCONV_PATH|GPUJOBS_.*", re.ASCII)
"""Variables of an image that nothing sees: they speak to the runtime or to the loader of the image's maker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image as the Engine has it.

    Attributes:
        id: ``sha256:…`` of its configuration: what containers are created from, whatever its tag comes to mean.
        digest: The registry's digest, where it was pulled.
        environment: ``NAME=value`` entries of its own.
    """

    id: str
    reference: str
    digest: str | None = None
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One bind of the container: a host path that was pinned or is ours."""

    source: str
    target: str
    read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """All that a container is made of.

    Attributes:
        server: The server's id, part of every name and label.
        nonce: A secret of the ledger: what tells our container from one with forged labels.
        runtime: The OCI runtime for jobs with GPUs.
        control: The host directory that is mounted at :func:`control_path`.
        home: The container's HOME.
        log: The Engine's LogConfig.
        visible: What NVIDIA_VISIBLE_DEVICES is set to; ``void`` for none.
        defaults: Environment that the server gives every job; the job file's wins.
        network: The Engine's network for jobs, on which containers do not reach each other.
        near: The CPUs it is bound to, those near its GPUs; empty for all.
        ceilings: Hard resource limits that the Engine cannot raise; the defaults stay below them.
    """

    server: str
    job: JobId
    attempt: int
    nonce: str
    owner: Owner
    spec: JobSpec
    allocation: Allocation
    image: Image
    control: str
    home: str
    runtime: str = "nvidia"
    visible: str = "void"
    mounts: tuple[Mount, ...] = ()
    tmpfs: Mapping[str, str] = field(default_factory=dict)
    timezone: str = ""
    log: Mapping[str, Any] = field(default_factory=dict)
    ceilings: Mapping[str, int] = field(default_factory=dict)
    near: tuple[int, ...] = ()
    defaults: tuple[tuple[str, str], ...] = ()
    network: str = "bridge"


def control_path(nonce: str) -> str:
    """Where the container of that nonce sees its control directory: the init, the gate, the control file.

    Nobody can know it before the container runs. An image could otherwise hold a symbolic link to it, through which
    a job file's own volume would be mounted over the init (seen with runc 1.1.5): the job's program would run
    instead of the init, with whatever groups the image's /etc/group gives it.
    """
    return f"{CONTROL}-{hashlib.sha256(f'control {nonce}'.encode()).hexdigest()[:16]}"


def init_command(control: str, mode: str) -> list[str]:
    """The init's own words before a program's: it is told where its control directory is."""
    return [f"{control}/init", "--dir", control, mode]


def home_of(owner: Owner) -> str:
    """The host directory, in the owner's home, that is HOME inside their jobs and outlives them."""
    return f"{owner.home}/.local/share/gpujobs/home"


def checkpoints(server: str, job: JobId) -> str:
    """Where a job's checkpoints go, below HOME: the same for all its attempts."""
    return f"checkpoints/{server}-{job}"


def container_name(server: str, job: JobId, attempt: int) -> str:
    """The one name that an attempt's container can have: creating it twice is answered with a conflict."""
    return f"gpujobs-{server}-{job}-{attempt}"


def argv_of(spec: JobSpec, image: Image) -> tuple[str, ...]:
    """What is run, by Compose's rules: an entry point of the file also drops the image's command.

    Raises:
        Refused: Neither the file nor the image says what to run.
    """
    entrypoint = image.entrypoint if spec.entrypoint is None else spec.entrypoint
    implied = image.command if spec.entrypoint is None else ()
    command = implied if spec.command is None else spec.command
    argv = (*entrypoint, *command)
    if not argv:
        raise Refused(
            f"the image {image.reference} has no command of its own", hint="Give one: `command: [python, train.py]`."
        )
    return argv


def own_environment(order: Order) -> dict[str, str]:
    """What the owner's account, the server's settings and the job file give a job; the later ones win."""
    owner = order.owner
    given = {"HOME": order.home, "USER": owner.name, "LOGNAME": owner.name}
    if order.timezone:
        given["TZ"] = order.timezone
    return {**given, **dict(order.defaults), **dict(order.spec.environment)}


def environment_of(order: Order) -> tuple[list[str], list[tuple[str, str]]]:
    """The container's environment as the Engine has it, and what the init adds to it for the program.

    The runtime's hooks run as root of the host with the environment that the Engine has (the mechanism of
    CVE-2025-23266). Libraries, shells, interpreters and a search for programs act on so many variables that none is
    left to an image or a job file: the Engine is given those of the server alone.

    Returns:
        Entries for the Engine: one without ``=`` takes the image's variable of that name away. And all others, which
        reach the program, its health checks and what is executed beside it, but no hook.
    """
    ours = {
        "GPUJOBS_JOB_ID": str(order.job),
        "GPUJOBS_ATTEMPT": str(order.attempt),
        "GPUJOBS_CHECKPOINT_DIR": f"{order.home}/{checkpoints(order.server, order.job)}",
        **({"GPUJOBS_ARRAY_INDEX": str(order.job.index)} if order.job.index is not None else {}),
        **({"GPUJOBS_GPU_MEMORY": str(order.spec.gpus.share)} if order.spec.gpus.share else {}),
        "NVIDIA_VISIBLE_DEVICES": order.visible,
        **({"NVIDIA_DRIVER_CAPABILITIES": ",".join(order.spec.driver_capabilities) or DRIVER_CAPABILITIES}
           if order.allocation.gpus else {}),
    }
    # A configuration that no builder has written may hold variables without a name: the Engine refuses to hear of them.
    of_the_image = {name: value for name, _, value in (e.partition("=") for e in order.image.environment) if name}
    kept = {name: value for name, value in of_the_image.items() if not _IMAGE_DROPPED.fullmatch(name)}
    dropped = sorted(name for name in of_the_image if name not in ours)
    inside = {**kept, **own_environment(order)}
    return [*dropped, *(f"{name}={value}" for name, value in ours.items())], list(inside.items())


def labels_of(order: Order) -> dict[str, str]:
    """Every label of ours, always all of them, so that none of an image passes for one."""
    return {
        **dict(order.spec.labels),
        "gpujobs.server": order.server,
        "gpujobs.job": str(order.job),
        "gpujobs.attempt": str(order.attempt),
        "gpujobs.owner": str(order.owner.uid),
        "gpujobs.gpus": ",".join(order.allocation.gpus),
        "gpujobs.nonce": order.nonce,
    }


def shm_size_of(order: Order) -> int:
    """Bytes of /dev/shm: as asked, else a quarter of the memory limit, never Docker's 64 MB by accident."""
    return order.spec.shm_size or max(MINIMUM_SHM, order.allocation.memory // 4)


def in_memory(owner: Owner, size: int | None = None) -> str:
    """The options of a file system in memory that is the owner's alone, of at most so many bytes."""
    return f"rw,nosuid,nodev,uid={owner.uid},gid={owner.gid},mode=0700" + (f",size={size}" if size else "")


def asked_in_memory(spec: JobSpec, owner: Owner) -> dict[str, str]:
    """The file's mounts in memory: targets and the Engine's options."""
    return {volume.target: in_memory(owner, volume.size) for volume in spec.volumes if volume.type == "tmpfs"}


def tmpfs_of(order: Order) -> dict[str, str]:
    """All file systems in memory, by their places: one for the secrets, which are to be in no layer, among them."""
    ours = {secrets.DIRECTORY: in_memory(order.owner, secrets.MEMORY) + ",noexec"} if order.spec.secrets else {}
    return {**order.tmpfs, **ours}


def runtime_of(order: Order) -> str:
    """The OCI runtime that a container is made with."""
    if order.spec.runtime is not None:
        return order.spec.runtime
    return order.runtime if order.allocation.gpus and order.visible != "void" else "runc"


def under_gvisor(spec: JobSpec) -> bool:
    """Whether a job's kernel is gVisor's: its init then waits for a file, as it may not open a FIFO of the host."""
    return spec.runtime == "runsc"


def runtime_hint(said: str) -> str:
    """What to do about what a runtime said when a container did not start; empty where nothing is known."""
    if "cannot run with network enabled in root network namespace" in said:  # seen with runsc of 2022 on Linux 6.18
        return (". This gVisor is older than the machine's kernel, and takes every network for the machine's own: the "
                "administrator can install a newer runsc, or register it with the option --network=none")  # fmt: skip
    return ""


def _added(spec: JobSpec) -> list[str]:
    """The capabilities that the init is given; the Engine's own spelling."""
    return sorted(f"CAP_{name}" for name in (*spec.cap_add, *_IDENTITY)) if spec.cap_add else []


def create_request(order: Order) -> Json:
    """The body of the Engine's create request.

    Raises:
        Refused: The image and the file together say nothing that could be run.
    """
    spec, owner, allocation = order.spec, order.owner, order.allocation
    control = control_path(order.nonce)
    environment, _ = environment_of(order)
    memory = allocation.memory
    host: Json = {
        "Runtime": runtime_of(order),
        "NetworkMode": order.network if spec.network_mode == "bridge" else spec.network_mode,
        "IpcMode": spec.ipc,
        "Privileged": False,
        "CapDrop": ["ALL"],
        "CapAdd": _added(spec),
        "SecurityOpt": ["no-new-privileges:true"],
        "GroupAdd": [str(gid) for gid in owner.groups if gid != owner.gid],
        "Devices": [],
        "DeviceRequests": [],
        "RestartPolicy": {"Name": "no"},
        "AutoRemove": False,
        "Init": False,
        "PidsLimit": PIDS_LIMIT,
        "Memory": memory,
        "MemorySwap": memory,
        "ShmSize": shm_size_of(order),
        "Ulimits": [{"Name": name, "Soft": soft, "Hard": hard} for name, soft, hard in ulimits_of(order)],
        "Mounts": [
            {"Type": "bind", "Source": m.source, "Target": m.target, "ReadOnly": m.read_only,
             "BindOptions": {"Propagation": "rprivate"}}
            for m in (Mount(source=order.control, target=control, read_only=True),
                      *(Mount(source=f"{order.control}/{name}", target=f"/etc/{name}", read_only=True)
                        for name in ("passwd", "group")),
                      *order.mounts)
        ],
        "Tmpfs": tmpfs_of(order),
        "LogConfig": dict(order.log),
    }  # fmt: skip
    if allocation.cpus:
        host["NanoCpus"] = round(allocation.cpus * 1e9)
    if order.near:
        host["CpusetCpus"] = ranges(order.near)
    request: Json = {
        "Image": order.image.id,
        "Entrypoint": init_command(control, "run"),
        "Cmd": list(argv_of(spec, order.image)),
        # A capability can be kept only by who has it first: the init, as root, before it becomes the owner.
        "User": "0:0" if spec.cap_add else f"{owner.uid}:{owner.gid}",
        "Env": environment,
        "WorkingDir": spec.working_dir or order.image.working_dir or "/",
        "Labels": labels_of(order),
        "Tty": False,
        "OpenStdin": False,
        "AttachStdin": False,
        "Healthcheck": _healthcheck(spec.healthcheck, control),
        "HostConfig": host,
    }
    if spec.stop_signal:
        request["StopSignal"] = spec.stop_signal
    if spec.ports:
        request["ExposedPorts"] = {f"{port.target}/{port.protocol}": {} for port in spec.ports}
        host["PortBindings"] = _bindings(spec.ports)
    request["Labels"]["gpujobs.config"] = config_hash(request)
    return request


def _healthcheck(check: Healthcheck | None, control: str) -> Json:
    """The job file's check, run through the init as the program is; an image's own is always off.

    An image's check runs as often as the image says: ``--interval=1ms`` keeps the Engine busy for nobody's good.
    """
    if check is None or not check.test:
        return {"Test": ["NONE"]}
    command = ["/bin/sh", "-c", *check.test] if check.shell else list(check.test)
    return {
        "Test": ["CMD", *init_command(control, "exec"), *command],
        "Interval": round(check.interval * 1e9),
        "Timeout": round(check.timeout * 1e9),
        "StartPeriod": round(check.start_period * 1e9),
        "Retries": check.retries,
    }


def _bindings(ports: Sequence[Port]) -> Json:
    bindings: dict[str, list[Json]] = {}
    for port in ports:
        published = "" if port.published is None else str(port.published)
        bindings.setdefault(f"{port.target}/{port.protocol}", []).append(
            {"HostIp": port.host_ip, "HostPort": published}
        )
    return bindings


def ranges(numbers: Sequence[int]) -> str:
    """CPU numbers as the kernel lists them: ``0-3,8``."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def cpus_near(gpus: Sequence[Gpu], cpus: float, host_cpus: int) -> tuple[int, ...]:
    """The CPUs near the allocated GPUs, where they are known, exist, and are enough for what was asked."""
    near = sorted({cpu for gpu in gpus for cpu in gpu.cpus if cpu < host_cpus})
    if not near or len(near) >= host_cpus or any(not gpu.cpus for gpu in gpus) or len(near) < cpus:
        return ()
    return tuple(near)


def ulimits_of(order: Order) -> list[tuple[str, int, int]]:
    """Resource limits as (name, soft, hard), -1 for none: the job file's over what deep learning needs."""
    defaults = {
        "memlock": -1,  # pinned host memory for transfers
        "stack": 64 * 2**20,
        "core": 0,  # a core file of a training process is as large as its memory
    }
    wanted = {name: (value, value) for name, value in defaults.items()}
    wanted.update({limit.name: (limit.soft, limit.hard) for limit in order.spec.ulimits})
    limits = {
        name: (_below(soft, order.ceilings.get(name)), _below(hard, order.ceilings.get(name)))
        for name, (soft, hard) in wanted.items()
    }
    return [(name, soft, hard) for name, (soft, hard) in sorted(limits.items())]


def _below(value: int, ceiling: int | None) -> int:
    """A resource limit, or the most that the Engine can give; -1 is no limit."""
    return value if ceiling is None or 0 <= value <= ceiling else ceiling


def config_hash(request: Mapping[str, Any]) -> str:
    """A digest of all that a request says, but for this label: what adopting a container compares."""
    labels = {k: v for k, v in request["Labels"].items() if k != "gpujobs.config"}
    text = json.dumps({**request, "Labels": labels}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def control_file(order: Order) -> bytes:
    """What the init reads: who it must be, and what it adds to the environment.

    Raises:
        Refused: The environment is larger than it can be.
    """
    _, inside = environment_of(order)
    owner = order.owner
    records = [
        f"uid={owner.uid}",
        f"gid={owner.gid}",
        "groups=" + ",".join(str(gid) for gid in sorted(set(owner.groups))),
        f"caps={capability_mask(order.spec.cap_add):x}",
        *([f"keep={capability_mask(order.spec.cap_add):x}"] if order.spec.cap_add else []),
        *(["filegate=1"] if under_gvisor(order.spec) else []),
        *(["secrets=1"] if order.spec.secrets else []),
        *(f"env={name}={value}" for name, value in inside),
    ]
    content = b"".join(record.encode("utf-8", "surrogateescape") + b"\0" for record in records)
    if len(content) > CONTROL_FILE_MAX:
        raise Refused(f"the job's environment has {len(content):,} bytes; at most {CONTROL_FILE_MAX:,} are possible",
                      hint="Put large values into files.")  # fmt: skip
    return content


def passwd_file(owner: Owner, home: str) -> bytes:
    """A passwd file that knows root, nobody and the owner: a uid without a name breaks PyTorch's getpass."""
    return (
        "root:x:0:0:root:/root:/sbin/nologin\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n"
        f"{owner.name}:x:{owner.uid}:{owner.gid}:{owner.name}:{home}:/bin/sh\n"
    ).encode()


def group_file(owner: Owner, names: Sequence[tuple[int, str]]) -> bytes:
    """A group file that names the owner's groups and no other."""
    lines = ["root:x:0:", "nogroup:x:65534:"]
    lines += [f"{name}:x:{gid}:{owner.name}" for gid, name in names if gid not in (0, 65534)]
    return ("\n".join(lines) + "\n").encode()


def differences(order: Order, inspected: Mapping[str, Any]) -> list[str]:
    """How a created container differs from what was asked for, in what decides about GPUs and privilege.

    Args:
        order: What was asked for.
        inspected: The Engine's answer to inspect.
    """
    config, host = inspected["Config"], inspected["HostConfig"]
    wanted = create_request(order)
    variables = [e for e in config.get("Env") or [] if e.startswith("NVIDIA_VISIBLE_DEVICES=")]
    checks: tuple[tuple[str, Any, Any], ...] = (
        ("NVIDIA_VISIBLE_DEVICES", variables, [f"NVIDIA_VISIBLE_DEVICES={order.visible}"]),
        ("runtime", host.get("Runtime"), wanted["HostConfig"]["Runtime"]),
        ("devices", host.get("Devices") or [], []),
        ("device requests", host.get("DeviceRequests") or [], []),
        ("privileged", bool(host.get("Privileged")), False),
        ("user", config.get("User"), wanted["User"]),
        ("added capabilities", sorted(host.get("CapAdd") or []), wanted["HostConfig"]["CapAdd"]),
        ("IPC mode", host.get("IpcMode"), wanted["HostConfig"]["IpcMode"]),
        ("network mode", host.get("NetworkMode"), wanted["HostConfig"]["NetworkMode"]),
        ("file systems in memory", host.get("Tmpfs") or {}, wanted["HostConfig"]["Tmpfs"]),
        ("entry point", config.get("Entrypoint"), wanted["Entrypoint"]),
    )
    return [f"{what} is {found!r}, {asked!r} was asked for" for what, found, asked in checks if found != asked]
