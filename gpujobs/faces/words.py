"""Values as people read them: foreign text made harmless, durations, sizes, times. Pure functions."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from datetime import datetime
from typing import Any

GAP = "\N{EN DASH}"
"""What is not known or not supported."""

_INVISIBLE = frozenset("\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5")
"""Letters and marks that print as nothing, which str.isprintable does not know of."""


def clean(value: object) -> str:
    r"""Foreign text as one line that can do nothing to a terminal and hide nothing from a reader.

    Control characters (C0, C1: so every escape sequence), line ends, bidirectional controls, zero-width and
    other format characters, unusual spaces, tags and lone surrogates are shown as ``\x1b``, ``\u202e`` or
    ``\U000e0041``.
    """
    text = value if isinstance(value, str) else str(value)
    if text.isprintable() and not _INVISIBLE.intersection(text):
        return text
    return "".join(c if c.isprintable() and c not in _INVISIBLE else _escaped(c) for c in text)


def harmless(line: bytes) -> bytes:
    """A line of a job's output that can do nothing to a terminal; tabs stay, and so does the look of CR LF."""
    text = line.removesuffix(b"\r").decode(errors="backslashreplace")
    return "\t".join(clean(part) for part in text.split("\t")).encode()


def _escaped(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def duration(seconds: float | None) -> str:
    """Such as ``45s``, ``3m07s``, ``3h12m``, ``2d03h``; a gap for None."""
    if seconds is None or not math.isfinite(seconds):
        return GAP
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def size(count: float | None) -> str:
    """Bytes such as ``512 MiB``, ``1.5 GiB``, ``40 GiB``; a gap for None."""
    if count is None:
        return GAP
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1023.5 or unit == "PiB":
            break
        value /= 1024
    text = f"{value:.1f}" if value < 10 and unit != "B" else f"{value:.0f}"
    return f"{text.removesuffix('.0')} {unit}"


def seconds_of(text: object) -> float | None:
    """Seconds since the epoch of an RFC 3339 time; None for a gap or what is no time."""
    if not isinstance(text, str):
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def local_time(text: object) -> str:
    """An RFC 3339 time in this machine's zone, to the second; a gap for None."""
    seconds = seconds_of(text)
    if seconds is None:
        return GAP
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def end_sentence(row: Mapping[str, Any], name: str) -> str:
    """How a job ended, as one sentence."""
    state, message = clean(row.get("state")), clean(row.get("message") or "")
    if not message and row.get("exit_code"):
        message = f"exit {row['exit_code']}"
    took = ""
    started, ended = seconds_of(row.get("started_at")), seconds_of(row.get("ended_at"))
    if started is not None and ended is not None:
        took = f" after {duration(ended - started)}"
    return f"job {name} {state}{took}" + (f": {message}" if message else "")
