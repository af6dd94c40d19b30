"""The server's settings, ``/etc/gpujobs/server.yaml`` or ``--config FILE``: validated like a job file.

A setting is one field of :class:`Settings`: its type, its default, its reader and whether a change of it has to wait
for a restart of the server. All others hold from the reload on (SIGHUP).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Never, TypeVar, cast

from gpujobs.core import forms
from gpujobs.core.errors import InvalidInput, Problem
from gpujobs.core.rules import EVERYBODY, FEATURES, Accounts, Rules, Visibility
from gpujobs.core.spec import Volume, volumes_of
from gpujobs.core.values import (
    Context,
    Fault,
    Faults,
    SpecError,
    boolean,
    choice,
    did_you_mean,
    duration,
    integer,
    not_a,
    number,
    printable,
    size,
    text,
    typed,
    unknown_key,
    wrong,
)
from gpujobs.yamltree import Place, TextError, Tree, path_of
from gpujobs.yamltree import read as read_tree

T = TypeVar("T")

PROBLEMS_MAX = 100
"""Mistakes that are told of one file."""

_CONTEXT = Context(file="", directory="/", home="/nonexistent", variables={})
_LIST = "a list of accounts"
_IMAGE = "a name or glob, such as nvcr.io/nvidia/*"

HABITS = {
    **dict.fromkeys(("admin", "administrators", "root_users"), "admins"),
    **dict.fromkeys(("env", "envs", "variables"), "environment"),
    **dict.fromkeys(("volume", "mount", "mounts", "binds"), "volumes"),
    **dict.fromkeys(("oci_runtime", "docker_runtime", "runtimes", "default_runtime"), "runtime"),
    **dict.fromkeys(("keep", "retention", "keep_containers"), "keep_ended"),
    **dict.fromkeys(("reserve", "reserved_memory", "memory_reserved"), "memory_reserve"),
    **dict.fromkeys(("user", "allowed_users", "accounts", "access"), "users"),
    **dict.fromkeys(("visibility", "privacy", "show_queue"), "queue_visibility"),
    **dict.fromkeys(("allowed", "features", "permissions"), "allow"),
    **dict.fromkeys(("image", "allowed_images", "registries"), "images"),
    **dict.fromkeys(("log_size", "log_limit", "max_log"), "log_tail"),
    **dict.fromkeys(("disk", "disk_limit", "storage"), "layer_size"),
}
"""What people write who come from elsewhere."""


def _runtime(value: object) -> str:
    return text(value, "the name of an OCI runtime", "its name, such as nvidia", limit=128)


def _time(value: object) -> float:
    return duration(value, 0)


def _time_above_0(value: object) -> float:
    return duration(value, 1)


def _part(value: object) -> float:
    part = number(value, "a part of the memory", "a number from 0 to less than 1, such as 0.1", 0, 1)
    if part == 1:
        raise wrong("1 would leave no memory for jobs; write a number from 0 to less than 1, such as 0.1")
    return part


def _account(value: object) -> str:
    name = text(value, "an account", "its name", limit=256)
    if name == "@":
        raise wrong("a group has no name; write @ and its name, such as @students")
    return name


def _accounts(value: object) -> Accounts:
    if not isinstance(value, list | tuple):
        raise not_a(value, _LIST, "[ada, grace]")
    faults = Faults()
    names = [faults.run((index,), _account, item) for index, item in enumerate(value)]
    faults.check()
    return tuple(name for name in names if name is not None)


def _admins(value: object) -> Accounts:
    names = _accounts(value)
    if EVERYBODY in names:
        raise wrong("'*' would make everybody an administrator; name accounts, or groups as @group")
    return names


def _allow(value: object) -> tuple[tuple[str, str, Accounts], ...]:
    """Keys of the job file, their values, and the accounts that may use them."""
    if not isinstance(value, Mapping):
        raise not_a(value, "a mapping of keys of the job file", "{ipc: {host: [ada, '@hpc']}}")
    faults = Faults()
    found: list[tuple[str, str, Accounts]] = []
    for key, inner in value.items():
        if key not in FEATURES:
            faults.add(unknown_key(key, list(FEATURES)), key, at_key=True)
        elif (words := faults.run((key,), _allowed_values, key, inner)) is not None:
            found += ((key, word, accounts) for word, accounts in words)
    faults.check()
    return tuple(found)


def _allowed_values(key: str, value: object) -> list[tuple[str, Accounts]]:
    words = FEATURES[key]
    if not isinstance(value, Mapping):
        raise not_a(value, "a mapping of values to accounts", f"{{{words[0]}: [ada, '@hpc']}}")
    faults = Faults()
    found = []
    for word, accounts in value.items():
        if word not in words:
            faults.add(f"no setting can allow this; allowed are {', '.join(words)}{did_you_mean(word, words)}", word,
                       at_key=True)  # fmt: skip
        elif (names := faults.run((word,), _accounts, accounts)) is not None:
            found.append((word, names))
    faults.check()
    return found


def _images(value: object) -> tuple[tuple[str, Accounts], ...]:
    """Globs for everybody, or a mapping of globs to the accounts that may run them."""
    faults = Faults()
    found: list[tuple[str, Accounts]] = []
    if isinstance(value, Mapping):
        for glob, accounts in value.items():
            known = faults.run_key(glob, lambda key: text(key, "an image", _IMAGE, limit=512))
            names = faults.run((glob,), _accounts, accounts)
            if known is not None and names is not None:
                found.append((known, names))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            known = faults.run((index,), text, item, "an image", _IMAGE, limit=512)
            if known is not None:
                found.append((known, (EVERYBODY,)))
    else:
        raise not_a(value, "a list of images", "[nvcr.io/nvidia/*, python]")
    faults.check()
    return tuple(found)


def _visibility(value: object) -> Visibility:
    return cast("Visibility", choice(value, "how much of others' jobs is shown", ("all", "names-hidden", "counts")))


def _count(value: object) -> int:
    return integer(value, "a number", "a number such as 1000", 1, 10**9)


def _layer_size(value: object) -> int:
    return 0 if typed(value) == 0 else size(value, 64 << 20, "100g, or 0 for no limit")


def _bytes(value: object) -> int:
    return size(value, 1 << 20, "200m")


def _step_memory(value: object) -> int:
    return size(value, 64 << 20, "8g")


def _cpus(value: object) -> float:
    return number(value, "a number of CPUs", "a number such as 4 or 0.5", 0.01, 4096)


def _environment(value: object) -> tuple[tuple[str, str], ...]:
    return forms.environment(value, _CONTEXT)


def _volumes(value: object) -> tuple[Volume, ...]:
    found = volumes_of(value, _CONTEXT)
    faults = Faults()
    for index, volume in enumerate(found):
        if volume.type != "bind":
            faults.add(f"{volume.target}: only directories and files of the host can be given to every job", index)
    faults.check()
    return found


def _setting(default: T, read: Callable[[object], T], *, restart: bool = False) -> T:
    """One setting: what an absent key means, how its value is read, and whether a change waits for a restart."""
    return field(default=default, metadata={"read": read, "restart": restart})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an administrator can set; each default is what an absent key means.

    Attributes:
        runtime: The OCI runtime that gives containers their GPUs.
        keep_ended: Seconds for which an ended job's container is kept.
        memory_reserve: The part of the host's memory that is given to no job, 0-1.
        users: Accounts and groups that may use the server; ``*``: all; empty: whom the socket's mode lets in.
        admins: Accounts and groups that may act on everybody's jobs, besides root.
        queue_visibility: What accounts see of others' jobs.
        allow: Key and value of the job file that are gated, and the accounts that may use them.
        images: Globs of images and the accounts that may run them; empty: everybody may run all.
        runsc_gpus: Whether jobs with GPUs may run under gVisor here.
        submission_jobs: Jobs of one submission.
        array_elements: Elements of one array.
        queued_jobs: Jobs of one account that wait.
        submissions_per_minute: Submissions of one account in a minute.
        connections: Connections of one account at a time.
        streams: Followed logs, watched jobs and uploads of one account at a time.
        log_head: Bytes kept of a log's beginning.
        log_tail: Bytes kept of a log's end.
        layer_size: Bytes that a job may write into its container; 0 for no limit.
        build_memory: Bytes of memory that each step of a build may use.
        build_cpus: CPUs of the same.
        build_time: Seconds that a build may take.
        environment: Variables that every job has, such as proxies and the place of a model cache; the job
            file's win.
        volumes: Mounts that every job has where its owner can open them, such as shared data sets: as in a job
            file, bind mounts only.
    """

    # Which containers can use GPUs is judged by it: those that run already have to be judged anew.
    runtime: str = _setting("nvidia", _runtime, restart=True)
    keep_ended: float = _setting(86400.0, _time)
    # The shapes of all that waits are made with it.
    memory_reserve: float = _setting(0.1, _part, restart=True)
    users: Accounts = _setting((), _accounts)
    admins: Accounts = _setting((), _admins)
    queue_visibility: Visibility = _setting("all", _visibility)
    allow: tuple[tuple[str, str, Accounts], ...] = _setting((), _allow)
    images: tuple[tuple[str, Accounts], ...] = _setting((), _images)
    runsc_gpus: bool = _setting(False, boolean)
    submission_jobs: int = _setting(10_000, _count)
    array_elements: int = _setting(10_000, _count)
    queued_jobs: int = _setting(200_000, _count)
    submissions_per_minute: int = _setting(1200, _count)
    connections: int = _setting(1024, _count)
    streams: int = _setting(512, _count)
    # Logs that are being written go on as they began.
    log_head: int = _setting(200 << 20, _bytes, restart=True)
    log_tail: int = _setting(200 << 20, _bytes, restart=True)
    layer_size: int = _setting(100 << 30, _layer_size)
    build_memory: int = _setting(8 << 30, _step_memory)
    build_cpus: float = _setting(4.0, _cpus)
    build_time: float = _setting(3600.0, _time_above_0)
    environment: tuple[tuple[str, str], ...] = _setting((), _environment)
    volumes: tuple[Volume, ...] = _setting((), _volumes)


    @property
    def rules(self) -> Rules:
        """What is allowed to whom."""
        allow: dict[tuple[str, str], Accounts] = {(key, value): names for key, value, names in self.allow}
        return Rules(allow=allow, images=self.images, runsc_gpus=self.runsc_gpus)


_FIELDS: dict[str, Field[object]] = {item.name: item for item in fields(Settings)}
RESTART = frozenset(name for name, item in _FIELDS.items() if item.metadata["restart"])
"""The settings whose changes hold only after a restart of the server."""


def load(path: Path | None) -> Settings:
    """The settings of a file; the defaults where there is none.

    Raises:
        InvalidInput: It cannot be read or says something that is not allowed; nothing of it is used.
    """
    if path is None:
        return Settings()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"the settings {path} cannot be read: {error.strerror}") from error
    return read(content, str(path))


def read(content: bytes | str, file: str) -> Settings:
    """The settings that a text says.

    Args:
        content: YAML, UTF-8, at most 1 MiB; empty for the defaults.
        file: Its name, for messages.

    Raises:
        InvalidInput: With every mistake, in the file's order.
    """
    try:
        tree = read_tree(content, empty=None, second="a second document begins; the settings are one")
    except TextError as error:
        raise _mistakes(file, [_problem(file, error.note.place, (), error.note.message)]) from error
    problems = [_problem(file, note.place, note.loc, note.message) for note in tree.notes]
    faults = Faults()
    given = _given(tree.value, faults)
    try:
        faults.check()
    except SpecError as error:
        problems += [_of_fault(file, fault, tree) for fault in error.faults]
    if problems:
        raise _mistakes(file, problems)
    return _with(Settings(), given)


def after_reload(now: Settings, wanted: Settings) -> tuple[Settings, tuple[str, ...]]:
    """What holds when a running server takes new settings, and the names of those that wait for its restart."""
    kept = {name: getattr(now, name) for name in _FIELDS if name in RESTART}
    waiting = tuple(name for name, value in kept.items() if value != getattr(wanted, name))
    return _with(wanted, kept), waiting


def _with(settings: Settings, values: dict[str, object]) -> Settings:
    # Each value came from its field's reader, which has the field's type.
    return replace(settings, **cast("dict[str, Never]", values))


def _given(value: object, faults: Faults) -> dict[str, object]:
    """The values of the keys that the file has."""
    if typed(value) is None:
        return {}
    if not isinstance(value, Mapping):
        faults.add("the settings are not a mapping; write keys and values, such as `keep_ended: 24h`")
        return {}
    given: dict[str, object] = {}
    for key, item in value.items():
        if key not in _FIELDS:
            faults.add(unknown_key(key, list(_FIELDS), HABITS), key, at_key=True)
        elif typed(item) is None:
            faults.add("the key has no value; write one, or leave the key out", key)
        else:
            given[key] = faults.run((key,), _FIELDS[key].metadata["read"], item)
    return given


def _of_fault(file: str, fault: Fault, tree: Tree) -> Problem:
    loc = fault.loc
    while loc and loc not in tree.values:  # of a short form the whole is meant
        loc = loc[:-1]
    places = tree.keys if fault.at_key and loc in tree.keys else tree.values
    return _problem(file, places.get(loc, Place(1, 1)), loc, fault.message)


def _problem(file: str, place: Place, loc: tuple[str | int, ...], message: str) -> Problem:
    return Problem(file, place.line, place.column, path_of(loc), printable(message))


def _mistakes(file: str, problems: list[Problem]) -> InvalidInput:
    told = sorted(set(problems))
    many = f"{len(told)} mistakes" if len(told) > 1 else "a mistake"
    rest = "" if len(told) <= PROBLEMS_MAX else f" The first {PROBLEMS_MAX} are shown."
    return InvalidInput(
        f"the settings {file} have {many}", hint=f"docs/operations.md lists the settings.{rest}",
        problems=tuple(told[:PROBLEMS_MAX]),
    )  # fmt: skip
