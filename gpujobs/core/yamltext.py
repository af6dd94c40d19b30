"""Writes job files: YAML that every reader reads alike, quoted wherever there could be a doubt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gpujobs.core.values import Plain

WIDTH = 100
"""Of a line with a list in brackets; longer ones go one item a line."""

_SAFE = re.compile(r"[A-Za-z0-9_./+=-][A-Za-z0-9_./+=@%~:-]*|~/[A-Za-z0-9_./+=@%~:-]*")
_DOUBTFUL = re.compile(r"[-+.0-9:_]+|y|n|yes|no|on|off|=|-|.*:", re.IGNORECASE)
"""Older readers take these for numbers, times, truth values or keys."""
_ESCAPES = {"\n": r"\n", "\t": r"\t", "\r": r"\r", '"': r"\"", "\\": r"\\", "\x1b": r"\e"}


def scalar(text: str) -> str:
    """A text as a YAML scalar, also within brackets and braces."""
    if _SAFE.fullmatch(text) and not _DOUBTFUL.fullmatch(text) and isinstance(Plain(text).value, str):
        return text
    if all(char.isprintable() for char in text):
        return f'"{text}"' if "\\" not in text and '"' not in text else "'" + text.replace("'", "''") + "'"
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def literal(text: str) -> str:
    """A text in which nothing is replaced when the file is read: ``$`` and ``{{`` doubled."""
    return text.replace("$", "$$").replace("{{", "{{{{")


def document(keys: Mapping[str, object], comments: Sequence[str] = ()) -> str:
    """A file of keys and values.

    Args:
        keys: Text, numbers, lists and mappings; None is a key without a value.
        comments: Lines at its beginning.
    """
    lines = ["# " + "".join(_escaped(char) if not char.isprintable() else char for char in line) for line in comments]
    for key, value in keys.items():
        lines += _entry(key, value, 0)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _entry(key: str, value: object, indent: int) -> list[str]:
    head = " " * indent + scalar(key) + ":"
    flat = _flat(value)
    if not (isinstance(value, Mapping | list | tuple) and value) or _fits(value, head, flat):
        return [f"{head} {flat}"]
    if isinstance(value, Mapping):
        return [head, *(line for name, item in value.items() for line in _entry(name, item, indent + 2))]
    assert isinstance(value, list | tuple)
    return [head, *(" " * indent + f"  - {_flat(item)}" for item in value)]


def _fits(value: object, head: str, flat: str) -> bool:
    """Short lists and small mappings of numbers read best on one line."""
    few = not isinstance(value, Mapping) or not any(
        item is None or isinstance(item, Mapping) for item in value.values()
    )
    return few and len(head) + len(flat) + 1 <= WIDTH and (not isinstance(value, Mapping) or len(value) <= 2)


def _flat(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(key)}: {_flat(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flat(item) for item in value) + "]"
    return scalar(str(value))
