"""What the stand-in for NVIDIA's OCI runtime does at ``create``; ``nvidia-runtime`` beside it starts it.

It does to ``<bundle>/config.json`` what nvidia-container-runtime (toolkit 1.17, CDI mode) does: it reads from
the container's environment which GPUs are wanted and adds their device nodes. Then it becomes runc with the
arguments that it was given. The GPUs are those of the NVML state file that ``config.toml`` beside it names.

``config.toml`` holds NVIDIA's own keys (``accept-nvidia-visible-devices-envvar-when-unprivileged``,
``accept-nvidia-visible-devices-as-volume-mounts``, ``swarm-resource``, ``[nvidia-container-runtime] mode``)
and ``[lab] nvml-state``. A file ``fault.json`` beside it (``{"mode": "extra" | "none" | "fail", "only":
"NAME=value", "message": …}``) makes the runtime misbehave, for tests of what is checked after it.

Imports wait until they are needed: the time that this takes is part of every container's start.
"""

# Importing pathlib takes longer than all of the work here:
# ruff: noqa: PTH100, PTH105, PTH109, PTH110, PTH116, PTH118, PTH120, PTH123

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's own would cost an import
if TYPE_CHECKING:
    from typing import Any, TypedDict

    class Gpu(TypedDict):
        """One GPU of the machine; ``mig``: whether it is in MIG mode."""

        uuid: str
        index: int
        minor: int
        mig: bool
        mig_uuids: list[str]


VARIABLE = "NVIDIA_VISIBLE_DEVICES"
KIND = "nvidia.com/gpu"
MOUNT_ROOT = "/var/run/nvidia-container-devices/"
VALUED_FLAGS = ("--root", "--log", "--log-format", "--criu", "--rootless")
CONTROL_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")


class RefusedError(Exception):
    """The container must not be created; the message is the reason."""


def subcommand(arguments: list[str]) -> tuple[str, list[str]]:
    """Return (runc's subcommand, the arguments behind it), its global flags skipped."""
    position = 0
    while position < len(arguments) and arguments[position].startswith("-"):
        position += 2 if arguments[position] in VALUED_FLAGS else 1
    return (arguments[position] if position < len(arguments) else ""), arguments[position + 1:]


def flag(arguments: list[str], *names: str) -> str | None:
    """Return the value of a flag in either spelling, None without it."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else arguments[position + 1]
    return None


def load_toml(path: str) -> dict[str, Any]:
    """Return the settings; a file that cannot be read as TOML keeps every container from starting."""
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RefusedError(f"could not load config: {path}: {error}") from error


def environment(spec: dict[str, Any]) -> dict[str, str]:
    """Return the container's environment; of a name that is set twice the last value counts."""
    return dict(entry.split("=", 1) for entry in spec["process"].get("env") or [] if "=" in entry)


def is_privileged(spec: dict[str, Any]) -> bool:
    """Tell whether the container holds CAP_SYS_ADMIN, which is how the toolkit knows privileged ones."""
    return "CAP_SYS_ADMIN" in ((spec["process"].get("capabilities") or {}).get("bounding") or [])


def wanted(spec: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Return the ids that the container asks for: from annotations, else mounts, else the variable."""
    annotations = spec.get("annotations") or {}
    requests = [value for key, value in annotations.items() if key.startswith("cdi.k8s.io/")]
    if requests:
        return ",".join(requests).split(",")
    if settings.get("accept-nvidia-visible-devices-as-volume-mounts", False):
        ids = [mount["destination"][len(MOUNT_ROOT):] for mount in spec.get("mounts") or []
               if mount.get("source") == "/dev/null" and mount["destination"].startswith(MOUNT_ROOT)]
        # cdi/<vendor>/<class>/<name> is a qualified name spelt as a path
        ids = ["{}/{}={}".format(*name.split("/")[1:4]) if name.startswith("cdi/") else name for name in ids]
        if ids:
            return ids
    ids = wanted_by_variable(spec, settings)
    accepted = settings.get("accept-nvidia-visible-devices-envvar-when-unprivileged", True)
    return ids if accepted or is_privileged(spec) else []


def wanted_by_variable(spec: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Return the ids that the environment asks for; special values go first: void, then none, then all."""
    env = environment(spec)
    names = [name.strip() for name in settings.get("swarm-resource", "").split(",") if name.strip() in env]
    values = [env[name] for name in names or [VARIABLE] if name in env]
    if not values:
        # An image made before the variable existed, known by CUDA_VERSION alone, gets all.
        return ["all"] if env.get("CUDA_VERSION") and not env.get("NVIDIA_REQUIRE_CUDA") else []
    ids = [name.strip() for value in values for name in value.split(",") if name.strip()]
    if not ids or "void" in ids:
        return []
    for special in ("none", "all"):
        if special in ids:
            return [special]
    return ids


def selectable(gpus: list[Gpu]) -> dict[str, list[str]]:
    """Return {name: device nodes} of all that can be asked for: indexes, UUIDs, MIG devices, ``all``.

    A GPU in MIG mode is no name itself; its MIG devices are, by UUID and as ``index:position``.
    """
    names: dict[str, list[str]] = {}
    for gpu in gpus:
        node = [f"/dev/nvidia{gpu['minor']}"]
        if gpu["mig"]:
            for position, uuid in enumerate(gpu["mig_uuids"]):
                names[uuid] = names[f"{gpu['index']}:{position}"] = node
        else:
            names[gpu["uuid"]] = names[str(gpu["index"])] = node
    if names:
        names["all"] = sorted({node for nodes in names.values() for node in nodes})
    return names


def resolve(ids: list[str], gpus: list[Gpu], mode: str) -> list[str]:
    """Return the device nodes for the ids, in order and each once.

    Raises:
        RefusedError: for an id that the machine has not, in the toolkit's words.
    """
    if ids == ["none"] and mode != "cdi":
        return control_nodes()
    names = selectable(gpus)
    nodes: list[str] = []
    unknown: list[str] = []
    for name in ids:
        kind, equals, plain = name.partition("=")
        if (equals and kind != KIND) or (plain if equals else name) not in names:
            unknown.append(name if equals else f"{KIND}={name}")
        else:
            nodes += names[plain if equals else name]
    if unknown:
        raise RefusedError(
            "could not apply required modification to OCI specification: error modifying OCI spec: "
            f"failed to inject CDI devices: unresolvable CDI devices {', '.join(unknown)}"
        )
    return list(dict.fromkeys(nodes)) + control_nodes() if nodes else []


def control_nodes() -> list[str]:
    """Return the nodes that come with any GPU; those of unified memory only where the machine has them."""
    return [path for path in CONTROL_NODES if path == CONTROL_NODES[0] or os.path.exists(path)]


def inject(spec: dict[str, Any], nodes: list[str]) -> None:
    """Add device nodes to the container and to its device cgroup; the variable then reads void."""
    if not nodes:
        return
    linux = spec.setdefault("linux", {})
    devices = [device for device in linux.get("devices") or [] if device["path"] not in nodes]
    allowed = linux.setdefault("resources", {}).setdefault("devices", [])
    for path in nodes:
        try:
            status = os.stat(path)
        except OSError as error:
            raise RefusedError(
                f"failed to inject CDI devices: failed to stat CDI host device {path!r}: {error.strerror}"
            ) from error
        major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        devices.append({"path": path, "type": "c", "major": major, "minor": minor,
                        "fileMode": status.st_mode & 0o777, "uid": status.st_uid, "gid": status.st_gid})
        allowed.append({"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"})
    linux["devices"] = devices
    kept = [entry for entry in spec["process"].get("env") or [] if not entry.startswith(VARIABLE + "=")]
    spec["process"]["env"] = [*kept, f"{VARIABLE}=void"]


def spoil(nodes: list[str], spec: dict[str, Any], gpus: list[Gpu], path: str) -> list[str]:
    """Return the nodes as the fault file makes them: one GPU more, none, or no container at all."""
    import json

    try:
        with open(path) as file:
            fault = json.load(file)
    except FileNotFoundError:
        return nodes
    if fault["only"] and fault["only"] not in (spec["process"].get("env") or []):
        return nodes
    if fault["mode"] == "fail":
        raise RefusedError(fault["message"])
    if fault["mode"] == "none":
        return []
    extra = [f"/dev/nvidia{gpu['minor']}" for gpu in gpus if f"/dev/nvidia{gpu['minor']}" not in nodes]
    return list(dict.fromkeys([*nodes, *extra[:1], *control_nodes()]))


def machine(path: str) -> list[Gpu]:
    """Return the GPUs of the NVML state file: index, minor, uuid, whether in MIG mode, MIG devices' UUIDs.

    A lost GPU keeps its place and its node, as in a CDI specification made before it was lost. Without a
    file, or with the driver away, there are none.
    """
    gpus: list[Gpu] = []
    try:
        with open(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return gpus
    if "driver absent" in lines:
        return gpus
    for line in lines:
        key, _, rest = line.partition(" ")
        if key == "gpu":
            number = len(gpus)
            gpus.append({"uuid": rest, "index": number, "minor": number, "mig": False, "mig_uuids": []})
        elif key == "minor":
            gpus[-1]["minor"] = int(rest)
        elif key == "mig_mode":
            gpus[-1]["mig"] = rest.split()[0] == "1"
        elif key == "mig":
            gpus[-1]["mig_uuids"].append(rest.split()[1])
    return gpus


def create(bundle: str, settings: dict[str, Any], directory: str) -> None:
    """Apply the rules to the bundle's config.json."""
    import json

    path = os.path.join(bundle, "config.json")
    with open(path) as file:
        spec = json.load(file)
    gpus = machine(settings["lab"]["nvml-state"])
    mode = settings.get("nvidia-container-runtime", {}).get("mode", "cdi")
    nodes = resolve(wanted(spec, settings), gpus, mode)
    nodes = spoil(nodes, spec, gpus, os.path.join(directory, "fault.json"))
    if nodes:
        inject(spec, nodes)
        with open(path + ".nvidia", "w") as file:
            json.dump(spec, file)
        os.replace(path + ".nvidia", path)


def report(message: str, arguments: list[str]) -> None:
    """Say why: on stderr, and as the last error of runc's JSON log, which is where the Engine looks."""
    import json

    print(f"nvidia-runtime: {message}", file=sys.stderr)
    log = flag(arguments, "--log")
    if log:
        with open(log, "a") as file:
            file.write(json.dumps({"level": "error", "msg": message}) + "\n")


def runc() -> str:
    """Return the path of runc."""
    for place in [*os.environ.get("PATH", "").split(":"), "/usr/local/sbin", "/usr/sbin", "/usr/bin"]:
        path = os.path.join(place, "runc")
        if os.access(path, os.X_OK):
            return path
    raise RefusedError("runc is not installed")


def main(arguments: list[str]) -> None:
    """Become runc, after the work of ``create``; exit with 1 where that refuses the container."""
    name, rest = subcommand(arguments)
    directory = os.path.dirname(os.path.abspath(sys.argv[0]))
    try:
        if name == "create":
            settings = load_toml(os.path.join(directory, "config.toml"))
            create(flag(rest, "--bundle", "-b") or os.getcwd(), settings, directory)
        program = runc()
    except RefusedError as reason:
        report(str(reason), arguments)
        sys.exit(1)
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
