"""Facts of a machine, as :mod:`gpujobs.service.doctor` gathers them and :mod:`gpujobs.core.checkup` judges them.

A fact that could not be had is None or empty, with the reason beside it where there is one: that is a gap, told as
such, and never taken for a fault.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpujobs.core.toolkit import ToolkitConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What the Engine says of itself.

    Attributes:
        runtimes: Its OCI runtimes: (name, program).
        cgroup: 1 or 2; ``driver``: cgroupfs or systemd.
        lacks: Limits that its kernel does not enforce, such as ``memory``.
        authorization: Its authorization plugins.
        runc: The version of its runc; empty where it does not tell.
    """

    host: str
    version: str
    api: str
    runtimes: tuple[tuple[str, str], ...]
    default_runtime: str = "runc"
    runc: str = ""
    cgroup: int = 2
    driver: str = ""
    root: str = ""
    rootless: bool = False
    user_namespaces: bool = False
    seccomp: bool = True
    authorization: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """An installed program.

    Attributes:
        version: As it tells it; empty where it does not.
        origin: Whose it is or where it lies, for the sentences.
        mended: CVE numbers that its distribution's changelog names.
        problem: Why there is no version.
    """

    name: str
    version: str = ""
    origin: str = ""
    mended: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """A config.toml.

    Attributes:
        config: What it says; without it, ``unreadable`` says why this account cannot read it, or ``broken`` why
            nobody can.
        specifications: The CDI files that describe NVIDIA's GPUs.
    """

    path: str
    config: ToolkitConfig | None = None
    unreadable: str = ""
    broken: str = ""
    specifications: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlFacts:
    """What NVML says.

    Attributes:
        code: The error of its start; 0 without one, None where it gave no answer in time.
        library: The version in the library's file name; empty where not known.
        lost: The indexes of GPUs that do not answer.
    """

    code: int | None = 0
    problem: str = ""
    driver: str = ""
    cuda: str = ""
    library: str = ""
    gpus: int = 0
    lost: tuple[int, ...] = ()
    minors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A device node.

    Attributes:
        mode: Its permission bits.
        linked: Whether /dev/char has a link to it.
    """

    path: str
    mode: int
    uid: int
    group: str
    linked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A file system: its name, bytes and inodes free and in all; None with the reason in ``problem``."""

    path: str
    kind: str = ""
    free: int | None = None
    total: int | None = None
    inodes: int | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFacts:
    """The state directory and the ledger in it.

    Attributes:
        mode: Permission bits; None where the directory is not there.
        ledger: ``absent``, ``ok``, ``damaged``, ``newer``, or ``unknown`` with the reason in ``problem``.
        unclean: Whether a server ended here without being stopped, since the boot, and none runs.
    """

    path: str
    disk: Disk
    sqlite: str
    mode: int | None = None
    uid: int | None = None
    ledger: str = "absent"
    problem: str = ""
    unclean: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessFacts:
    """Who may do what.

    Attributes:
        groups: Of this process, by name.
        docker_group: The group of the Engine's socket, where it may write there; ``docker_members``: its accounts.
        members: Those of the group gpujobs; None where there is no such group.
    """

    uid: int
    name: str
    groups: tuple[str, ...] = ()
    docker_socket: str = ""
    docker_mode: int | None = None
    docker_group: str = ""
    docker_members: tuple[str, ...] = ()
    members: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """The server that this account would use.

    Attributes:
        installed: Whether the system's server is set up on this machine.
        answer: ``yes``, ``no``, ``forbidden``, ``silent`` (not in time).
        uid: Of the server that answers.
        settings: Why the settings cannot be used; empty where they can.
    """

    address: str
    installed: bool = False
    answer: str = "no"
    pid: int | None = None
    uid: int | None = None
    mode: int | None = None
    settings: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that was looked at.

    Attributes:
        engine: None where it cannot be asked; then ``engine_problem`` and ``engine_hint`` say why.
        runtime: The name of the runtime for GPUs, by the settings.
        programs: The toolkit and runc as found on the PATH.
        kernel_module: The version of the loaded kernel module; empty without one.
        missing_calls: System calls that this kernel does not have and a server of root needs.
        init: Why the containers' init does not run; empty where it does.
    """

    access: AccessFacts
    server: ServerFacts
    state: StateFacts
    nvml: NvmlFacts
    engine: EngineFacts | None = None
    engine_problem: str = ""
    engine_hint: str = ""
    engine_disk: Disk | None = None
    runtime: str = "nvidia"
    programs: tuple[Program, ...] = ()
    toolkit_config: ConfigFile | None = None
    kernel_module: str = ""
    nodes: tuple[Node, ...] = ()
    release: str = ""
    missing_calls: tuple[str, ...] = ()
    init: str = ""
