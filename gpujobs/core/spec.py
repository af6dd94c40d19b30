"""The one model of the job file: what a validated specification is.

Container keys carry Compose's names and meanings. All values are in normal form: sizes in bytes, durations in
seconds, paths absolute, environment as pairs. :mod:`gpujobs.specfile` makes these from YAML text.

Each field's annotation carries the reader of its form in the file and the JSON Schema of that form, so that
the same classes validate and describe the file.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from gpujobs.core import builds, forms, gpukeys, limits, mounts
from gpujobs.core.markers import Around, ContextForm, Form
from gpujobs.core.patterns import any_case, between
from gpujobs.core.secrets import DIRECTORY, SECRETS_SCHEMA, Secret, covers
from gpujobs.core.secrets import secrets as secrets_of
from gpujobs.core.values import (
    TEXT,
    Context,
    Fault,
    Json,
    boolean,
    choice,
    duration,
    duration_schema,
    integer,
    integer_schema,
    mapping,
    not_a,
    number,
    shown,
    size,
    size_schema,
    templated,
    typed,
    wrong,
)

STRICT: dict[str, object] = {"extra": "forbid"}
"""The validator's settings for every mapping: no key is ever ignored. (The readers see to the types.)"""

MEMORY_LEAST = 6 << 20
"""Bytes: the Engine refuses a memory limit below 6 MiB."""
SHM_LEAST = 64 << 10
"""Bytes: smaller is a unit forgotten."""
CPUS_MAX = 4096
CPUS_PATTERN = rf"^\s*\+?({between(1, CPUS_MAX)}(\.[0-9]*)?|0?\.(?!0*\s*$)[0-9]+|0x[0-9a-fA-F]+)\s*$"
GRACE_MAX = 86400
"""Seconds."""


def _hidden(hint: str) -> Form[object]:
    """The marker of a field that is no key of the file: :class:`Parsed` values alone get past."""

    def read(value: object) -> object:
        del value
        raise wrong(f"unknown key; {hint}", at_key=True)

    return Form(read, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRequest:
    """What a job asks of the GPUs.

    Attributes:
        count: The fewest GPUs (or MIG devices, or shares) it starts with; 0 means no GPU.
        max_count: The most it can use; equal to ``count`` unless a range was given.
        memory: The least memory of each, in bytes.
        model: Names or globs, any case; empty means any.
        capability: CUDA compute capability as (operator, (major, minor)), operator one of ``>= > == < <=``.
        link: ``any``, ``same-numa`` or ``nvlink``: what must connect all of them.
        mig: A MIG profile, such as ``3g.20gb``; None means whole GPUs.
        share: Bytes of one GPU's memory that are shared with others; None means the whole GPU.
        uuid: Exactly these GPUs (or MIG devices); empty means any.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    count: Annotated[
        int, Form(gpukeys.fewest, gpukeys.COUNT_SCHEMA, "How many GPUs: a number, or a range such as 1-4.")
    ] = 0
    max_count: Annotated[int, _hidden("write a range, such as count: 1-4")] = 0
    memory: Annotated[
        int | None,
        Form(
            gpukeys.gpu_memory,
            size_schema(gpukeys.GPU_MEMORY_LEAST, "40GB"),
            "The least memory of each, such as 40GB.",
        ),
    ] = None
    model: Annotated[
        tuple[str, ...],
        Form(gpukeys.models, gpukeys.MODEL_SCHEMA, "Names or globs, any case, such as A100 or [A100*, H100*]."),
    ] = ()
    capability: Annotated[
        tuple[str, tuple[int, int]] | None,
        Form(gpukeys.capability, gpukeys.CAPABILITY_SCHEMA, 'CUDA compute capability, such as ">=8.0".'),
    ] = None
    link: Annotated[
        str,
        Form(gpukeys.link, templated({"enum": list(gpukeys.LINKS)}), "What has to connect all of them."),
    ] = "any"
    mig: Annotated[str | None, Form(gpukeys.mig, gpukeys.MIG_SCHEMA, "A MIG profile, such as 3g.20gb.")] = None
    share: Annotated[
        int | None,
        Form(
            gpukeys.gpu_memory,
            size_schema(gpukeys.GPU_MEMORY_LEAST, "40GB"),
            "Part of one GPU's memory, such as 10GB.",
        ),
    ] = None
    uuid: Annotated[
        tuple[str, ...],
        ContextForm(gpukeys.uuids, gpukeys.UUID_SCHEMA, "Exactly these GPUs, as `gpujobs gpus` shows them."),
    ] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """One mount of the container.

    Attributes:
        type: ``bind``, ``volume`` or ``tmpfs``.
        source: The absolute host path of a bind, the name of a volume; empty for a tmpfs.
        target: The absolute path inside the container.
        size: Of a tmpfs, in bytes.
    """

    target: str
    source: str = ""
    type: str = "bind"
    read_only: bool = False
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One published port: ``host_ip:published`` on the host leads to ``target`` in the container."""

    target: int
    published: int | None = None
    host_ip: str = "127.0.0.1"
    protocol: str = "tcp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ulimit:
    """One resource limit; -1 means unlimited."""

    name: str
    soft: int
    hard: int


def _no_rules(value: Mapping[str, object]) -> list[Fault]:
    del value
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """How the image is built: paths absolute, on the client's machine."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    context: Annotated[
        str,
        ContextForm(
            builds.build_context,
            builds.CONTEXT_SCHEMA,
            "The directory to build from, such as . for the file's own.",
        ),
    ]
    dockerfile: Annotated[
        str,
        Form(
            builds.dockerfile,
            templated({**TEXT, "pattern": r"^(?!/|\.\.(/|$)).*\S"}, allowed="a path inside the context"),
            "The Dockerfile's path within the context.",
        ),
    ] = "Dockerfile"
    args: Annotated[
        tuple[tuple[str, str], ...],
        ContextForm(builds.build_args, forms.ENVIRONMENT_SCHEMA, "Values for the Dockerfile's ARG lines."),
    ] = ()
    target: Annotated[
        str | None, Form(builds.stage, TEXT, "The stage to build; else the last.")
    ] = None
    labels: Annotated[
        tuple[tuple[str, str], ...], Form(forms.labels, forms.LABELS_SCHEMA, "Labels of the image.")
    ] = ()
    no_cache: Annotated[
        bool, Form(boolean, templated({"type": "boolean"}), "Builds every layer again.")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Healthcheck:
    """A check of the running container: durations in seconds; ``test`` is argv or empty for none.

    With ``shell`` the one text in ``test`` is for the container's shell.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    test: Annotated[
        tuple[str, ...],
        Form(
            limits.check_words,
            limits.CHECK_SCHEMA,
            "A text for the shell, or [CMD, program, …]: well when it ends with 0.",
        ),
    ]
    shell: Annotated[bool, _hidden("write test: as a text for the shell")] = False
    interval: Annotated[
        float, Form(limits.check_interval, duration_schema(1, 86400), "Time between checks, such as 30s.")
    ] = 30.0
    timeout: Annotated[
        float, Form(limits.check_interval, duration_schema(1, 86400), "A check that takes longer has failed.")
    ] = 30.0
    retries: Annotated[
        int, Form(limits.check_retries, integer_schema(1, 1000), "So many failures in a row mean unhealthy.")
    ] = 3
    start_period: Annotated[
        float, Form(limits.start_period, duration_schema(0, 86400), "Failures in this time do not count.")
    ] = 0.0


# ---------------------------------------------------------------------------------------------- the job


def _cpus(value: object) -> float:
    return number(value, "a number of CPUs", "a number above 0, such as 8 or 0.5", 0.01, CPUS_MAX)


def _memory(value: object) -> int:
    return size(value, MEMORY_LEAST)


def _shm(value: object) -> int:
    return size(value, SHM_LEAST, "16g")


def _time_limit(value: object) -> float:
    return duration(value, 1)


def _grace(value: object) -> float:
    return duration(value, 0, GRACE_MAX, "30s")


def volumes_of(value: object, context: Context) -> tuple[Volume, ...]:
    """Mounts in Compose's short and long forms.

    Raises:
        SpecError: With every mistake.
    """
    return tuple(
        Volume(type=kind, source=source, target=target, read_only=read_only, size=amount)
        for kind, source, target, read_only, amount in mounts.volumes(value, context)
    )


def _ports(value: object) -> tuple[Port, ...]:
    return tuple(
        Port(target=target, published=published, host_ip=address, protocol=protocol)
        for target, published, address, protocol in mounts.ports(value)
    )


def _ulimits(value: object) -> tuple[Ulimit, ...]:
    return tuple(Ulimit(name=name, soft=soft, hard=hard) for name, soft, hard in limits.ulimits(value))


DRIVER_CAPABILITIES = ("compute", "utility", "graphics", "video", "display", "compat32", "ngx")
"""NVIDIA Container Toolkit, "Driver Capabilities"."""
NETWORKS = ("bridge", "none", "host")
IPC_MODES = ("private", "none", "host")


def _word(what: str, choices: tuple[str, ...], words: str) -> Form[str]:
    return Form(lambda value: choice(value, what, choices), templated({"enum": list(choices)}), words)


def _words(what: str, choices: tuple[str, ...], description: str = "") -> Form[tuple[str, ...]]:
    read = gpukeys.strings(what, f"one of {', '.join(choices)}", lambda word: choice(word, what, choices))
    one = templated({"enum": list(choices)})
    several: Json = {"type": "array", "items": one, "minItems": 1, "uniqueItems": True}
    return Form(read, {"anyOf": [one, several]}, description)


_CAPABILITY = re.compile(r"(?:CAP_)?([A-Z][A-Z0-9_]{1,40})")


def _capability(value: str) -> str:
    match = _CAPABILITY.fullmatch(value.upper())
    if match is None or match[1] == "ALL":
        raise wrong(f"{shown(value)} is not a capability; write a name such as SYS_PTRACE")
    return match[1]


def _capabilities() -> Form[tuple[str, ...]]:
    cap = any_case("CAP_")
    one = templated(
        {"type": "string", "pattern": f"^(?!({cap})?{any_case('ALL')}$)({cap})?[A-Za-z][A-Za-z0-9_]{{1,40}}$"},
        allowed="a name such as SYS_PTRACE",
    )
    schema: Json = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1, "uniqueItems": True}]}
    return Form(gpukeys.strings("a capability", "a name such as SYS_PTRACE", _capability), schema,
                "Capabilities, such as [SYS_PTRACE], where the settings allow them.")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One job, validated.

    Attributes:
        command: The program's argv; None means the image's own. (A string in the file is split as a shell
            splits words, as Compose does; no shell runs.)
        entrypoint: Replaces the image's entry point; None means the image's own, ``()`` means none.
        environment: Pairs in the file's order, values resolved.
        cpus: CPUs, may be fractional; None means the server's default.
        mem_limit: Bytes; None means the server's default.
        shm_size: Bytes of /dev/shm; None means a quarter of the memory limit.
        time_limit: Seconds; None means the server's default.
        stop_grace_period: Seconds between the stop signal and KILL.
        ipc: ``private``, ``none`` (no /dev/shm) or ``host``.
        network_mode: ``bridge``, ``none`` or ``host``.
        cap_add: Capabilities, without ``CAP_``.
        driver_capabilities: What of NVIDIA's driver is mounted; empty means compute and utility.
        runtime: ``runsc``; None means the server's.
        secrets: Where they are from and where the program finds them; their values are nowhere here.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    name: Annotated[
        str, Form(forms.job_name, forms.NAME_SCHEMA, "The job's name, such as train-resnet50; the file's by default.")
    ] = ""
    image: Annotated[str | None, Form(forms.image, forms.IMAGE_SCHEMA, "The image to run; or write build.")] = None
    build: Annotated[
        Build | None,
        Around(
            builds.build_forms,
            _no_rules,
            builds.build_schema,
            "A directory with a Dockerfile to build the image from.",
        ),
    ] = None
    command: Annotated[
        tuple[str, ...] | None,
        Form(forms.argv, forms.ARGV_SCHEMA, "The program: a list, or a text split as a shell splits words."),
    ] = None
    entrypoint: Annotated[
        tuple[str, ...] | None,
        Form(forms.argv, forms.ARGV_SCHEMA, "Replaces the image's entry point; [] means none."),
    ] = None
    environment: Annotated[
        tuple[tuple[str, str], ...],
        ContextForm(forms.environment, forms.ENVIRONMENT_SCHEMA, "Variables; a name without a value takes yours."),
    ] = ()
    volumes: Annotated[
        tuple[Volume, ...],
        ContextForm(volumes_of, mounts.VOLUMES_SCHEMA, "Mounts, such as ~/data:/data:ro or .:/workspace."),
    ] = ()
    working_dir: Annotated[
        str | None,
        Form(forms.working_dir, forms.ABSOLUTE_SCHEMA, "Where the program starts, such as /workspace."),
    ] = None
    gpus: Annotated[
        GpuRequest,
        Around(
            gpukeys.gpu_forms,
            gpukeys.gpu_rules,
            gpukeys.gpu_schema,
            "GPUs: a number, or what they have to be.",
        ),
    ] = field(default_factory=GpuRequest)
    cpus: Annotated[
        float | None,
        Form(
            _cpus,
            templated(
                {"type": "number", "minimum": 0.01, "maximum": CPUS_MAX},
                {"type": "string", "pattern": CPUS_PATTERN},
                allowed="a number above 0, such as 8 or 0.5",
            ),
            "CPUs, such as 8 or 0.5.",
        ),
    ] = None
    mem_limit: Annotated[int | None, Form(_memory, size_schema(MEMORY_LEAST), "Memory, such as 64g.")] = None
    shm_size: Annotated[int | None, Form(_shm, size_schema(SHM_LEAST), "Size of /dev/shm, such as 16g.")] = None
    time_limit: Annotated[
        float | None, Form(_time_limit, duration_schema(1), "The job is ended after this time, such as 12h.")
    ] = None
    ports: Annotated[
        tuple[Port, ...],
        Form(_ports, mounts.PORTS_SCHEMA, "Ports, such as 8888 or 8080:80; on loopback by default."),
    ] = ()
    ulimits: Annotated[
        tuple[Ulimit, ...], Form(_ulimits, limits.ULIMITS_SCHEMA, "Resource limits, such as {nofile: 65536}.")
    ] = ()
    labels: Annotated[
        tuple[tuple[str, str], ...], Form(forms.labels, forms.LABELS_SCHEMA, "Labels of the container.")
    ] = ()
    stop_signal: Annotated[
        str | None, Form(forms.signal_name, forms.SIGNAL_SCHEMA, "The signal that asks the program to end.")
    ] = None
    stop_grace_period: Annotated[
        float,
        Form(_grace, duration_schema(0, GRACE_MAX), "Time between the stop signal and KILL, such as 30s."),
    ] = 10.0
    healthcheck: Annotated[
        Healthcheck | None,
        Around(limits.check_forms, _no_rules, limits.check_schema, "How to see that the program is well."),
    ] = None
    ipc: Annotated[
        str, _word("an IPC mode", IPC_MODES, "Shared memory: private by default; host where the settings allow it.")
    ] = "private"
    network_mode: Annotated[
        str, _word("a network mode", NETWORKS, "bridge by default, none; host where the settings allow it.")
    ] = "bridge"
    cap_add: Annotated[tuple[str, ...], _capabilities()] = ()
    driver_capabilities: Annotated[
        tuple[str, ...],
        _words("a driver capability", DRIVER_CAPABILITIES, "compute and utility by default; others where allowed."),
    ] = ()
    runtime: Annotated[
        str | None, _word("a runtime", ("runsc",), "runsc: under gVisor, where the settings allow it; without GPUs.")
    ] = None
    secrets: Annotated[
        tuple[Secret, ...],
        ContextForm(secrets_of, SECRETS_SCHEMA, "Keys and tokens of yours, which the program finds in /run/secrets."),
    ] = ()


# ---------------------------------------------------------------------------------------------- the file

SUPPORTED = frozenset({
    "name", "image", "build", "command", "entrypoint", "environment", "env_file", "volumes", "ports",
    "ulimits", "working_dir", "shm_size", "cpus", "mem_limit", "labels", "stop_signal", "stop_grace_period",
    "healthcheck", "gpus", "time_limit", "matrix", "ipc", "network_mode", "cap_add", "driver_capabilities", "runtime",
    "secrets",
})  # fmt: skip
"""The keys that this version acts on; the model's other keys are validated and refused, never ignored."""

RETRY_REASONS = ("exit", "oom", "time-limit", "gpu-lost", "image", "preempted", "server")


def _whole(what: str, low: int, high: int) -> Form[int]:
    return Form(
        lambda value: integer(value, what, f"a number such as {max(low, 1)}", low, high),
        integer_schema(low, high),
    )


def _texts(what: str, example: str) -> Form[tuple[str, ...]]:
    schema: Json = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}]}
    return Form(gpukeys.strings(what, example, str), schema)


def _span_form() -> Form[float]:
    return Form(_time_limit, duration_schema(1))


def _flag() -> Form[bool]:
    return Form(boolean, templated({"type": "boolean"}))


def _depends(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(typed(item), str | int) and not isinstance(typed(item), bool) for item in items) or not items:
        raise not_a(value, "a list of jobs", "ids or names, such as [12, prepare-data]")
    return tuple(str(item) for item in items)


def _raw(value: object) -> Mapping[str, object]:
    """The matrix as it stands: it is read before anything else, see :mod:`gpujobs.specfile.matrix`."""
    return mapping(value, "a matrix", "a mapping of lists, such as {lr: [0.1, 0.01], seed: [1, 2]}")


MATRIX_NAME = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
MATRIX_MAX = 10_000
"""The most elements that a matrix may expand to."""
_SET: Json = {
    "type": "object",
    "minProperties": 1,
    "propertyNames": {"pattern": f"^(?!(include|exclude)$){MATRIX_NAME}$"},
    "additionalProperties": forms.SCALAR,
}
_SETS: Json = {"type": "array", "items": _SET, "minItems": 1}
MATRIX_SCHEMA: Json = {
    "type": "object",
    "minProperties": 1,
    "not": {"required": ["exclude"], "maxProperties": 1},
    "propertyNames": {"pattern": f"^{MATRIX_NAME}$"},
    "properties": {"include": _SETS, "exclude": _SETS},
    "additionalProperties": {"type": "array", "items": forms.SCALAR, "minItems": 1},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFile(JobSpec):
    """The file's keys: those of a job, those resolved on the way to one, and those of later versions."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    env_file: Annotated[
        tuple[tuple[str, str], ...],
        ContextForm(forms.env_file, forms.ENV_FILE_SCHEMA, "Files of NAME=value lines; environment wins over them."),
    ] = ()
    matrix: Annotated[
        Mapping[str, object] | None,
        Form(_raw, MATRIX_SCHEMA, "One job for each combination; {{ name }} stands for the value."),
    ] = None
    max_parallel: Annotated[int | None, _whole("a number of jobs", 1, MATRIX_MAX)] = None
    priority: Annotated[int | None, _whole("a priority", -1000, 1000)] = None
    retries: Annotated[int | None, _whole("a number of retries", 0, 100)] = None
    retry_on: Annotated[tuple[str, ...], _words("a reason", RETRY_REASONS)] = ()
    depends_on: Annotated[
        tuple[str, ...],
        Form(
            _depends,
            {
                "anyOf": [
                    {"type": ["string", "integer"]},
                    {"type": "array", "items": {"type": ["string", "integer"]}},
                ]
            },
        ),
    ] = ()
    snapshot: Annotated[bool | None, _flag()] = None
    outputs: Annotated[tuple[str, ...], _texts("an output", "a path or glob, such as checkpoints/*.pt")] = ()
    notify: Annotated[tuple[str, ...], _texts("an address", "a URL such as mailto://me@example.org")] = ()
    preemptible: Annotated[bool | None, _flag()] = None
    idle_timeout: Annotated[float | None, _span_form()] = None
    nodes: Annotated[int | None, _whole("a number of nodes", 1, 1024)] = None
    wait_for_max: Annotated[float | None, _span_form()] = None

    def spec(self, file: str) -> JobSpec:
        """The job: values from env_file joined to environment, which wins over them.

        Args:
            file: The file's name, after which a job without a name of its own is called.
        """
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(JobSpec)}
        values["name"] = self.name or forms.name_of_file(file)
        values["environment"] = tuple({**dict(self.env_file), **dict(self.environment)}.items())
        return JobSpec(**values)


KEYS = tuple(item.name for item in dataclasses.fields(JobFile))
"""Every key of the file, in the model's order."""


def _file_forms(value: object, context: Context) -> Mapping[str, object]:
    del context
    return mapping(value, "a job file", "keys and values, such as `name: train`")


def _file_rules(value: Mapping[str, object]) -> list[Fault]:
    faults = [Fault((key,), "not supported by this server", at_key=True)
              for key in value if key in KEYS and key not in SUPPORTED]  # fmt: skip
    if "image" in value and "build" in value:
        faults.append(Fault(("build",), "both image and build are given; keep one", at_key=True))
    if "image" not in value and "build" not in value:
        faults.append(Fault((), "neither image nor build is given; write one, such as `image: python:3.11-slim`"))
    mode = value.get("network_mode")
    if "ports" in value and isinstance(mode, str) and mode in ("host", "none"):
        faults.append(Fault(("ports",), f"nothing is published with network_mode: {mode}; leave one of them out",
                            at_key=True))  # fmt: skip
    shm = value.get("ipc")
    if "shm_size" in value and isinstance(shm, str) and shm in ("host", "none"):
        faults.append(Fault(("shm_size",), f"a job with ipc: {shm} has no /dev/shm of its own; leave one of them out",
                            at_key=True))  # fmt: skip
    volumes = value.get("volumes")
    if "secrets" in value and isinstance(volumes, list | tuple):
        faults += [Fault(("volumes", index), f"the secrets are at {DIRECTORY}; mount it elsewhere")
                   for index, item in enumerate(volumes) if covers(_target(item))]  # fmt: skip
    return faults


def _target(volume: object) -> str:
    """Where a volume is mounted, as far as the file's form says it."""
    if isinstance(volume, Mapping):
        return posixpath.normpath(str(volume.get("target")))
    return posixpath.normpath([*str(volume).split(":"), ""][1])


def _file_schema(inner: Json) -> Json:
    every = inner["properties"]
    assert isinstance(every, dict)
    properties = {key: item for key, item in every.items() if key in SUPPORTED}
    both: Json = {"properties": {"build": False}, "errorMessage": "both image and build are given; keep one"}
    return {**inner, "properties": properties, "anyOf": [{"required": ["image"]}, {"required": ["build"]}],
            "if": {"required": ["image"]}, "then": both, "patternProperties": {"^x-": {}},
            "allOf": [_without("ports", "network_mode"), _without("shm_size", "ipc")]}  # fmt: skip


def _without(key: str, mode: str) -> Json:
    """A key that means nothing where a mode is ``host`` or ``none``."""
    words = f"this means nothing with {mode}: host or none; leave one of them out"
    shared: Json = {"required": [mode], "properties": {mode: {"enum": ["host", "none"]}}}
    return {"if": shared, "then": {"properties": {key: False}, "errorMessage": words}}


AnyJobFile = Annotated[JobFile, Around(_file_forms, _file_rules, _file_schema)]
"""The file's type for the validator."""
