"""Compose's keys: how each is written in the job file, what is refused in it, and its JSON Schema."""

from __future__ import annotations

import posixpath
import re
import shlex
import signal
from collections.abc import Mapping
from ipaddress import ip_address

from gpujobs.core.patterns import any_case, between
from gpujobs.core.values import (
    TEXT,
    Context,
    Faults,
    Json,
    SpecError,
    boolean,
    describe,
    did_you_mean,
    not_a,
    shown,
    source,
    templated,
    text,
    typed,
    unknown_key,
    wrong,
)

Pairs = tuple[tuple[str, str], ...]

ARGUMENT_MAX = 128 * 1024 - 1
"""Of one argument or one NAME=value, in bytes: the kernel's MAX_ARG_STRLEN, less the closing NUL."""

SCALAR: Json = {"type": ["string", "number", "boolean"]}

# ---------------------------------------------------------------------------------------------- names

_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]{0,127}")
NAME_SCHEMA = templated(
    {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9_.=+-]{0,127}$"},
    allowed="letters, digits and . _ - = +, beginning with a letter or digit",
)


def job_name(value: object) -> str:
    """A job's name: it goes into tables and labels as it is."""
    name = text(value, "a name", "a text, such as train-resnet50")
    if len(name) > 128:
        raise wrong(f"the name has {len(name)} characters; at most 128 are allowed")
    if not _JOB_NAME.fullmatch(name):
        raise wrong(
            f"{shown(name)} is not a name; write letters, digits and . _ - = +, beginning with a letter or digit"
        )
    return name


def name_of_file(path: str) -> str:
    """The nearest name to a file's: ``train`` for ``sweeps/train.yaml``; ``job`` where nothing of it can be one."""
    stem = path.rsplit("/", 1)[-1].partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_=+-]", "-", stem).lstrip("_=+-")[:128] or "job"


_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_PART = re.compile(r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}(?::[0-9]{1,5})?|\[[0-9a-fA-F:]{2,45}\](?::[0-9]{1,5})?")
_REGISTRY = rf"(localhost(:[0-9]{{1,5}})?|(?=[^/]*[.:]){_HOST.pattern})"
_IMAGE_EXAMPLE = "a reference such as pytorch/pytorch:2.4.0-cuda12.4-cudnn9-runtime"
IMAGE_SCHEMA = templated(
    {
        "type": "string",
        "maxLength": 512,
        "pattern": (
            rf"^(sha256:[0-9a-f]{{64}}|(?!sha256(:|@|$))({_REGISTRY}/)?{_PART.pattern}(/{_PART.pattern})*"
            rf"(:{_TAG.pattern})?(@sha256:[0-9a-f]{{64}})?)$"
        ).replace("(?:", "("),
    },
    allowed=_IMAGE_EXAMPLE,
)


def image(value: object) -> str:
    """An image reference: ``[registry[:port]/]name[:tag][@sha256:digest]``, or an id ``sha256:…``."""
    reference = text(value, "an image", _IMAGE_EXAMPLE, limit=512)
    if re.fullmatch(r"sha256:[0-9a-f]{64}", reference):
        return reference
    name, at, digest = reference.partition("@")
    if at and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise wrong(f"{shown(digest)} is not a digest; write sha256: and 64 hexadecimal digits after @")
    head, colon, tag = name.rpartition(":")
    if colon and "/" not in tag:
        if not _TAG.fullmatch(tag):
            raise wrong(f"{shown(tag)} is not a tag; write letters, digits and . _ - after the colon, such as :latest")
        name = head
    if name.startswith(("http://", "https://", "docker://")):
        raise wrong(
            f"{shown(reference)} is an address; write {_IMAGE_EXAMPLE}; did you mean `{reference.split('://', 1)[1]}`?"
        )
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        if not _HOST.fullmatch(first):
            raise wrong(f"{shown(first)} is not a registry; write host or host:port before the first slash")
        name = rest
    if name == "sha256":
        raise wrong(f"{shown(reference)} is not an image's id; write sha256: and 64 hexadecimal digits")
    if any(not _PART.fullmatch(part) for part in name.split("/")):
        lower = reference.lower()
        near = (
            f"; did you mean `{lower}`?"
            if reference != lower and all(_PART.fullmatch(part) for part in name.lower().split("/"))
            else ""
        )
        what = "image names are lower case" if near else f"write {_IMAGE_EXAMPLE}"
        raise wrong(f"{shown(reference)} is not an image; {what}{near}")
    return reference


def signal_name(value: object) -> str:
    """A signal by name or number, as ``SIGTERM``."""
    real = typed(value)
    words = str(real).strip().upper() if isinstance(real, str | int) and not isinstance(real, bool) else ""
    known = {item.name: item.value for item in signal.Signals}
    if re.fullmatch("[1-9][0-9]{0,2}", words):
        for name, code in known.items():
            if code == int(words):
                return name
        if signal.SIGRTMIN < int(words) < signal.SIGRTMAX:
            return f"SIGRTMIN+{int(words) - signal.SIGRTMIN}"
    full = words if words.startswith("SIG") else f"SIG{words}"
    if full in known:
        return full
    offset = re.fullmatch(r"SIGRT(?:MIN\+|MAX-)([0-9]{1,2})", full)
    if offset is not None and int(offset[1]) <= signal.SIGRTMAX - signal.SIGRTMIN:
        return full
    near = did_you_mean(full, known) if len(words) > 2 and words[0].isalpha() else ""
    raise wrong(f"{describe(value)} is not a signal; write a name such as SIGTERM or SIGINT, or its number{near}")


_SIGNALS = "|".join(any_case(word) for word in sorted(item.name[3:] for item in signal.Signals))
_REALTIME = signal.SIGRTMAX - signal.SIGRTMIN
_NO_SIGNALS = [code for code in range(1, signal.SIGRTMAX) if code not in signal.valid_signals()]
"""The numbers that the C library keeps for itself: 32 and 33."""

SIGNAL_SCHEMA = templated(
    {"type": "integer", "minimum": 1, "maximum": int(signal.SIGRTMAX), "not": {"enum": _NO_SIGNALS}},
    {
        "type": "string",
        "pattern": (
            rf"^\s*((?!({'|'.join(map(str, _NO_SIGNALS))})\s*$){between(1, signal.SIGRTMAX)}|({any_case('SIG')})?"
            rf"({_SIGNALS}|{any_case('RT')}({any_case('MIN')}\+|{any_case('MAX')}-)0?{between(0, _REALTIME)}))\s*$"
        ),
    },
    allowed="a name such as SIGTERM or SIGINT, or its number",
)

# ---------------------------------------------------------------------------------------------- argv


def argument(value: object) -> str:
    """One argument: the text as the file has it, also of a number."""
    real = typed(value)
    if real is None or isinstance(real, Mapping | list):
        braces = " (a text that begins with { needs quotes)" if isinstance(real, Mapping) else ""
        raise wrong(f'{describe(value)} is not an argument; write a text, or "" for an empty one{braces}')
    words = source(value)
    if len(words.encode()) > ARGUMENT_MAX:
        raise wrong(f"the argument has {len(words.encode()):,} bytes; the kernel takes at most {ARGUMENT_MAX:,}")
    return words


def argv(value: object) -> tuple[str, ...]:
    """A command: a list of arguments, or a text that is split as a shell splits words (no shell runs)."""
    if isinstance(value, list | tuple):
        faults = Faults()
        words = [faults.run((index,), argument, item) for index, item in enumerate(value)]
        faults.check()
        return tuple(word for word in words if word is not None)
    if not isinstance(typed(value), str):
        raise not_a(value, "a command", "a text or a list, such as [python, train.py]")
    try:
        result = tuple(shlex.split(str(value)))
    except ValueError as error:
        problem = "a quote is not closed" if "quotation" in str(error) else "it ends with a lone backslash"
        raise wrong(f"{shown(str(value))} cannot be split into words: {problem}; close it, or write a list") from error
    for word in result:
        argument(word)
    return result


ARGV_SCHEMA: Json = {"anyOf": [{"type": "string"}, {"type": "array", "items": SCALAR}]}

# ---------------------------------------------------------------------------------------------- environment

_RESERVED = re.compile(r"(NVIDIA|GPUJOBS)_.*", re.DOTALL)


def env_name(name: str) -> str:
    """A name for an environment variable that the job's owner may set."""
    if not name or "=" in name or any(char.isspace() or not char.isprintable() for char in name):
        raise wrong(f"{shown(name)} is not a variable's name; write letters, digits and _, such as OMP_NUM_THREADS")
    if name == "NVIDIA_DRIVER_CAPABILITIES":
        raise wrong(f"{shown(name)} is set by gpujobs: ask with driver_capabilities:")
    if name.startswith("NVIDIA_"):
        raise wrong(f"{shown(name)} is set by gpujobs: ask with gpus:")
    if name.startswith("GPUJOBS_"):
        raise wrong(f"{shown(name)} is set by gpujobs; choose another name")
    if len(name) > 256:
        raise wrong(f"{shown(name)} has {len(name):,} characters; at most 256 are allowed")
    return name


def _env_value(name: str, value: str) -> str:
    if "\0" in value:
        raise wrong("the value contains a NUL character; no environment can hold one")
    if len(name) + len(value.encode()) + 1 > ARGUMENT_MAX:
        raise wrong(f"the value has {len(value.encode()):,} bytes; the kernel takes at most {ARGUMENT_MAX:,}")
    return value


def _from_client(name: str, context: Context) -> str:
    if name not in context.variables:
        raise wrong(f"{name} has no value here and is not set in your environment; write {name}: value, or set it")
    return _env_value(name, context.variables[name])


def environment(value: object, context: Context) -> Pairs:
    """Variables as a mapping or a list of ``NAME=value``; a name alone takes the client's value."""
    faults = Faults()
    result: dict[str, str] = {}
    if isinstance(value, Mapping):
        for name, given in value.items():
            if faults.run_key(name, env_name):
                result[name] = faults.run((name,), _one, name, given, context) or ""
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            two = faults.run((index,), _item, item, context)
            if two is not None and two[0] in result:
                faults.add(f"{two[0]} is given twice; keep one", index)
            elif two is not None:
                result[two[0]] = two[1]
    else:
        raise not_a(value, "an environment", "a mapping such as {LR: 0.1}, or a list such as [LR=0.1]")
    faults.check()
    return tuple(result.items())


def _one(name: str, given: object, context: Context) -> str:
    real = typed(given)
    if real is None:
        return _from_client(name, context)
    if isinstance(real, Mapping | list):
        raise not_a(given, "a value", "a text, a number or true/false")
    return _env_value(name, source(given))


def _item(item: object, context: Context) -> tuple[str, str]:
    if isinstance(item, Mapping):
        raise wrong("a mapping is not a variable; write `- NAME=value`, or leave the dashes out everywhere")
    if not isinstance(typed(item), str):
        raise not_a(item, "a variable", "NAME=value")
    name, equals, given = str(item).partition("=")
    env_name(name)
    return name, _env_value(name, given) if equals else _from_client(name, context)


_UNSEEN = r"\s\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
"""Of a character class: what no name holds. (Other characters that do not print only the parser knows.)"""
_NAME_PATTERN = rf"^(?!NVIDIA_|GPUJOBS_)[^={_UNSEEN}]{{1,256}}"
ENVIRONMENT_SCHEMA: Json = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": f"{_NAME_PATTERN}$"},
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
        },
        {"type": "array", "items": templated({"type": "string", "pattern": f"{_NAME_PATTERN}(=|$(?!\\n))"})},
    ]
}

_LINE = re.compile(r"\s*(?:export\s+)?([^\s=#'\"]+)[ \t]*(=?)[ \t]*")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "$": "$"}


def dotenv(content: str, context: Context) -> Pairs:
    r"""Reads an env_file.

    ``NAME=value`` a line, ``export`` before it allowed; ``#`` begins a comment at a line's start or after a
    space. ``'…'`` is taken as it is, ``"…"`` knows ``\n \t \r \" \\ \$``; both may go over several lines. A
    name alone takes the client's value. Values are not searched for variables, so that a password may hold a
    dollar sign.
    """
    result: dict[str, str] = {}
    lines = content.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    number = 0
    while number < len(lines):
        line, first = lines[number], number + 1
        number += 1
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None or (not match[2] and line[match.end() :].split(" #")[0].strip()):
            raise wrong(f"line {first}: {shown(line.strip(), 30)} is not NAME=value")
        name, rest = match[1], line[match.end() :]
        try:
            env_name(name)
            if not match[2]:
                result[name] = _from_client(name, context)
                continue
            if rest[:1] in {"'", '"'}:
                given, number = _quoted(rest, lines, number)
            else:
                given = re.split(r"(?:^|\s)#", rest, maxsplit=1)[0].strip()
            result[name] = _env_value(name, given)
        except SpecError as error:
            raise wrong(f"line {first}: {error.faults[0].message}") from error
    return tuple(result.items())


def _quoted(rest: str, lines: list[str], number: int) -> tuple[str, int]:
    quote, value, at, current = rest[0], [], 1, rest
    while True:
        if at >= len(current):
            if number >= len(lines):
                raise wrong(f"the quote {quote} is not closed")
            value.append("\n")
            current, at, number = lines[number], 0, number + 1
            continue
        char = current[at]
        if char == quote:
            break
        if char == "\\" and quote == '"' and current[at + 1 : at + 2] in _ESCAPES:
            value.append(_ESCAPES[current[at + 1]])
            at += 2
            continue
        value.append(char)
        at += 1
    tail = current[at + 1 :].strip()
    if tail and not tail.startswith("#"):
        raise wrong(f"{shown(tail, 30)} follows the closing quote")
    return "".join(value), number


def env_file(value: object, context: Context) -> Pairs:
    """The variables of one or more files, later ones winning; their text comes with the context."""
    if not isinstance(value, list | tuple):
        return _env_file(value, context)
    faults = Faults()
    result: dict[str, str] = {}
    for index, item in enumerate(value):
        result.update(faults.run((index,), _env_file, item, context) or ())
    faults.check()
    return tuple(result.items())


def env_file_paths(value: object) -> tuple[str, ...]:
    """The paths that :func:`env_file` wants to be read, as far as they are well formed."""
    items = value if isinstance(value, list | tuple) else [value]
    paths = (item.get("path") if isinstance(item, Mapping) else item for item in items)
    return tuple(str(path) for path in paths if isinstance(path, str) and path)


def _env_file(item: object, context: Context) -> Pairs:
    required = True
    if isinstance(item, Mapping):
        faults = Faults()
        for key in item:
            if key not in {"path", "required"}:
                faults.add(unknown_key(key, ("path", "required")), key, at_key=True)
        if "required" in item:
            required = faults.run(("required",), boolean, item["required"]) is not False
        if "path" not in item:
            faults.add("path is missing; write path: settings.env")
        faults.check()
        item = item["path"]
    path = text(item, "a path", "a file's path, such as settings.env")
    if path in context.env_files:
        try:
            return dotenv(context.env_files[path], context)
        except SpecError as error:
            raise wrong(f"{path}, {error.faults[0].message}") from error
    if not required:
        return ()
    raise wrong(f"{shown(path)} was not found or cannot be read; relative paths start at the job file's directory")


_ENV_FILE: Json = {
    "type": "object",
    "properties": {"path": TEXT, "required": templated({"type": "boolean"})},
    "required": ["path"],
    "additionalProperties": False,
}
ENV_FILE_SCHEMA: Json = {
    "$comment": "that the file can be read is not the schema's matter",
    "anyOf": [TEXT, _ENV_FILE, {"type": "array", "items": {"anyOf": [TEXT, _ENV_FILE]}}],
}


def labels(value: object) -> Pairs:
    """Labels as a mapping or a list of ``key=value``; those of gpujobs cannot be set."""
    faults = Faults()
    result: dict[str, str] = {}
    if isinstance(value, Mapping):
        for key, given in value.items():
            if isinstance(typed(given), Mapping | list):
                faults.add(f"{describe(given)} is not a label's value; write a text", key)
            elif faults.run_key(key, _label):
                result[key] = "" if typed(given) is None else source(given)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if not isinstance(typed(item), str):
                faults.add(f"{describe(item)} is not a label; write key=value", index)
                continue
            key, _, given = str(item).partition("=")
            if faults.run((index,), _label, key):
                result[key] = given
    else:
        raise not_a(value, "a set of labels", "a mapping such as {project: vision}")
    faults.check()
    return tuple(result.items())


def _label(key: str) -> str:
    if not key or len(key) > 256 or any(char.isspace() or not char.isprintable() for char in key):
        raise wrong(f"{shown(key)} is not a label's key; write letters, digits and . _ - /, such as project")
    if key == "gpujobs" or key.startswith("gpujobs."):
        raise wrong(f"{shown(key)} is set by gpujobs; choose another key")
    return key


LABELS_SCHEMA: Json = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": rf"^(?!gpujobs(\.|$))[^{_UNSEEN}]{{1,256}}$"},
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
        },
        {
            "type": "array",
            "items": templated(
                {"type": "string", "pattern": rf"^(?!gpujobs(\.|=|$))[^={_UNSEEN}]{{1,256}}(=|$(?!\n))"}
            ),
        },
    ]
}

# ---------------------------------------------------------------------------------------------- paths


def host_path(path: str, context: Context) -> str:
    """An absolute path from one that may begin with ``~`` or be relative to the file's directory."""
    if path == "~" or path.startswith("~/"):
        if not context.home:
            raise wrong("`~` needs your home directory, which is not known; write the whole path")
        return posixpath.normpath(posixpath.join(context.home, path[2:]))
    if path.startswith("~"):
        raise wrong(f"{shown(path)} names another user's home; write ~/… or the whole path")
    if not path.startswith("/") and not context.directory:
        raise wrong(f"{shown(path)} is relative and the file's directory is not known; write the whole path")
    result = posixpath.normpath(posixpath.join(context.directory, path))
    return "/" + result.lstrip("/")


def absolute(value: object, what: str, example: str) -> str:
    """An absolute path inside the container, normalised."""
    path = text(value, what, example)
    if not path.startswith("/"):
        raise wrong(f"{shown(path)} is not an absolute path; write {example}")
    return "/" + posixpath.normpath(path).lstrip("/")


ABSOLUTE_SCHEMA = templated({**TEXT, "pattern": "^/"}, allowed="a path from the root, such as /workspace")


def working_dir(value: object) -> str:
    """The directory in which the program starts."""
    return absolute(value, "a directory", "a path from the root, such as /workspace")


_BYTE = between(0, 255)
IP_PATTERN = rf"({_BYTE}(\.{_BYTE}){{3}}|[0-9a-fA-F]{{0,4}}(:[0-9a-fA-F.]{{0,15}}){{2,7}}(%[^\s\]]+)?)"
IP_HINT = "an address of this machine, such as 127.0.0.1"


def host_ip(value: object) -> str:
    """An IP address."""
    words = text(value, "an IP address", IP_HINT).removeprefix("[").removesuffix("]")
    try:
        return str(ip_address(words))
    except ValueError as error:
        raise wrong(f"{shown(words)} is not an IP address; write {IP_HINT}") from error
