"""Who may do what: accounts in settings, gated features, rates, and what others' jobs show. Pure.

A feature that takes a job out of its container's usual bounds is off for everybody until the settings name the
accounts that may use it. Whose job it is decides, not who submitted it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import ip_address
from typing import Final, Literal, TypeAlias

from gpujobs.core.errors import Refused
from gpujobs.core.job import Owner
from gpujobs.core.spec import JobSpec

EVERYBODY: Final = "*"
"""In a list of accounts: every account of the machine."""

Accounts: TypeAlias = tuple[str, ...]
"""Accounts as settings name them: ``ada``, ``@group``, ``*``."""

Visibility: TypeAlias = Literal["all", "names-hidden", "counts"]

BUILT: Final = "build"
"""Among the images that settings allow: one that a job builds itself."""

ANY_ADDRESS: Final = "any"
"""The word for ports that are published beyond loopback."""

LOW_PORT: Final = "low"
"""The word for ports that are published where only root's services are."""

UNPRIVILEGED_PORTS: Final = 1024
"""The first port that any account may take (ip(7), ip_unprivileged_port_start); Docker takes the others as root."""

FEATURES: Final[Mapping[str, tuple[str, ...]]] = {
    "ipc": ("host",),
    "network_mode": ("host",),
    "cap_add": ("IPC_LOCK", "NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW", "SYS_NICE", "SYS_PTRACE"),
    "driver_capabilities": ("compat32", "display", "graphics", "ngx", "video"),
    "runtime": ("runsc",),
    "ports": (ANY_ADDRESS, LOW_PORT),
}
"""What settings can allow: keys of the job file and the values that are gated.

The capabilities are those that stay within a container with namespaces of its own. Any other makes files, mounts or
modules of the host its holder's (``DAC_READ_SEARCH`` opens any file by its handle, ``CHOWN`` and ``FOWNER`` make a
setuid program in a mounted home), which no setting may allow.
"""

CAPABILITY_BITS: Final[Mapping[str, int]] = {
    "NET_BIND_SERVICE": 10, "NET_ADMIN": 12, "NET_RAW": 13, "IPC_LOCK": 14, "SYS_PTRACE": 19, "SYS_NICE": 23,
}  # fmt: skip
"""Numbers of linux/capability.h."""

_PORT_WORDS: Final = {
    ANY_ADDRESS: "ports beyond 127.0.0.1",
    LOW_PORT: f"ports: the machine's own below {UNPRIVILEGED_PORTS}",
}

_NETWORK: Final = frozenset({"NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW"})


def groups_in(lists: Iterable[Accounts]) -> frozenset[str]:
    """The groups that lists of accounts name, without their ``@``."""
    return frozenset(name[1:] for accounts in lists for name in accounts if name.startswith("@"))


def among(owner: Owner, accounts: Accounts, gids: Mapping[str, int]) -> bool:
    """Whether an account is one of those that a list names.

    Args:
        owner: The account, with its groups.
        accounts: Names, ``@groups``, or ``*``.
        gids: The groups' numbers, as far as there are such groups.
    """
    return any(
        name == EVERYBODY
        or (gids.get(name[1:]) in owner.groups if name.startswith("@") else name == owner.name)
        for name in accounts
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the settings allow to whom.

    Attributes:
        allow: For a key of :data:`FEATURES` and one of its values, the accounts.
        images: Globs of images and the accounts that may run them; empty: everybody may run all.
        runsc_gpus: Whether this machine's gVisor passes GPUs on.
    """

    allow: Mapping[tuple[str, str], Accounts]
    images: tuple[tuple[str, Accounts], ...] = ()
    runsc_gpus: bool = False

    def lists(self) -> list[Accounts]:
        """All lists of accounts in it."""
        return [*self.allow.values(), *(accounts for _, accounts in self.images)]


def asked(spec: JobSpec) -> list[tuple[str, str]]:
    """The gated features that a job uses, as (key, value)."""
    found = [
        *([("ipc", "host")] if spec.ipc == "host" else []),
        *([("network_mode", "host")] if spec.network_mode == "host" else []),
        *(("cap_add", name) for name in spec.cap_add),
        *(("driver_capabilities", name) for name in spec.driver_capabilities if name not in ("compute", "utility")),
        *([("runtime", spec.runtime)] if spec.runtime is not None else []),
    ]
    if any(not ip_address(port.host_ip).is_loopback for port in spec.ports):
        found.append(("ports", ANY_ADDRESS))
    if any(port.published is not None and port.published < UNPRIVILEGED_PORTS for port in spec.ports):
        found.append(("ports", LOW_PORT))
    return found


def check(spec: JobSpec, owner: Owner, rules: Rules, gids: Mapping[str, int], runtimes: Iterable[str]) -> None:
    """Refuse what the settings do not allow this account.

    Args:
        spec: The job.
        owner: Whose job it is.
        rules: What is allowed to whom.
        gids: The numbers of the groups that the rules name.
        runtimes: The OCI runtimes that the Engine has.

    Raises:
        Refused: With the rule's name.
    """
    for key, value in asked(spec):
        if not among(owner, rules.allow.get((key, value), ()), gids):
            what = _PORT_WORDS[value] if key == "ports" else f"{key}: {value}"
            raise Refused(
                f"{what} is not allowed to {owner.name} here",
                hint=f"The administrator decides: `allow: {{{key}: {{{value}: [{owner.name}]}}}}` in the settings.",
            )
    if spec.runtime is not None:
        if spec.gpus.count and not rules.runsc_gpus:
            raise Refused(
                f"runtime: {spec.runtime} is for jobs without GPUs on this machine",
                hint="Leave runtime out. (The setting `runsc_gpus` says that this machine's gVisor can pass GPUs on.)",
            )
        if spec.runtime not in runtimes:
            raise Refused(
                f"runtime: the Docker Engine of this machine has no runtime {spec.runtime}",
                hint="The administrator can install gVisor and register it; or leave runtime out.",
            )
    if spec.network_mode == "host" and (both := sorted(_NETWORK.intersection(spec.cap_add))):
        raise Refused(
            f"cap_add: {both[0]} and network_mode: host together would be a right over the machine's network",
            hint="Keep one of them.",
        )
    _check_image(spec, owner, rules, gids)


def _check_image(spec: JobSpec, owner: Owner, rules: Rules, gids: Mapping[str, int]) -> None:
    if not rules.images:
        return
    reference = spec.image or BUILT
    mine = [glob for glob, accounts in rules.images if among(owner, accounts, gids)]
    if any(image_matches(reference, glob) for glob in mine):
        return
    what = "build: images of one's own are" if spec.image is None else f"image: {reference} is"
    raise Refused(
        f"{what} not among the images that {owner.name} may run here",
        hint=f"Allowed are {', '.join(mine)}." if mine else "The administrator decides: `images` in the settings.",
    )


def image_matches(reference: str, glob: str) -> bool:
    """Whether an image is one that a glob means.

    Both are taken with the registry and the namespace that Docker adds: ``python:3.12`` is
    ``docker.io/library/python:3.12``. A glob without a tag means every tag and digest. An id goes round names: only a
    glob that is an id's beginning means it. :data:`BUILT` means itself alone.
    """
    if BUILT in (reference, glob) or reference.startswith("sha256:") or glob.startswith("sha256:"):
        return reference == glob or (glob.startswith("sha256:") and fnmatchcase(reference, glob))
    name, tag = _named(reference)
    wanted, wanted_tag = _named(glob, implied="*")
    return fnmatchcase(name, wanted) and fnmatchcase(tag, wanted_tag)


def _named(reference: str, implied: str = "latest") -> tuple[str, str]:
    """An image's full name and its tag or digest."""
    name, at, digest = reference.partition("@")
    head, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        head, tag = name, implied
    first, slash, _ = head.partition("/")
    if not slash:
        head = head if head.startswith("*") else f"docker.io/library/{head}"
    elif not re.search(r"[.:*?\[]", first) and first != "localhost":
        head = f"docker.io/{head}"
    return head, digest if at else tag


def capability_mask(names: Sequence[str]) -> int:
    """Capabilities as the kernel's bits."""
    mask = 0
    for name in names:
        mask |= 1 << CAPABILITY_BITS[name]
    return mask


# -- rates ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is left of an allowance, at a time in seconds."""

    tokens: float
    at: float


def take(bucket: Bucket | None, now: float, per_minute: int) -> tuple[Bucket, float]:
    """Take one from an allowance of so many a minute, all of which may be used at once.

    Args:
        bucket: What was left; None where nothing was taken yet.
        now: Seconds, by a clock that may be set back (no time has passed then).
        per_minute: The allowance, at least 1.

    Returns:
        What is left, and the seconds until there is one; 0 where it was taken.
    """
    if bucket is None:
        tokens = float(per_minute)
    else:
        tokens = min(float(per_minute), bucket.tokens + max(0.0, now - bucket.at) * per_minute / 60)
    if tokens >= 1:
        return Bucket(tokens - 1, now), 0.0
    return Bucket(tokens, now), (1 - tokens) * 60 / per_minute


# -- what others' jobs show ----------------------------------------------------------------------------------------


def discreet(avoid: Mapping[str, str]) -> dict[str, str]:
    """Why GPUs are avoided, without the names of processes, containers and accounts that the clauses hold."""
    return {uuid: _without_names(clause) for uuid, clause in avoid.items()}


def _without_names(clause: str) -> str:
    word, colon, _ = clause.partition(":")
    if colon and word == "stranger":
        return "in use by a process that belongs to no job"
    if " " in word:
        return "in use by something that is no job of this server"
    return word
