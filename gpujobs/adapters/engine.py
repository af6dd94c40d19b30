"""The Docker Engine: short calls on a bounded pool, each thread with a client of its own.

Long streams (events, logs) are in :mod:`gpujobs.adapters.streams`. What may be asked of the Engine is what the
methods here ask; nothing passes through.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from gpujobs.adapters.enginesocket import parse_host
from gpujobs.core.container import Image
from gpujobs.core.errors import InvalidInput, Unavailable
from gpujobs.core.facts import EngineFacts
from gpujobs.core.ports import Conflict, EngineAway, EngineError, Gone
from gpujobs.core.reconcile import Seen

T = TypeVar("T")

CALL_SECONDS = 60
"""The limit of one call; a pull has one of its own. An Engine that hangs must not hang us."""

THREADS = 8

NETWORK = "gpujobs"
"""The Engine's network on which jobs are: one for all servers of an Engine, since nobody reaches anybody on it."""

ICC = "com.docker.network.bridge.enable_icc"
"""The bridge driver's option for traffic between its containers."""

_CAP_SYS_RESOURCE = 24
_LIMITS = {"memlock": "Max locked memory", "stack": "Max stack size", "core": "Max core file size",
           "nofile": "Max open files", "nproc": "Max processes"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What is known of the Engine.

    Attributes:
        id: Its own lasting id.
        runtimes: The names of its OCI runtimes.
        cgroup: 1 or 2.
        memory: Bytes of the machine.
    """

    id: str
    version: str
    api: str
    runtimes: tuple[str, ...]
    cgroup: int
    cpus: int
    memory: int
    root: str


def default_host(environ: Mapping[str, str]) -> str:
    """DOCKER_HOST, or the usual socket."""
    return environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"


class Engine:
    """The Engine at one address.

    Args:
        host: ``unix://PATH`` or ``tcp://HOST:PORT``.
        timeout: Seconds that one call may take.

    Raises:
        InvalidInput: The address is of another kind.
    """

    def __init__(self, host: str, *, timeout: int = CALL_SECONDS) -> None:
        if not host.startswith(("unix://", "tcp://")):
            raise InvalidInput(
                f"DOCKER_HOST={host}: gpujobs reaches the Engine of this machine only",
                hint="Use unix:///var/run/docker.sock, or unset DOCKER_HOST.",
            )
        parse_host(host)
        self.host = host
        self._timeout = timeout
        self._root: str | None = None
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="engine")
        self._making_network = asyncio.Lock()

    def client(self) -> docker.APIClient:
        """This thread's client.

        Raises:
            Unavailable: No Engine answers there.
        """
        if not hasattr(self._local, "client"):
            try:
                self._local.client = docker.APIClient(base_url=self.host, version="auto", timeout=self._timeout)
            except DockerException as error:
                raise unreachable(self.host, error) from error
        return self._local.client  # type: ignore[no-any-return]

    async def call(self, action: Callable[[docker.APIClient], T]) -> T:
        """Run a short call on the pool.

        Raises:
            Gone: What it is about is not there.
            Conflict: The name is taken.
            EngineError: The Engine refused.
            Unavailable: The Engine did not answer.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._call, action)

    def _call(self, action: Callable[[docker.APIClient], T]) -> T:
        try:
            return action(self.client())
        except (NotFound, ImageNotFound) as error:
            raise Gone(explanation(error)) from error
        except APIError as error:
            if error.status_code == 409:
                raise Conflict(explanation(error)) from error
            raise EngineError(explanation(error)) from error
        except (DockerException, requests.RequestException, OSError) as error:
            raise unreachable(self.host, error) from error

    def close(self) -> None:
        """Stop the pool; calls under way end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def info(self) -> EngineInfo:
        """Who the Engine is."""
        data = await self.call(lambda client: client.info())
        return EngineInfo(
            id=str(data.get("ID") or ""),
            version=str(data.get("ServerVersion", "")),
            api=str(await self.call(lambda client: client.api_version)),
            runtimes=tuple(sorted(data.get("Runtimes") or {})),
            cgroup=2 if str(data.get("CgroupVersion", "1")) == "2" else 1,
            cpus=int(data.get("NCPU", 0)),
            memory=int(data.get("MemTotal", 0)),
            root=str(data.get("DockerRootDir", "")),
        )

    async def runtimes(self) -> tuple[str, ...]:
        """The names of its OCI runtimes."""
        return (await self.info()).runtimes

    async def disk_free(self) -> int | None:
        """Free bytes of the Engine's disk; None where it is not on this machine, or not to be looked at."""
        if self._root is None:
            self._root = (await self.info()).root
        try:
            found = os.statvfs(self._root)
        except OSError:
            return None
        return found.f_bavail * found.f_frsize

    async def layer_bytes(self, container: str) -> int:
        """The bytes of a container's writable layer; the Engine walks through it for this."""

        def ask(client: docker.APIClient) -> int:
            # docker-py's own inspect has no way to ask for the size.
            raw: Any = client
            answer = raw._result(raw._get(raw._url("/containers/{0}/json", container), params={"size": 1}), True)
            return int(answer.get("SizeRw") or 0)

        return await self.call(ask)

    async def facts(self) -> EngineFacts:
        """What a check of the machine asks: how the Engine is set up."""
        data = await self.call(lambda client: client.info())
        version = await self.call(lambda client: client.version())
        return facts_of(self.host, data, version)

    def ceilings(self) -> dict[str, int]:
        """The hard resource limits that the Engine cannot raise: empty where it can raise all of them.

        An Engine without CAP_SYS_RESOURCE (inside some sandboxes) fails to start a container that asks for more
        than it has itself. Its process is the peer of its socket; over TCP it is taken to be as bounded as this one.
        """
        pid = self._process() or os.getpid()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            limits = Path(f"/proc/{pid}/limits").read_text()
        except OSError:
            return {}
        # What it could have, not what it has: a proxy in front of the Engine may be nobody's.
        bounding = re.search(r"^CapBnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
        if bounding is None or int(bounding[1], 16) >> _CAP_SYS_RESOURCE & 1:
            return {}
        found = {name: re.search(rf"^{words}\s+\S+\s+(\S+)", limits, re.MULTILINE) for name, words in _LIMITS.items()}
        return {
            name: int(match[1]) for name, match in found.items() if match is not None and match[1] != "unlimited"
        }

    async def image(self, reference: str) -> Image:
        """An image that is there.

        Raises:
            Gone: It is not there.
        """
        data = await self.call(lambda client: client.inspect_image(reference))  # type: ignore[no-untyped-call]
        return image_of(reference, data)

    async def network(self) -> str:
        """The network that jobs go on: one whose containers do not reach each other.

        That is the Engine's default bridge where its administrator has set ``"icc": false``, which starts containers
        some 50 ms sooner; else one of ours, made where it is missing.

        Raises:
            EngineError: It cannot be made, or one of that name lets containers reach each other.
        """

        def find(client: docker.APIClient) -> str:
            with suppress(NotFound):  # an Engine can run without one
                if _is_apart(client.inspect_network("bridge")):
                    return "bridge"
            found = [row for row in client.networks(names=[NETWORK]) if row["Name"] == NETWORK]
            if apart := sorted((row["Created"], str(row["Id"])) for row in found if _is_apart(row)):
                return apart[0][1]  # by its id: two servers that made one at once have made two of that name
            if found:
                raise EngineError(f"on the network {NETWORK} containers reach each other: remove it, it is not ours")
            made = client.create_network(NETWORK, driver="bridge", options={ICC: "false"}, check_duplicate=True)
            return str(made["Id"])

        async with self._making_network:
            try:
                return await self.call(find)
            except Conflict:  # another server has just made it
                return await self.call(find)

    def filters(self) -> bool | None:
        """Whether the Engine keeps networks apart with iptables, by its command line; None where that is not known."""
        process = self._process()
        if process is None:
            return None
        try:
            words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            named = next((i for i, word in enumerate(words) if word in ("--config-file", "-config-file")), None)
            file = Path(words[named + 1]) if named is not None else Path("/etc/docker/daemon.json")
            settings = json.loads(file.read_text()) if file.exists() else {}
        except (OSError, ValueError, IndexError):
            return None
        off = any(word in ("--iptables=false", "--iptables=0") for word in words)
        return not off and bool(settings.get("iptables", True))

    def _process(self) -> int | None:
        """The Engine's process, which is the peer of its socket; None over TCP."""
        path = self.host.removeprefix("unix://")
        if path == self.host:
            return None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(path)
            return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])

    async def create(self, name: str, request: Mapping[str, Any]) -> str:
        """Make a container; returns its id.

        Raises:
            Conflict: A container of that name is there.
            EngineError: The Engine refused the request.
        """
        made = await self.call(lambda client: client.create_container_from_config(dict(request), name=name))  # type: ignore[no-untyped-call]
        return str(made["Id"])

    async def start(self, container: str) -> None:
        """Start a created container.

        Raises:
            EngineError: Its runtime refused; the sentence is the runtime's.
        """
        await self.call(lambda client: client.start(container))

    async def inspect(self, container: str) -> dict[str, Any]:
        """Everything the Engine knows of a container."""
        return await self.call(lambda client: client.inspect_container(container))

    async def kill(self, container: str, signal: str) -> None:
        """Send a signal to a container's first process; nothing happens where it has ended."""
        try:
            await self.call(lambda client: client.kill(container, signal))
        except (Gone, Conflict):
            return

    async def unthrottle(self, container: str) -> None:
        """Let a container use all CPUs: processes that are killed need some to end.

        A hundred of them on a tenth of a CPU outlived SIGKILL by minutes, with all that they held (seen).
        """

        def update(client: docker.APIClient) -> None:
            cpus = int(client.info().get("NCPU", 1))
            plain: Any = client  # its own update knows no NanoCpus, and the Engine mixes them with nothing else
            url = plain._url("/containers/{0}/update", container)
            plain._result(plain._post_json(url, data={"NanoCpus": cpus * 10**9}), json=True)

        try:
            await self.call(update)
        except (Gone, Conflict):
            return

    async def remove(self, container: str) -> None:
        """Remove a container and its anonymous volumes; nothing happens where it is gone."""
        try:
            await self.call(lambda client: client.remove_container(container, v=True, force=True))
        except Gone:
            return
        except Conflict:  # its removal is under way
            return

    async def containers(self) -> list[Seen]:
        """Every container, inspected: what it holds is only in there."""

        def collect(client: docker.APIClient) -> list[Seen]:
            found = []
            for row in client.containers(all=True):
                try:
                    found.append(seen_of(client.inspect_container(row["Id"])))
                except NotFound:
                    continue
            return found

        return await self.call(collect)

    async def probe(self, container: str, init: Path, cgroups: Sequence[Path], devices: str) -> str:
        """Run the init's device probe in the cgroup of a container, for servers that are not root themselves.

        A container of its own does it, with nothing in it but the probe, the cgroup's directory and the right to
        make device nodes. (A privileged exec in the job's container would be quicker; it fails on an Engine that
        lacks one of the kernel's capabilities itself, as in a sandbox.)

        Args:
            container: The container that is asked about.
            init: The init's binary on the host.
            cgroups: Its device cgroup's directories on the host.
            devices: What to try, such as ``195:0-31``.

        Raises:
            EngineError: The probe could not be run.
        """

        def run(client: docker.APIClient) -> str:
            found = client.inspect_container(container)
            request = probe_request(found["Image"], found["Config"].get("Env") or [], init, cgroups, devices)
            name = f"{found['Name'].removeprefix('/')}-probe"
            with suppress(NotFound):  # a server that was killed meanwhile has left it
                client.remove_container(name, v=True, force=True)
            made = str(client.create_container_from_config(request, name=name)["Id"])  # type: ignore[no-untyped-call]
            try:
                client.start(made)
                client.wait(made, timeout=CALL_SECONDS)
                return bytes(client.logs(made)).decode("utf-8", "replace")
            finally:
                client.remove_container(made, v=True, force=True)

        return await self.call(run)


def probe_request(
    image: str, environment: Sequence[str], init: Path, cgroups: Sequence[Path], devices: str
) -> dict[str, Any]:
    """What the Engine is asked for to run the device probe in another container's cgroup.

    Args:
        image: The id of any image: nothing of it runs.
        environment: Variables of that image: all are taken away.
        init: The init's binary on the host.
        cgroups: Directories whose ``cgroup.procs`` the probe joins.
        devices: What it tries.
    """
    program = "/.gpujobs/init"
    mounts = [(init, program, True), *((path, f"/.gpujobs/cgroup{n}", False) for n, path in enumerate(cgroups))]
    joins = [part for n in range(len(cgroups)) for part in ("--join", f"/.gpujobs/cgroup{n}/cgroup.procs")]
    names = sorted({entry.partition("=")[0] for entry in environment} - {"NVIDIA_VISIBLE_DEVICES"})
    return {
        "Image": image,
        "Entrypoint": [program, "probe", "--dir", "/dev", *joins],
        "Cmd": [devices],
        "User": "0:0",
        "Env": [*names, "NVIDIA_VISIBLE_DEVICES=void"],
        "Labels": {"gpujobs.probe": devices},
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {
            "Runtime": "runc",
            "NetworkMode": "none",
            "CgroupnsMode": "host",  # a cgroup outside of one's own namespace cannot be joined
            "CapDrop": ["ALL"],
            "CapAdd": ["MKNOD"],
            "SecurityOpt": ["no-new-privileges:true", "label=disable"],
            "ReadonlyRootfs": True,
            "PidsLimit": 16,
            "LogConfig": {"Type": "json-file", "Config": {}},
            "Mounts": [
                {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": read_only}
                for source, target, read_only in mounts
            ],
        },
    }


def _is_apart(network: Mapping[str, Any]) -> bool:
    """Whether containers on a network do not reach each other."""
    options = network.get("Options") or {}
    return network.get("Driver") == "bridge" and str(options.get(ICC, "true")).lower() in ("false", "0")


def unreachable(host: str, error: Exception) -> Unavailable:
    """The sentence for an Engine that does not answer."""
    if isinstance(error, PermissionError) or "Permission denied" in str(error):
        return Unavailable(
            f"this account (uid {os.getuid()}) may not use the Docker Engine at {host}",
            hint="Use a gpujobs server that the administrator runs, or ask for access to Docker.",
        )
    return EngineAway(
        f"the Docker Engine at {host} does not answer", hint="Is dockerd running? Start it: `systemctl start docker`."
    )


def explanation(error: APIError) -> str:
    """The Engine's own sentence, without docker-py's wrapping."""
    return str(error.explanation or error).strip()


def split_reference(reference: str) -> tuple[str, str]:
    """An image's name and its tag or digest."""
    name, at, digest = reference.partition("@")
    if at:
        return name, digest
    head, colon, tag = name.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (name, "latest")


def facts_of(host: str, info: Mapping[str, Any], version: Mapping[str, Any]) -> EngineFacts:
    """How an Engine is set up, by what ``/info`` and ``/version`` answer."""
    runtimes = info.get("Runtimes") or {}
    options = [str(option) for option in info.get("SecurityOptions") or []]
    names = {option.removeprefix("name=").partition(",")[0] for option in options}
    limits = (("memory", "MemoryLimit"), ("processes", "PidsLimit"), ("CPU time", "CpuCfsQuota"))
    components = {str(item.get("Name")): str(item.get("Version") or "") for item in version.get("Components") or []}
    return EngineFacts(
        host=host,
        version=str(info.get("ServerVersion") or ""),
        api=str(version.get("ApiVersion") or ""),
        runtimes=tuple(
            sorted((str(name), str((entry or {}).get("path") or "")) for name, entry in runtimes.items())
        ),
        default_runtime=str(info.get("DefaultRuntime") or ""),
        runc=components.get("runc", ""),
        cgroup=2 if str(info.get("CgroupVersion", "1")) == "2" else 1,
        driver=str(info.get("CgroupDriver") or ""),
        root=str(info.get("DockerRootDir") or ""),
        rootless="rootless" in names,
        user_namespaces="userns" in names,
        seccomp="seccomp" in names and not any("profile=unconfined" in option for option in options),
        authorization=tuple(map(str, (info.get("Plugins") or {}).get("Authorization") or ())),
        lacks=tuple(name for name, key in limits if info.get(key) is False),
    )


def image_of(reference: str, data: Mapping[str, Any]) -> Image:
    """The image of an inspect answer."""
    config = data.get("Config") or {}
    digests = data.get("RepoDigests") or []
    return Image(
        id=str(data["Id"]),
        reference=reference,
        digest=str(digests[0]) if digests else None,
        entrypoint=tuple(config.get("Entrypoint") or ()),
        command=tuple(config.get("Cmd") or ()),
        environment=tuple(config.get("Env") or ()),
        working_dir=str(config.get("WorkingDir") or ""),
        stop_signal=config.get("StopSignal") or None,
        labels=tuple(sorted(config.get("Labels") or {})),
    )


def seen_of(data: Mapping[str, Any]) -> Seen:
    """What reconciliation needs of an inspect answer."""
    config, host = data.get("Config") or {}, data.get("HostConfig") or {}
    variables = dict(entry.partition("=")[::2] for entry in config.get("Env") or [])
    requests_ = [
        (int(request.get("Count") or 0), tuple(request.get("DeviceIDs") or ()))
        for request in host.get("DeviceRequests") or []
        if request.get("Driver") in ("", "nvidia", "cdi", None)
        or any("gpu" in group for group in request.get("Capabilities") or [])
    ]
    return Seen(
        id=str(data["Id"]),
        name=str(data["Name"]).removeprefix("/"),
        state=str(data["State"]["Status"]),
        labels=dict(config.get("Labels") or {}),
        runtime=str(host.get("Runtime") or "runc"),
        visible=variables.get("NVIDIA_VISIBLE_DEVICES"),
        cuda_image="CUDA_VERSION" in variables,
        devices=tuple(str(device.get("PathOnHost")) for device in host.get("Devices") or []),
        requests=tuple(requests_),
        image=str(config.get("Image") or ""),
    )
