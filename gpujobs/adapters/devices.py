"""Which GPUs a container can really open: asked of the kernel's device policy, not of any variable.

A probe (``gpujobs-init probe``) joins the container's cgroup and tries every NVIDIA device number, without opening
a device. A server that is not root may not join it: it lets the Engine run the same probe as root, in a container
of its own.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable
from pathlib import Path

from gpujobs.adapters.engine import Engine
from gpujobs.core.errors import Unavailable
from gpujobs.core.ports import EngineError

MAJOR = 195
"""The NVIDIA driver's character device number: Documentation/admin-guide/devices.txt of Linux."""

CONTROL_MINORS = frozenset({254, 255})
"""nvidia-modeset and nvidiactl: no GPUs."""

TRIED = 32
"""At least these minors are tried, whether there are such GPUs or not."""

PROBE_SECONDS = 20

_LINE = re.compile(r"(\d+):(\d+) (allow|deny)", re.ASCII)


def host_minors() -> frozenset[int]:
    """The minors of the GPU device files that this host has."""
    return frozenset(
        int(match[1]) for name in os.listdir("/dev") if (match := re.fullmatch(r"nvidia([0-9]+)", name, re.ASCII))
    )


async def granted(
    engine: Engine, init: Path, nodes: Path, container: str, pid: int, minors: Iterable[int]
) -> frozenset[int]:
    """The GPU minors that a container may open.

    Args:
        engine: The Engine that runs it.
        init: The init's binary on the host.
        nodes: A private directory in which device nodes are made for an instant (root only).
        container: Its id.
        pid: Its first process on the host.
        minors: Device numbers to try besides the first :data:`TRIED`.

    Raises:
        Unavailable: The device policy could not be read: then nothing is known, and the job must not run.
    """
    last = max((*minors, *host_minors(), TRIED - 1))
    wanted = f"{MAJOR}:0-{min(last, min(CONTROL_MINORS) - 1)}"
    if os.geteuid() == 0:
        text = await _from_outside(init, nodes, pid, wanted)
    else:
        try:
            text = await engine.probe(container, init, device_cgroups(pid), wanted)
        except EngineError as error:
            raise Unavailable(f"the container's device policy could not be read: {error}") from error
    answers = {int(minor): verdict for major, minor, verdict in _LINE.findall(text) if int(major) == MAJOR}
    if len(answers) != int(wanted.rpartition("-")[2]) + 1:
        raise Unavailable(f"the container's device policy could not be read: {text.strip()[-300:] or 'no answer'}")
    return frozenset(minor for minor, verdict in answers.items() if verdict == "allow")


async def _from_outside(init: Path, nodes: Path, pid: int, wanted: str) -> str:
    joins = [part for path in device_cgroups(pid) for part in ("--join", str(path / "cgroup.procs"))]
    process = await asyncio.create_subprocess_exec(
        init, "probe", "--dir", nodes, *joins, wanted,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise Unavailable(f"the device probe gave no answer in {PROBE_SECONDS} s") from error
    return output.decode("utf-8", "replace")


def device_cgroups(pid: int) -> list[Path]:
    """The cgroup directories that govern a process's devices: v1's devices hierarchy, or the unified one.

    Raises:
        Unavailable: It has none that can be found.
    """
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError as error:
        raise Unavailable(f"the container's first process (pid {pid}) is gone") from error
    unified = None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "devices" in controllers.split(","):
            return [mount_of("devices") / path.lstrip("/")]
        if controllers == "":
            unified = path
    if unified is None:
        raise Unavailable(f"no device cgroup governs pid {pid}")
    return [mount_of(None) / unified.lstrip("/")]


def mount_of(controller: str | None) -> Path:
    """Where a v1 controller, or with None the unified hierarchy, is mounted.

    Raises:
        Unavailable: Nowhere.
    """
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == ("cgroup2" if controller is None else "cgroup") and (
            controller is None or controller in options.split(",")
        ):
            return Path(left.split(" ")[4])
    raise Unavailable("the cgroup file system is not mounted")
