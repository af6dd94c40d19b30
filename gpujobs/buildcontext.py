"""Build contexts: a directory as a tar file, without what its ``.dockerignore`` names (standard library only).

The client packs the directory as the account that runs it, so a build has what that account may read and nothing
else. The rules of ``.dockerignore`` are Docker's own (https://docs.docker.com/build/concepts/context/#syntax and
moby/patternmatcher): the last line that matches decides, ``!`` takes back, ``**`` is any number of directories.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Protocol

from gpujobs.core.errors import InvalidInput

MAX_BYTES = 2 << 30
"""The size of a context, in bytes of its files."""

MAX_MEMBERS = 500_000
IGNORE_FILE = ".dockerignore"
MAX_IGNORE_BYTES = 1 << 20

_CHUNK = 1 << 20
_NAMED = 5
"""How many of the largest directories an error names."""


class Sink(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> object:
        """Take all of them."""
        ...


@dataclass(frozen=True, slots=True)
class _Pattern:
    text: str
    negative: bool
    matches: re.Pattern[str]


class Ignore:
    """The rules of one ``.dockerignore``.

    Args:
        text: The file.

    Raises:
        InvalidInput: A line is no pattern.
    """

    def __init__(self, text: str) -> None:
        self._patterns: list[_Pattern] = []
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            if not line.startswith("#") and (words := line.strip()):
                self._add(words, number)

    def _add(self, words: str, number: int) -> None:
        negative = words.startswith("!")
        pattern = words[1:].strip() if negative else words
        if not pattern:
            raise InvalidInput(f"{IGNORE_FILE}:{number}: '!' alone takes back nothing; name what it takes back")
        pattern = _clean(pattern)
        if len(pattern) > 1:
            pattern = pattern.removeprefix("/")
        try:
            self._patterns.append(_Pattern(pattern, negative, re.compile(_expression(pattern))))
        except (re.error, ValueError) as error:
            raise InvalidInput(f"{IGNORE_FILE}:{number}: {pattern!r} is no pattern: {error}") from error

    def always(self, path: str) -> None:
        """Never ignore this one."""
        if self.ignores(path):
            self._patterns.append(_Pattern(path, True, re.compile(re.escape(path))))

    def ignores(self, path: str) -> bool:
        """Whether a path, relative to the context, is left out: by itself or with a directory that it is in."""
        parts = path.split("/")
        prefixes = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        ignored = False
        for pattern in self._patterns:
            if pattern.negative == ignored and any(pattern.matches.fullmatch(prefix) for prefix in prefixes):
                ignored = not pattern.negative
        return ignored

    def may_take_back_below(self, directory: str) -> bool:
        """Whether a ``!`` line could take back something in a directory that is left out."""
        below = directory + "/"
        return any(pattern.negative and (pattern.text + "/").startswith(below) for pattern in self._patterns)


def _clean(path: str) -> str:
    """Go's filepath.Clean: shortest form, one leading slash at most."""
    cleaned = posixpath.normpath(path)
    return cleaned[1:] if cleaned.startswith("//") else cleaned


def _expression(pattern: str) -> str:
    """The regular expression of a pattern: moby/patternmatcher's conversion, character by character."""
    parts: list[str] = []
    position = 0
    while position < len(pattern):
        char = pattern[position]
        position += 1
        if char == "*" and pattern[position : position + 1] == "*":
            position += 1
            if pattern[position : position + 1] == "/":
                position += 1
            parts.append(".*" if position == len(pattern) else "(?:.*/)?")
        elif char == "*":
            parts.append("[^/]*")
        elif char == "?":
            parts.append("[^/]")
        elif char == "\\":
            if position == len(pattern):
                raise ValueError("it ends in a backslash")
            parts.append(re.escape(pattern[position]))
            position += 1
        elif char == "[":
            expression, position = _class(pattern, position)
            parts.append(expression)
        else:
            parts.append(re.escape(char))
    return "".join(parts)


def _class(pattern: str, position: int) -> tuple[str, int]:
    """A ``[…]`` from behind its bracket on: ranges, ``^`` for the others, a backslash before what is meant as it is."""
    negated = pattern[position : position + 1] == "^"
    position += negated
    members: list[str] = []
    while position < len(pattern) and (pattern[position] != "]" or not members):
        char = pattern[position]
        if char == "\\":
            position += 1
            if position == len(pattern):
                break
            char = pattern[position]
            members.append(re.escape(char))
        else:
            members.append("-" if char == "-" and members else re.escape(char))
        position += 1
    if position >= len(pattern) or not members:
        raise ValueError("a [ is not closed")
    return f"[{'^' * negated}{''.join(members)}]", position + 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that is packed: its path in the context, and what it was when it was looked at."""

    name: str
    path: str
    status: os.stat_result


def entries(context: Path, dockerfile: str, ignore: Ignore | None = None) -> Iterator[Entry]:
    """What of a directory belongs to the context, sorted by name.

    Raises:
        InvalidInput: Something cannot be read, or is neither a file, a directory nor a link.
    """
    rules = Ignore(_ignore_text(context)) if ignore is None else ignore
    rules.always(IGNORE_FILE)
    rules.always(dockerfile)
    return _walk(str(context), "", rules)


def _walk(directory: str, prefix: str, rules: Ignore) -> Iterator[Entry]:
    try:
        with os.scandir(directory) as found:
            children = sorted(found, key=lambda child: os.fsencode(child.name))
    except OSError as error:
        raise _unreadable(prefix.rstrip("/") or directory, error) from error
    for child in children:
        name = prefix + child.name
        ignored = rules.ignores(name)
        try:
            status = child.stat(follow_symlinks=False)
        except OSError as error:
            if ignored:
                continue
            raise _unreadable(name, error) from error
        if stat.S_ISDIR(status.st_mode):
            if not ignored:
                yield Entry(name, child.path, status)
            if not ignored or rules.may_take_back_below(name):
                yield from _walk(child.path, f"{name}/", rules)
        elif not ignored:
            _check_kind(name, child.path, status.st_mode)
            yield Entry(name, child.path, status)


def _check_kind(name: str, path: str, mode: int) -> None:
    kinds = {stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    if (kind := kinds.get(stat.S_IFMT(mode))) is not None:
        raise InvalidInput(f"the build context has {kind}: {name}", hint=f"Name it in {IGNORE_FILE}, or remove it.")
    if stat.S_ISREG(mode) and not os.access(path, os.R_OK, effective_ids=True):
        raise _unreadable(name, PermissionError(13, "Permission denied"))


def _ignore_text(context: Path) -> str:
    try:
        descriptor = os.open(context / IGNORE_FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise _unreadable(IGNORE_FILE, error) from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InvalidInput(f"{IGNORE_FILE} is no file")
        data = file.read(MAX_IGNORE_BYTES + 1)
    if len(data) > MAX_IGNORE_BYTES:
        raise InvalidInput(f"{IGNORE_FILE} is larger than {MAX_IGNORE_BYTES >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{IGNORE_FILE} is not UTF-8: {error.reason} at byte {error.start}") from error


def pack(
    context: Path, dockerfile: str, write: Sink, *, limit: int = MAX_BYTES,
    told: Callable[[int, int], None] = lambda _packed, _all: None,
) -> int:  # fmt: skip
    """Write a directory as a tar file: the same bytes for the same files, all of them root's.

    Args:
        context: The directory.
        dockerfile: The Dockerfile's path in it, which is packed whatever ``.dockerignore`` says.
        write: Where the tar file goes.
        limit: The most bytes of files.
        told: Told now and then how many bytes of files are packed, and of how many.

    Returns:
        The tar file's size in bytes.

    Raises:
        InvalidInput: It is too large, has no Dockerfile, or something in it cannot be packed; nothing or a part
            has been written then.
    """
    found = _checked(context, dockerfile, limit)
    whole = sum(_size(entry) for entry in found)
    counted = _Counted(write)
    packed = 0
    with tarfile.open(
        fileobj=_as_file(counted), mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for entry in found:
            told(packed, whole)
            _add(archive, entry)
            packed += _size(entry)
    told(whole, whole)
    return counted.size


def _checked(context: Path, dockerfile: str, limit: int) -> list[Entry]:
    if not context.is_dir():
        raise InvalidInput(f"the build context {context} is no directory that this account can enter")
    found, total = [], 0
    for entry in entries(context, dockerfile):
        found.append(entry)
        total += _size(entry)
        if len(found) > MAX_MEMBERS:
            raise InvalidInput(
                f"the build context {context} has more than {MAX_MEMBERS:,} files",
                hint=f"Name in {IGNORE_FILE} what the build does not need.",
            )
    if total > limit:
        raise InvalidInput(
            f"the build context {context} has {_shown(total)}, at most {_shown(limit)} are taken. The largest in it: "
            + ", ".join(f"{name} {_shown(size)}" for name, size in _largest(found)),
            hint=f"Name in {IGNORE_FILE} what the build does not need; data belongs into `volumes`.",
        )
    if not any(entry.name == dockerfile for entry in found):
        raise InvalidInput(f"there is no {dockerfile} in the build context {context}",
                           hint="`build: {context: DIRECTORY, dockerfile: PATH}` says where it is.")  # fmt: skip
    if not all(stat.S_ISREG(entry.status.st_mode) for entry in found if entry.name in (dockerfile, IGNORE_FILE)):
        raise InvalidInput(f"{dockerfile} and {IGNORE_FILE} must be files in the build context, not links")
    return found


def _size(entry: Entry) -> int:
    return entry.status.st_size if stat.S_ISREG(entry.status.st_mode) else 0


def _largest(found: list[Entry]) -> list[tuple[str, int]]:
    """The largest directories and files at the top, and where one has nearly all, those in it."""
    sizes: dict[str, int] = {}
    for entry in found:
        if stat.S_ISDIR(entry.status.st_mode):
            continue
        parts = entry.name.split("/")
        for depth in range(1, len(parts) + 1):
            name = "/".join(parts[:depth]) + "/" * (depth < len(parts))
            sizes[name] = sizes.get(name, 0) + _size(entry)
    level = ""
    while True:
        inside = {name: size for name, size in sizes.items() if _is_directly_in(name, level)}
        first = max(inside, key=lambda name: inside[name], default="")
        below = [name for name in sizes if first.endswith("/") and _is_directly_in(name, first)]
        if len(below) < 2 or inside[first] < 0.9 * sum(inside.values()):
            break
        level = first
    return sorted(inside.items(), key=lambda item: (-item[1], item[0]))[:_NAMED]


def _is_directly_in(name: str, directory: str) -> bool:
    return name.startswith(directory) and name != directory and "/" not in name[len(directory) : -1]


def _add(archive: tarfile.TarFile, entry: Entry) -> None:
    info = tarfile.TarInfo(entry.name)
    info.mode, info.mtime = stat.S_IMODE(entry.status.st_mode), int(entry.status.st_mtime)
    if stat.S_ISDIR(entry.status.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(entry.status.st_mode):
        info.type = tarfile.SYMTYPE
        try:
            info.linkname = os.readlink(entry.path)
        except OSError as error:
            raise _unreadable(entry.name, error) from error
    else:
        _add_file(archive, info, entry)
        return
    archive.addfile(info)


def _add_file(archive: tarfile.TarFile, info: tarfile.TarInfo, entry: Entry) -> None:
    try:
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(entry.name, error) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino, status.st_size) != (
            entry.status.st_dev, entry.status.st_ino, entry.status.st_size,
        ):  # fmt: skip
            raise _changed(entry.name)
        info.size = status.st_size
        try:
            archive.addfile(info, file)
        except OSError as error:
            if error.errno is None:  # tarfile's word for a file that ends early
                raise _changed(entry.name) from error
            raise


def _changed(name: str) -> InvalidInput:
    return InvalidInput(f"{name} changed while it was packed", hint="Try again when nothing writes to it.")


def _unreadable(name: str, error: OSError) -> InvalidInput:
    return InvalidInput(
        f"the build context has what cannot be read: {name}: {error.strerror or error}",
        hint=f"Name it in {IGNORE_FILE}, or make it readable.",
    )


def _shown(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


class _Counted:
    """A sink that counts."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.size = 0

    def write(self, data: bytes) -> int:
        self._sink.write(data)
        self.size += len(data)
        return len(data)


def _as_file(sink: _Counted) -> IO[bytes] | BinaryIO:
    """What tarfile's stream mode asks of a file is ``write`` alone."""
    return sink  # type: ignore[return-value]
