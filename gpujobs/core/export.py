"""The same job in other launchers' words: a ``docker run`` line that works when pasted, and a Compose file.

Both give the same GPUs, identity, limits and mounts; neither has the queue, the checked devices or the log. The
init is ours alone; Docker's own is in its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from gpujobs.core.container import (
    PIDS_LIMIT,
    Order,
    environment_of,
    own_environment,
    ranges,
    runtime_of,
    shm_size_of,
    ulimits_of,
)
from gpujobs.core.secrets import DIRECTORY
from gpujobs.core.shellwords import quoted
from gpujobs.core.spec import Build
from gpujobs.core.yamltext import document, literal


def _environment(order: Order) -> list[tuple[str, str]]:
    entries, _ = environment_of(order)
    ours = [(name, value) for name, sign, value in (entry.partition("=") for entry in entries) if sign]
    return [*own_environment(order).items(), *(pair for pair in ours if not pair[0].startswith("GPUJOBS_"))]


def docker_run(order: Order) -> str:
    """One line for a shell of the machine, by an account that may use Docker."""
    spec, owner = order.spec, order.owner
    words = ["docker", "run", "--rm", "--init", "--name", _container_name(spec.name), "--runtime", runtime_of(order)]
    words += ["--user", f"{owner.uid}:{owner.gid}"]
    for gid in owner.groups:
        if gid != owner.gid:
            words += ["--group-add", str(gid)]
    words += ["--cap-drop", "ALL", *(word for name in spec.cap_add for word in ("--cap-add", name))]
    words += ["--security-opt", "no-new-privileges:true", "--pids-limit", str(PIDS_LIMIT)]
    words += ["--memory", str(order.allocation.memory), "--memory-swap", str(order.allocation.memory)]
    words += ["--shm-size", str(shm_size_of(order))] if spec.ipc == "private" else ["--ipc", spec.ipc]
    words += [] if spec.network_mode == "bridge" else ["--network", spec.network_mode]
    if order.allocation.cpus:
        words += ["--cpus", f"{order.allocation.cpus:g}"]
    if order.near:
        words += ["--cpuset-cpus", ranges(order.near)]
    for name, soft, hard in ulimits_of(order):
        words += ["--ulimit", f"{name}={soft}:{hard}"]
    words += _mounts(order)
    for port in spec.ports:
        published = "" if port.published is None else str(port.published)
        address = f"[{port.host_ip}]" if ":" in port.host_ip else port.host_ip
        words += ["--publish", f"{address}:{published}:{port.target}/{port.protocol}"]
    for name, value in _environment(order):
        words += ["--env", f"{name}={value}"]
    for name, value in spec.labels:
        words += ["--label", f"{name}={value}"]
    words += ["--workdir", spec.working_dir] if spec.working_dir else []
    words += ["--stop-signal", spec.stop_signal] if spec.stop_signal else []
    words += ["--stop-timeout", str(math.ceil(spec.stop_grace_period))]
    words += _health_options(order)
    arguments = list(spec.command or ())
    if spec.entrypoint is not None:
        words += ["--entrypoint", spec.entrypoint[0] if spec.entrypoint else ""]
        arguments = [*spec.entrypoint[1:], *arguments]
    image = quoted(order.image.reference) if spec.build is None else f'"$({_build(spec.build)})"'
    return " ".join([*map(quoted, words), image, *map(quoted, arguments)])


def _comma_separated(fields: Iterable[str]) -> str:
    """Fields as ``--mount`` reads them (RFC 4180): one with a comma or a quote is quoted."""
    return ",".join('"' + field.replace('"', '""') + '"' if re.search('[,"\r\n]', field) else field for field in fields)


def _container_name(name: str) -> str:
    """The nearest name that the Engine takes: letters, digits and ``_.-``, at least two."""
    plain = re.sub("[^A-Za-z0-9_.-]", "-", name)
    return plain if len(plain) > 1 else f"{plain}-job"


def _project_name(name: str) -> str:
    """The nearest name that Compose takes for a project."""
    return re.sub("[^a-z0-9_-]", "-", name.lower())


def _build(build: Build) -> str:
    words = ["docker", "build", "--quiet", "--file", f"{build.context}/{build.dockerfile}"]
    words += [word for name, value in build.args for word in ("--build-arg", f"{name}={value}")]
    words += [word for name, value in build.labels for word in ("--label", f"{name}={value}")]
    words += (["--target", build.target] if build.target else []) + (["--no-cache"] if build.no_cache else [])
    return " ".join(map(quoted, [*words, build.context]))


def _health_options(order: Order) -> list[str]:
    check = order.spec.healthcheck
    if check is None or not check.test:
        return ["--no-healthcheck"]
    command = check.test[0] if check.shell else " ".join(map(quoted, check.test))
    return ["--health-cmd", command, "--health-interval", f"{check.interval:g}s", "--health-timeout",
            f"{check.timeout:g}s", "--health-retries", str(check.retries), "--health-start-period",
            f"{check.start_period:g}s"]  # fmt: skip


def _mounts(order: Order) -> list[str]:
    binds = [(mount.source, mount.target, mount.read_only) for mount in order.mounts]
    # A secret that was a variable has no place in such a line but as its value, which is nowhere here.
    binds += [(secret.file, f"{DIRECTORY}/{secret.target}", True) for secret in order.spec.secrets if secret.file]
    words: list[str] = []
    for source, target, read_only in binds:
        fields = ["type=bind", f"source={source}", f"target={target}", *(["readonly"] if read_only else [])]
        words += ["--mount", _comma_separated(fields)]
    for target, options in order.tmpfs.items():
        words += ["--tmpfs", f"{target}:{options}"]
    return words


def compose(order: Order) -> str:
    """A Compose file of one service; it is tied to the GPUs chosen, by their UUIDs."""
    spec, owner = order.spec, order.owner
    service: dict[str, object] = {
        "image": literal(order.image.reference) if spec.build is None else None,
        "build": None if spec.build is None else _compose_build(spec.build),
        "init": True,
        "runtime": runtime_of(order),
        "user": f"{owner.uid}:{owner.gid}",
        "group_add": [str(gid) for gid in owner.groups if gid != owner.gid],
        "cap_drop": ["ALL"],
        "cap_add": list(spec.cap_add),
        "security_opt": ["no-new-privileges:true"],
        "pids_limit": PIDS_LIMIT,
        "mem_limit": order.allocation.memory,
        "memswap_limit": order.allocation.memory,
        "shm_size": shm_size_of(order) if spec.ipc == "private" else None,
        "ipc": None if spec.ipc == "private" else spec.ipc,
        "network_mode": None if spec.network_mode == "bridge" else spec.network_mode,
        "cpus": order.allocation.cpus or None,
        "cpuset": ranges(order.near) if order.near else None,
        "ulimits": {name: {"soft": soft, "hard": hard} for name, soft, hard in ulimits_of(order)},
        "entrypoint": None if spec.entrypoint is None else [literal(word) for word in spec.entrypoint],
        "command": None if spec.command is None else [literal(word) for word in spec.command],
        "working_dir": spec.working_dir,
        "stop_signal": spec.stop_signal,
        "stop_grace_period": f"{spec.stop_grace_period:g}s",
        "environment": {name: literal(value) for name, value in _environment(order)},
        "labels": {name: literal(value) for name, value in spec.labels},
        "ports": [
            {"target": p.target, "published": None if p.published is None else str(p.published), "host_ip": p.host_ip,
             "protocol": p.protocol}
            for p in spec.ports
        ],
        "volumes": [
            {"type": "bind", "source": literal(m.source), "target": literal(m.target), "read_only": m.read_only}
            for m in order.mounts
        ],
        "tmpfs": [literal(f"{target}:{options}") for target, options in order.tmpfs.items()],
        "healthcheck": _healthcheck(order),
        "secrets": [{"source": secret.name, "target": secret.target} for secret in spec.secrets],
    }  # fmt: skip
    kept = {key: _without_none(value) for key, value in service.items() if value not in (None, [], {})}
    if spec.entrypoint == ():
        kept["entrypoint"] = []
    whole: dict[str, object] = {"name": _project_name(spec.name), "services": {"job": kept}}
    if spec.secrets:
        whole["secrets"] = {
            s.name: {"file": literal(s.file)} if s.file else {"environment": s.environment} for s in spec.secrets
        }
    return document(whole)


def _compose_build(build: Build) -> dict[str, object]:
    return {
        "context": literal(build.context),
        "dockerfile": literal(build.dockerfile),
        **({"args": {name: literal(value) for name, value in build.args}} if build.args else {}),
        **({"labels": {name: literal(value) for name, value in build.labels}} if build.labels else {}),
        **({"target": literal(build.target)} if build.target else {}),
        **({"no_cache": True} if build.no_cache else {}),
    }


def _healthcheck(order: Order) -> dict[str, object]:
    check = order.spec.healthcheck
    if check is None or not check.test:
        return {"disable": True}
    words = ["CMD-SHELL", *check.test] if check.shell else ["CMD", *check.test]
    return {
        "test": [literal(word) for word in words],
        "interval": f"{check.interval:g}s",
        "timeout": f"{check.timeout:g}s",
        "retries": check.retries,
        "start_period": f"{check.start_period:g}s",
    }


def _without_none(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
