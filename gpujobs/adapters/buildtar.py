"""A client's build context made fit for the Engine, in one pass over its tar file.

The file comes from whoever wants a build, so it is read as hostile and written anew: the Engine extracts as root
(in a directory of its own, chrooted) what was understood here, never the bytes that came. Devices, sockets,
sparse files, names that lead out, owners and extended attributes do not pass.

The Dockerfile for the Engine has a name of its own in the new file, last in it, and is ignored by ``COPY .`` as the
user's own is where ``.dockerignore`` says so.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

from gpujobs.buildcontext import IGNORE_FILE, MAX_BYTES, MAX_IGNORE_BYTES, MAX_MEMBERS, Ignore
from gpujobs.core.dockerfile import MAX_BYTES as MAX_DOCKERFILE_BYTES
from gpujobs.core.errors import InvalidInput

DOCKERFILE = ".gpujobs.dockerfile"
"""The name of the Dockerfile that the Engine is given."""

_KINDS = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
_MAX_NAME = 4096
_MAX_HEADER = 1 << 16


@dataclass(slots=True)
class Context:
    """A build context on its way to the Engine: everything but the Dockerfile is written.

    Attributes:
        dockerfile: The user's Dockerfile.
    """

    dockerfile: str
    _archive: tarfile.TarFile
    _file: BinaryIO
    _ignore: str
    _kept: list[tuple[tarfile.TarInfo, bytes]] = field(default_factory=list)

    def finish(self, dockerfile: str) -> None:
        """Put the Engine's Dockerfile in and end the file.

        It ends in the two empty blocks that end a tar file, without the padding that usually follows: the Engine
        does not read that, and looks for a client that has gone only once it has read all that was sent.
        """
        ignored = f"{self._ignore}\n{DOCKERFILE}\n" + ("" if self._ignore else f"{IGNORE_FILE}\n")
        for name, text in ((IGNORE_FILE, ignored), (DOCKERFILE, dockerfile)):
            data = text.encode("utf-8", "surrogateescape")
            self._archive.addfile(_plain(name, len(data)), io.BytesIO(data))
        end = self._file.tell() + 2 * tarfile.BLOCKSIZE
        self._archive.close()
        self._file.truncate(end)
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rewrite(source: Path, target: BinaryIO, dockerfile: str, *, limit: int = MAX_BYTES,
            cancelled: Callable[[], bool] = lambda: False) -> Context:  # fmt: skip
    """Copy a context's tar file, all but its Dockerfile; close what is returned.

    Args:
        source: The client's tar file.
        target: An empty file for the new one.
        dockerfile: The Dockerfile's path in it.
        limit: The most bytes of files.
        cancelled: Asked between members whether to give up.

    Raises:
        InvalidInput: It is no tar file, or has something that a build context may not have.
    """
    wanted = posixpath.normpath(dockerfile)
    try:
        archive = tarfile.open(  # noqa: SIM115 - the context closes it
            fileobj=target, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
        )
        with tarfile.open(source, "r:", tarinfo=_Member, encoding="utf-8", errors="surrogateescape") as given:
            return _Copy(given, archive, target, wanted, limit, cancelled).run()
    except tarfile.TarError as error:
        raise InvalidInput(f"the build context is no tar file: {error}") from error
    except (EOFError, ValueError, OverflowError) as error:
        raise InvalidInput(f"the build context's tar file is damaged: {error}") from error


class _Member(tarfile.TarInfo):
    """A header as it is read: those whose size the sender chooses must not fill the memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        headers = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if self.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE):
            raise InvalidInput("the build context's tar file has global headers or sparse files; no build can use them")
        if self.type in headers and self.size > _MAX_HEADER:
            raise InvalidInput("the build context's tar file has a header that is too large")
        return super()._proc_member(archive)  # type: ignore[misc, no-any-return]

    def _refuse_sparse(self, *_: object) -> None:
        raise InvalidInput("the build context's tar file has sparse files; no build can use them")

    # What a header of GNU's sparse formats makes tarfile do: lists as long as the sender likes.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Copy:
    def __init__(
        self, given: tarfile.TarFile, archive: tarfile.TarFile, target: BinaryIO, dockerfile: str, limit: int,
        cancelled: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._given = given
        self._archive = archive
        self._target = target
        self._dockerfile = dockerfile
        self._limit = limit
        self._cancelled = cancelled
        self._bytes = self._members = 0

    def run(self) -> Context:
        """Copy all members; the Dockerfile and the ignore file are kept for the end."""
        own: tuple[tarfile.TarInfo, bytes] | None = None
        ignore = b""
        # One at a time: the list that tarfile keeps of a hostile file's members would fill the memory.
        while (member := self._given.next()) is not None:
            self._given.members = []  # type: ignore[attr-defined]
            if self._cancelled():
                raise InvalidInput("the build was given up")
            info = self._checked(member)
            if info is None:
                continue
            if info.name == IGNORE_FILE:
                ignore = self._text(member, IGNORE_FILE, MAX_IGNORE_BYTES)
            elif info.name == self._dockerfile:
                own = info, self._text(member, self._dockerfile, MAX_DOCKERFILE_BYTES)
            elif info.name != DOCKERFILE:
                self._archive.addfile(info, self._given.extractfile(member) if info.isreg() else None)
        if own is None:
            raise InvalidInput(f"there is no {self._dockerfile} in the build context")
        rules = _decoded(ignore, IGNORE_FILE)
        if not Ignore(rules).ignores(self._dockerfile):
            self._archive.addfile(own[0], io.BytesIO(own[1]))
        return Context(_decoded(own[1], self._dockerfile), self._archive, self._target, rules)

    def _checked(self, member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """The member as it is written: nothing but its name, kind, mode, time, size and where a link leads."""
        name = _safe_name(member.name)
        if name == ".":
            return None
        if member.type not in _KINDS or member.issparse():
            raise InvalidInput(f"the build context has a file of a kind that no build can use: {name[:200]}")
        self._members += 1
        self._bytes += member.size if member.isreg() else 0
        if self._members > MAX_MEMBERS:
            raise InvalidInput(f"the build context has more than {MAX_MEMBERS:,} files")
        if self._bytes > self._limit:
            raise InvalidInput(f"the build context has more than {self._limit:,} bytes")
        info = tarfile.TarInfo(name)
        info.type = tarfile.REGTYPE if member.type == tarfile.AREGTYPE else member.type
        info.mode = member.mode & 0o7777
        info.mtime = min(max(0, int(member.mtime)), 2**33)
        if member.isreg():
            info.size = member.size
        elif member.islnk():
            info.linkname = _safe_name(member.linkname)
        elif member.issym():
            info.linkname = member.linkname
            if not 0 < len(info.linkname) <= _MAX_NAME or "\0" in info.linkname:
                raise InvalidInput(f"the build context has a link that leads nowhere: {name[:200]}")
        return info

    def _text(self, member: tarfile.TarInfo, name: str, limit: int) -> bytes:
        file = self._given.extractfile(member) if member.isreg() else None
        if file is None:
            raise InvalidInput(f"{name} in the build context is no file")
        if member.size > limit:
            raise InvalidInput(f"{name} in the build context is larger than {limit >> 20} MiB")
        return file.read()


def _safe_name(name: str) -> str:
    """A name within the context.

    Raises:
        InvalidInput: It leads out.
    """
    cleaned = posixpath.normpath(name)
    if name.startswith("/") or cleaned.split("/")[0] == ".." or not name or "\0" in name or len(name) > _MAX_NAME:
        raise InvalidInput(f"the build context has a name that leads out of it: {name[:200]!r}")
    return cleaned


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error


def _plain(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info
