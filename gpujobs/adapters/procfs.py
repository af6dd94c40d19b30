"""What /proc tells about a process: who runs it, what it is called, in which container it is."""

from __future__ import annotations

import pwd
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
_CONTAINER: Final = re.compile(r"(?:^|[/-])([0-9a-f]{64})(?=\.scope|/|$)")


@dataclass(frozen=True, slots=True)
class Facts:
    """One process.

    Attributes:
        name: The first word of its command line, or what the kernel calls it; empty where it is gone.
        uid: The real uid; None where it is gone.
        user: The account's name, or the uid as text where it has none.
        containers: Ids of the containers it is in, the outermost first; more than one for a container within
        a
            container.
    """

    name: str = ""
    uid: int | None = None
    user: str | None = None
    containers: tuple[str, ...] = ()


def facts(pid: int, proc: Path = PROC) -> Facts:
    """Look a process up; what has ended meanwhile, or must not be seen, is left empty."""
    directory = proc / str(pid)
    uid = _uid(_read(directory / "status"))
    return Facts(
        name=_name(_read(directory / "cmdline"), _read(directory / "comm")),
        uid=uid,
        user=None if uid is None else user_name(uid),
        containers=containers(_read(directory / "cgroup")),
    )


def containers(cgroup: str) -> tuple[str, ...]:
    """The container ids in the text of a ``/proc/PID/cgroup``, the outermost first.

    Engine ids are 64 hexadecimal digits in every spelling: ``/docker/<id>`` with the cgroupfs driver,
    ``/system.slice/docker-<id>.scope`` with systemd's, in cgroup v1 (a line for each controller) and v2 (one
    line ``0::…``), or below a parent of one's own.
    """
    longest: tuple[str, ...] = ()
    for line in cgroup.splitlines():
        _, _, path = line.partition(":")[2].partition(":")
        found = tuple(dict.fromkeys(_CONTAINER.findall(path)))
        if len(found) > len(longest):
            longest = found
    return longest


@lru_cache(maxsize=1024)
def user_name(uid: int) -> str:
    """The account's name; the number as text where no account has it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _read(path: Path) -> str:
    """A small file's text; empty where it cannot be read, since processes end while one looks at them."""
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _uid(status: str) -> int | None:
    """The real uid. The owner of /proc/PID will not do: it is root where a process is undumpable."""
    match = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
    return int(match[1]) if match else None


def _name(cmdline: str, comm: str) -> str:
    return cmdline.split("\0", 1)[0] or comm.rstrip("\n")
