"""Values of the job file: how one scalar is read, what is said when it cannot be, and its JSON Schema.

Every reader here takes what the file holds and gives the normal form, or raises :class:`SpecError` with a
sentence of the form *what is wrong; what is allowed*. Values arrive as ``dict``, ``list``, ``str`` (quoted in
the file) and :class:`Plain` (not quoted), so that ``0.10`` can be the text of an environment variable and the
number of something else. Python's own ``int``, ``float``, ``bool`` and ``None`` are read too.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from typing import NamedTuple, ParamSpec, TypeVar

from gpujobs.core.patterns import between, sizes, whole

T = TypeVar("T")
P = ParamSpec("P")
Loc = tuple[str | int, ...]
Json = dict[str, object]

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29})|0o[0-7]{1,30}|0x[0-9a-fA-F]{1,30}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]{1,40}|(?:0|[1-9][0-9]{0,40})(?:\.[0-9]{0,40})?)(?:[eE][-+]?[0-9]{1,4})?")
_SPECIAL = re.compile(r"([-+]?)\.(?:(inf|Inf|INF)|(?:nan|NaN|NAN))")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def _number(text: str) -> int | float | None:
    """The number that a text is in YAML 1.2's core schema (but without leading zeros), else None."""
    if len(text) > 100 or not text:
        return None
    if _INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    special = _SPECIAL.fullmatch(text)
    if special is None:
        return None
    return math.nan if special[2] is None else float(f"{special[1]}inf")


class Plain(str):
    """A scalar that is not quoted in the file: its text as written, and the value that the text has."""

    __slots__ = ()

    @property
    def value(self) -> bool | int | float | str | None:
        """The value by YAML 1.2's core schema: ``no``, ``22:22``, ``010`` and dates are text."""
        text = str(self)
        if text in _NULL:
            return None
        if text in _BOOL:
            return _BOOL[text]
        number = _number(text)
        return text if number is None else number


@dataclass(frozen=True, slots=True)
class Parsed:
    """A value that is in normal form already, and is taken as it is."""

    value: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a file's text does not say by itself; the client sends it, the server adds nothing of its own.

    Attributes:
        file: The file's name as its user wrote it, for messages.
        directory: The absolute directory of the file, where relative paths start.
        home: The user's home directory, for ``~``; may be empty.
        variables: The user's environment, at least as far as the file names it.
        working_directory: Where the user is; nothing in the file depends on it.
        env_files: The text of each env_file by its path as written in the file (after ``${VAR}``).
        secrets: Of each secret that the client looked for, by its name, why it has no value; empty where it has one.
        uuids: UUIDs of the machine's GPUs by their index, as far as known, for better messages.
    """

    file: str
    directory: str
    home: str
    variables: Mapping[str, str]
    working_directory: str = ""
    env_files: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    uuids: tuple[str, ...] = ()


class Fault(NamedTuple):
    """One mistake: where, from here; the sentence; whether the key is meant and not its value."""

    loc: Loc
    message: str
    at_key: bool = False


class SpecError(ValueError):
    """A value is not as it has to be.

    Args:
        faults: The mistakes.
        inner: The validator's own error, where there is one besides.
    """

    def __init__(self, faults: Sequence[Fault], inner: ValueError | None = None) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = tuple(faults)
        self.inner = inner


def wrong(message: str, *loc: str | int, at_key: bool = False) -> SpecError:
    """The error of one mistake."""
    return SpecError([Fault(loc, message, at_key)])


class Faults:
    """Collects mistakes, so that all of them are told at once."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def add(self, message: str, *loc: str | int, at_key: bool = False) -> None:
        """Notes a mistake."""
        self._faults.append(Fault(loc, message, at_key))

    def run(self, loc: Loc, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Gives what ``read(*args)`` gives; notes its mistakes under ``loc`` and gives None if it cannot."""
        try:
            return read(*args, **kwargs)
        except SpecError as error:
            self._faults.extend(Fault((*loc, *fault.loc), fault.message, fault.at_key) for fault in error.faults)
            return None

    def run_key(self, key: str, read: Callable[[str], T]) -> T | None:
        """As :meth:`run` for what is read from a key itself."""
        try:
            return read(key)
        except SpecError as error:
            self._faults.extend(Fault((key,), fault.message, at_key=True) for fault in error.faults)
            return None

    def check(self) -> None:
        """Raises SpecError if anything was noted."""
        if self._faults:
            raise SpecError(self._faults)


TEMPLATE: Json = {"type": "string", "pattern": r"\$(\{|[A-Za-z_])|\{\{"}
"""In an editor a text with a variable or a matrix name may stand for any value: the parser alone sees it."""


TEXT: Json = {"type": "string", "pattern": r"\S", "not": {"pattern": r"[\x00-\x1f\x7f-\x9f]"}}
"""Schema of :func:`text`: not blank, no control characters."""


def templated(*schemas: Json, allowed: str = "") -> Json:
    """Any of the schemas, or a text that is replaced before it is read.

    Args:
        schemas: What the value may be.
        allowed: What to write, in words: editors show them, as ``errorMessage`` of the YAML language server,
            instead of the pattern that did not match.
    """
    said: Json = {"errorMessage": f"write {allowed}"} if allowed else {}
    return {"anyOf": [{**schema, **said} for schema in (*schemas, TEMPLATE)]}


# ---------------------------------------------------------------------------------------------- words


def shown(text: str, limit: int = 60) -> str:
    """A text in quotes, shortened, with everything escaped that a terminal would act on."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return f"'{printable(cut)}'"


def printable(text: str) -> str:
    """A text with everything escaped that a terminal would act on: control and format characters, line ends."""
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    return {"\n": r"\n", "\t": r"\t", "\r": r"\r"}.get(char) or (
        f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    )


def typed(value: object) -> object:
    """The value that a scalar has by its own looks."""
    return value.value if isinstance(value, Plain) else value


def describe(value: object) -> str:
    """A value in words for a message."""
    real = typed(value)
    if real is None:
        return "an empty value"
    if isinstance(real, Mapping):
        return "a mapping"
    if isinstance(real, list | tuple):
        return "a list"
    text = source(value)
    return shown(text) if isinstance(real, str) else text


def source(value: object) -> str:
    """A scalar's text as the file has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def not_a(value: object, what: str, allowed: str) -> SpecError:
    """The error for a value of the wrong kind."""
    return wrong(f"{describe(value)} is not {what}; write {allowed}{_trap(value)}")


def _trap(value: object) -> str:
    """A hint where older YAML would have read something else."""
    text = str(value) if isinstance(value, str) else ""
    if re.fullmatch(r"[-+]?0+[0-9]{1,30}", text):
        return f"; did you mean {int(text)} (leading zeros make it a text)?"
    if re.fullmatch(r"[-+]?[0-9]{1,15}(_[0-9]{1,15})+", text):
        return f"; did you mean {text.replace('_', '')}?"
    if text.lower() in {"yes", "on", "y"}:
        return "; did you mean true?"
    if text.lower() in {"no", "off", "n"}:
        return "; did you mean false?"
    return ""


def did_you_mean(text: str, choices: Iterable[str], habits: Mapping[str, str] | None = None) -> str:
    """`; did you mean `x`?`, or nothing; case and dashes do not matter."""
    folded = _folded(text)
    if habits and folded in habits:
        return f"; did you mean `{habits[folded]}`?"
    by_fold = {_folded(choice): choice for choice in choices}
    close = get_close_matches(folded[:100], list(by_fold), n=1, cutoff=0.7)
    return f"; did you mean `{by_fold[close[0]]}`?" if close else ""


def _folded(text: str) -> str:
    return text.lower().replace("-", "_")


def unknown_key(key: str, choices: Sequence[str], habits: Mapping[str, str] | None = None) -> str:
    """The sentence for a key that is not known in its place."""
    return f"unknown key; allowed are {', '.join(choices)}{did_you_mean(key, choices, habits)}"


def known_keys(value: Mapping[str, object], keys: Sequence[str], refused: Mapping[str, str], faults: Faults) -> None:
    """Notes keys that are unknown, or known to others and refused here with a reason."""
    for key in value:
        if key in refused:
            faults.add(refused[key], key, at_key=True)
        elif key not in keys:
            faults.add(unknown_key(key, keys), key, at_key=True)


# ---------------------------------------------------------------------------------------------- scalars


def mapping(value: object, what: str, example: str) -> Mapping[str, object]:
    """A mapping, or the sentence that one is wanted."""
    if isinstance(value, Mapping):
        return value
    raise not_a(value, what, example)


def text(value: object, what: str, example: str, *, limit: int = 4096) -> str:
    """A text that is not empty and holds no control characters."""
    if not isinstance(typed(value), str):
        hint = (
            "" if isinstance(value, Mapping | list) or typed(value) is None else f'; as a text it is "{source(value)}"'
        )
        raise wrong(f"{describe(value)} is not {what}; write {example}{hint}")
    result = str(value)
    if not result.strip():
        raise wrong(f"an empty text is not {what}; write {example}")
    if len(result) > limit:
        raise wrong(f"it has {len(result):,} characters; at most {limit:,} are allowed")
    if any(unicodedata.category(char) in {"Cc", "Cs"} for char in result):
        raise wrong(f"{shown(result)} contains a control character; write {example}")
    return result


def boolean(value: object) -> bool:
    """True or false; not a text that looks like them."""
    real = typed(value)
    if isinstance(real, bool):
        return real
    raise not_a(value, "true or false", "true or false")


def number(value: object, what: str, example: str, low: float, high: float) -> float:
    """A finite number between bounds, also where it is quoted."""
    real = typed(value)
    if isinstance(real, str):
        real = _number(real.strip())
    if isinstance(real, bool) or not isinstance(real, int | float):
        raise not_a(value, what, example)
    if not math.isfinite(real) or not low <= real <= high:
        raise wrong(f"{source(value)} is out of range for {what}; write {example} ({low:g} to {high:g})")
    return float(real)


def integer(value: object, what: str, example: str, low: int, high: int) -> int:
    """A whole number between bounds, also where it is quoted."""
    real = typed(value)
    if isinstance(real, str):
        real = _number(real.strip())
    if isinstance(real, bool) or not isinstance(real, int):
        raise not_a(value, what, example)
    if not low <= real <= high:
        raise wrong(f"{source(value)} is out of range for {what}; write {example} ({low} to {high})")
    return real


def integer_schema(low: int, high: int) -> Json:
    """Schema of :func:`integer`."""
    return templated(
        {"type": "integer", "minimum": low, "maximum": high},
        {"type": "string", "pattern": whole(low, high)},
    )


def choice(value: object, what: str, choices: Sequence[str]) -> str:
    """One word of a few."""
    if isinstance(value, str) and str(value) in choices:
        return str(value)
    hint = did_you_mean(str(value), choices) if isinstance(value, str) else ""
    raise wrong(f"{describe(value)} is not {what}; write one of {', '.join(choices)}{hint}")


_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,10})?)\s*([kmgtpe]?)(?:i?b)?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}
SIZE_MAX = 1 << 60
"""1 EiB, in bytes."""


def size(value: object, least: int, example: str = "64g or 512m") -> int:
    """A size in bytes: as Docker has it, ``64g``, ``64GB`` and ``64GiB`` are the same power of 1024.

    Args:
        value: A text with a unit, or a whole number of bytes.
        least: The smallest that makes sense, in bytes; catches ``64`` where ``64g`` was meant.
        example: For the message.
    """
    real = typed(value)
    match = _SIZE.fullmatch(str(real)) if isinstance(real, str | int) and not isinstance(real, bool) else None
    if match is None:
        raise not_a(value, "a size", f"a number and a unit, such as {example}")
    result = int(Decimal(match[1]) * 1024 ** _POWERS[match[2].lower()])
    if result < least:
        hint = f"; did you mean {match[1]}g?" if not match[2] and 0 < result < 4096 else ""
        raise wrong(f"{source(value)} is only {result} bytes; write at least {amount(least)}, such as {example}{hint}")
    if result > SIZE_MAX:
        raise wrong(f"{shown(source(value))} is too much; write at most {amount(SIZE_MAX)}")
    return result


def amount(count: int) -> str:
    """A number of bytes in words, exact where it is a whole number of a unit."""
    for unit, power in (("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power and count % (1 << power) == 0:
            return f"{count >> power} {unit}"
    return f"{count} bytes"


def size_schema(least: int, example: str = "64g or 512m") -> Json:
    """Schema of :func:`size`."""
    return templated(
        {"type": "integer", "minimum": least, "maximum": SIZE_MAX},
        {"type": "string", "pattern": sizes(least, SIZE_MAX)},
        allowed=f"a number and a unit, such as {example}",
    )


_UNITS: dict[str, Decimal | int] = {
    "w": 604800,
    "d": 86400,
    "h": 3600,
    "m": 60,
    "s": 1,
    "ms": Decimal("0.001"),
    "us": Decimal("0.000001"),
}
_DURATION = re.compile(r"\s*" + "".join(rf"(?:([0-9]{{1,12}}(?:\.[0-9]{{1,9}})?){unit}\s*)?" for unit in _UNITS))
_CLOCK = re.compile(r"(?:([0-9]{1,5})-)?([0-9]{1,5}):([0-9]{1,2})(?::([0-9]{1,2}))?")
DURATION_MAX = 10 * 365 * 86400
"""Ten years, in seconds."""


def duration(value: object, least: float, most: float = DURATION_MAX, example: str = "12h, 90m or 1d12h") -> float:
    """A duration in seconds: ``12h``, ``90m``, ``1d12h``, ``500ms``, or a whole number of seconds.

    ``1:30:00`` is refused with what to write: base 60 in one YAML, text in another.
    """
    real = typed(value)
    if isinstance(real, bool) or not isinstance(real, str | int):
        raise not_a(value, "a duration", f"a number and a unit, such as {example}")
    words = source(value)
    clock = _CLOCK.fullmatch(words.strip())
    if clock is not None:
        raise wrong(f"{shown(words)} is a clock time; write a duration with units{_from_clock(clock)}")
    match = _DURATION.fullmatch(words)
    if isinstance(real, int) or re.fullmatch(r"[0-9]{1,12}", words.strip()):
        seconds = Decimal(int(real))
    elif match is not None and any(match.groups()):
        parts = zip(match.groups(), _UNITS.values(), strict=True)
        seconds = sum((Decimal(part) * unit for part, unit in parts if part), Decimal(0))
    else:
        raise not_a(value, "a duration", f"a number and a unit, such as {example}")
    if not Decimal(least) <= seconds <= Decimal(most):
        raise wrong(f"{shown(words)} is out of range; write {least:g} s to {most / 86400:g} d, such as {example}")
    return float(seconds)


def _from_clock(clock: re.Match[str]) -> str:
    if clock[4] is None:
        return f": {int(clock[2])}h{int(clock[3])}m or {int(clock[2])}m{int(clock[3])}s"
    parts = ((clock[1], "d"), (clock[2], "h"), (clock[3], "m"), (clock[4], "s"))
    return ": " + ("".join(f"{int(part)}{unit}" for part, unit in parts if part and int(part)) or "a time above 0")


def duration_schema(least: float, most: float = DURATION_MAX) -> Json:
    """Schema of :func:`duration`."""
    part = r"([0-9]{1,12}(\.[0-9]{1,9})?%s\s*)?"
    pattern = r"^\s*(?=[0-9])" + "".join(part % unit for unit in _UNITS) + "$"
    # One part alone can be too much; what several come to only the parser computes.
    units = [(name, int(unit)) for name, unit in _UNITS.items() if unit >= 1]
    too_long = "|".join(rf"0*{between(int(most) // unit + 1, 10**12 - 1)}(\.[0-9]*)?{name}" for name, unit in units)
    too_short = r"|^[\s0.a-z]*$|^\s*0*[0-9]{1,3}(\.[0-9]*)?ms\s*$|^\s*0*[0-9]{1,6}(\.[0-9]*)?us\s*$" if least else ""
    return templated(
        {"type": "integer", "minimum": math.ceil(least), "maximum": int(most)},
        {"type": "string", "pattern": pattern, "not": {"pattern": rf"(^|[^0-9.])({too_long})\s*([0-9]|$){too_short}"}},
        {"type": "string", "pattern": rf"^\s*0*{between(math.ceil(least), int(most))}\s*$"},
        allowed="a number and a unit, such as 12h, 90m or 30s",
    )
