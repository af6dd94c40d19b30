"""Reading job files to send them: their text, the variables they name, the env files they mention.

The server parses and validates; this looks only for what it cannot see from where it is. Finding too much is
harmless, and what is not found the server names as missing.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpujobs import places, wire
from gpujobs.core.errors import InvalidInput, Problem
from gpujobs.core.values import Context
from gpujobs.faces.secretfiles import as_sent, secrets_of

MAX_FILE_BYTES = 1 << 20

_KEY = re.compile(r"^(?:env_file|\"env_file\"|'env_file')[ \t]*:(?:[ \t]+|$)(.*)$", re.MULTILINE)
_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Za-z_][A-Za-z0-9_]*)(?::?[-?+]([^}]*))?\}|([A-Za-z_][A-Za-z0-9_]*))")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BARE = re.compile(
    r"""^[ \t]*(?:-[ \t]+["']?([A-Za-z_]\w*)["']?|["']?([A-Za-z_]\w*)["']?[ \t]*:[ \t]*(?:~|null)?)"""
    r"""[ \t]*(?:\#.*)?$""",
    re.MULTILINE | re.ASCII,
)
_FLOW = re.compile(r"^[ \t]*(?:environment|args)[ \t]*:[ \t]*[\[{]([^\]}]*)", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*-[ \t]*(.*)$")


def submission(
    files: Sequence[str], environ: Mapping[str, str], *, run_as: str | None = None, secrets: bool = True
) -> dict[str, Any]:
    """The body of ``POST /v1/jobs`` for these files; ``-`` is the standard input.

    Args:
        files: Names as the user wrote them.
        environ: Where the values of the variables come from.
        run_as: The account to run as; for root and administrators. No secret is read then.
        secrets: Whether the secrets' values are sent; else only whether they are there.

    Raises:
        InvalidInput: A file cannot be read, is too big, or is not UTF-8; a path or a variable's value is not
            UTF-8; the working directory is gone.
    """
    try:
        here = Path.cwd()
    except OSError as error:
        raise InvalidInput("the working directory is not there any more", hint="`cd` to one that is.") from error
    entries: list[dict[str, Any]] = []
    variables: dict[str, str] = {}
    env_files: dict[str, str] = {}
    for name in files:
        text = read_text(name)
        base = here if name == "-" else (here / name).parent
        if not _is_text(name) or not _is_text(str(base)):
            raise InvalidInput(f"the path {str(base / name)!r} is not UTF-8")
        entry: dict[str, Any] = {"file": shown_name(name), "directory": str(base), "text": text}
        if found := secrets_of(text, file_context(name, base, environ), own=run_as is None):
            entry["secrets"] = as_sent(found, values=secrets)
        entries.append(entry)
        variables.update(variables_of(text, environ))
        for path, content in env_files_of(text, base, environ).items():
            if env_files.setdefault(path, content) != content:
                raise InvalidInput(f"{path} means different files in these job files", hint="Submit them one by one.")
    return {
        "files": entries,
        "variables": variables,
        "home": str(places.home(environ)),
        "working_directory": str(here),
        "env_files": env_files,
        "run_as": run_as,
        "options": {},
    }


def file_context(name: str, base: Path, environ: Mapping[str, str]) -> Context:
    """What a job file's paths and variables are read with."""
    return Context(file=shown_name(name), directory=str(base), home=str(places.home(environ)), variables=environ)


def read_bytes(name: str) -> bytes:
    """A job file as it is, or its first 1 MiB and a byte where it is longer.

    Raises:
        InvalidInput: It cannot be read.
    """
    try:
        if name == "-":
            return sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        with Path(name).open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidInput(f"{shown_name(name)}: {reason}") from error


def read_text(name: str) -> str:
    """A job file's text.

    Raises:
        InvalidInput: It cannot be read, is over 1 MiB, or is not UTF-8.
    """
    data, shown = read_bytes(name), shown_name(name)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidInput(f"{shown}: a job file has at most 1 MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode(errors="replace")) + 1
        message = f"the byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        problem = Problem(shown, line, column, "", message)
        raise InvalidInput(f"{shown} has a mistake", problems=(problem,)) from error


def shown_name(name: str) -> str:
    """A file's name in messages."""
    return "<stdin>" if name == "-" else name


def variables_of(text: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The values of the variables that a text names, as far as there are any.

    They are named as ``${NAME}`` anywhere, and where Compose takes a name without a value, as ``- NAME`` and
    ``NAME:``.

    Raises:
        InvalidInput: A value is not UTF-8.
    """
    names = wire.variables_in(text) | {name for pair in _BARE.findall(text) for name in pair if name}
    for flow in _FLOW.findall(text):
        names |= set(_WORD.findall(flow))
    found = {name: environ[name] for name in sorted(names) if name in environ}
    for name, value in found.items():
        if not _is_text(value):
            raise InvalidInput(f"the value of the variable {name} is not UTF-8")
    return found


def env_files_of(text: str, directory: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The texts of the env files that a job file mentions, by the path as written there, variables replaced.

    Those that are missing, too big, no regular files or not UTF-8 are left out: the server says so.
    """
    texts = {}
    for written in _mentioned(text):
        named = _substituted(written, environ)
        path = directory / Path(named).expanduser()
        try:
            # A pipe that nobody writes must not hang the command.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    continue
                data = file.read(MAX_FILE_BYTES + 1)
            if len(data) <= MAX_FILE_BYTES:
                texts[named] = data.decode()
        except (OSError, ValueError, RuntimeError):
            continue
    return texts


def _mentioned(text: str) -> Iterator[str]:
    """The paths under the key ``env_file``: a scalar, a list of either form, entries with ``path:``."""
    for key in _KEY.finditer(text):
        value = _uncommented(key[1]).strip()
        if value.startswith("["):
            flow = text[key.start(1) + key[1].index("[") + 1 :].split("]", 1)[0]
            yield from _paths(",".join(_uncommented(line) for line in flow.splitlines()).split(","))
        elif value:
            yield from _paths([value])
        else:
            yield from _paths(_items(text[key.end() :]))


def _items(text: str) -> Iterator[str]:
    """The values of the block list that a text begins with, and of their ``path:`` keys."""
    for line in text.splitlines():
        stripped = _uncommented(line).strip()
        if not stripped:
            continue
        item = _ITEM.match(line)
        if item is None and not line.startswith((" ", "\t")):
            return
        yield _uncommented(item[1]).strip() if item else stripped


def _paths(values: Sequence[str] | Iterator[str]) -> Iterator[str]:
    for value in values:
        value = value.strip().strip("{}").strip()
        if value.startswith("required:"):
            continue
        value = value.removeprefix("path:").strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if value and "\0" not in value:
            yield value


def _uncommented(line: str) -> str:
    return "" if line.lstrip().startswith("#") else line.split(" #", 1)[0]


def _substituted(text: str, environ: Mapping[str, str]) -> str:
    """``$NAME``, ``${NAME}`` and ``${NAME:-default}`` replaced, ``$$`` a dollar sign."""
    return _VARIABLE.sub(lambda m: "$" if m[1] else environ.get(m[2] or m[4]) or m[3] or "", text)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
