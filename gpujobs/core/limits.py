"""Resource limits and health checks: how they are written in the job file, and the JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping

from gpujobs.core.forms import argument
from gpujobs.core.values import (
    TEXT,
    Context,
    Faults,
    Json,
    Parsed,
    SpecError,
    boolean,
    did_you_mean,
    duration,
    integer,
    integer_schema,
    known_keys,
    mapping,
    not_a,
    templated,
    text,
    wrong,
)

# ---------------------------------------------------------------------------------------------- ulimits

ULIMITS = (
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss",
    "rtprio", "rttime", "sigpending", "stack",
)  # fmt: skip
"""The names that the Engine knows (docker/go-units, ulimit.go)."""
_LIMIT_MAX = 2**63 - 1
RawUlimit = tuple[str, int, int]


def _limit(value: object) -> int:
    if isinstance(value, str) and str(value).lower() == "unlimited":
        raise wrong("'unlimited' is not a limit here; write -1")
    return integer(value, "a limit", "a number, or -1 for none", -1, _LIMIT_MAX)


def _ulimit(value: object) -> tuple[int, int]:
    if not isinstance(value, Mapping):
        both = _limit(value)
        return both, both
    faults = Faults()
    known_keys(value, ("soft", "hard"), {}, faults)
    for key in ("soft", "hard"):
        if key not in value:
            faults.add(f"{key} is missing; write both soft: and hard:, or one number for both")
    soft = faults.run(("soft",), _limit, value["soft"]) if "soft" in value else None
    hard = faults.run(("hard",), _limit, value["hard"]) if "hard" in value else None
    if soft is not None and hard is not None and hard != -1 and (soft == -1 or soft > hard):
        faults.add(f"soft {soft} is above hard {hard}; write at most the hard limit", "soft")
    faults.check()
    return soft or 0, hard or 0


def ulimits(value: object) -> tuple[RawUlimit, ...]:
    """Resource limits by name: one number, or soft and hard."""
    if not isinstance(value, Mapping):
        raise not_a(value, "a mapping of limits", "{nofile: 65536} or {nofile: {soft: 1024, hard: 65536}}")
    faults = Faults()
    result = []
    for name, given in value.items():
        if name not in ULIMITS:
            faults.add(
                f"unknown limit; allowed are {', '.join(ULIMITS)}{did_you_mean(name, ULIMITS)}",
                name,
                at_key=True,
            )
            continue
        limits = faults.run((name,), _ulimit, given)
        if limits is not None:
            result.append((name, *limits))
    faults.check()
    return tuple(result)


_LIMIT_SCHEMA = integer_schema(-1, _LIMIT_MAX)
ULIMITS_SCHEMA: Json = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        name: {
            "anyOf": [
                _LIMIT_SCHEMA,
                {
                    "type": "object",
                    "properties": {"soft": _LIMIT_SCHEMA, "hard": _LIMIT_SCHEMA},
                    "required": ["soft", "hard"],
                    "additionalProperties": False,
                },
            ]
        }
        for name in ULIMITS
    },
}

# ---------------------------------------------------------------------------------------------- health check


def check_test(value: object) -> tuple[bool, tuple[str, ...]]:
    """A check's command, as (whether a shell runs it, arguments)."""
    if isinstance(value, list | tuple):
        words = [argument(item) for item in value]
        kind = words[0] if words else ""
        if kind == "NONE" and len(words) == 1:
            return False, ()
        if kind == "CMD" and len(words) > 1:
            return False, tuple(words[1:])
        if kind == "CMD-SHELL" and len(words) == 2:
            return True, (words[1],)
        raise wrong("the list is not a check; write [CMD, program, …], [CMD-SHELL, 'one text'] or [NONE]")
    return True, (text(value, "a check", "a shell command, or a list such as [CMD, curl, -f, localhost]"),)


CHECK_SCHEMA: Json = {
    "anyOf": [
        TEXT,
        {"type": "array", "prefixItems": [{"const": "NONE"}], "minItems": 1, "maxItems": 1},
        {
            "type": "array",
            "prefixItems": [{"const": "CMD"}],
            "minItems": 2,
            "items": {"type": ["string", "number", "boolean"]},
        },
        {
            "type": "array",
            "prefixItems": [{"const": "CMD-SHELL"}, {"type": "string"}],
            "minItems": 2,
            "maxItems": 2,
        },
    ]
}


def check_interval(value: object) -> float:
    """Seconds between or for checks: not so short that they load the Engine."""
    return duration(value, 1, 86400, "30s")


def check_forms(value: object, context: Context) -> Mapping[str, object]:
    """The mapping with the check's command read; ``disable: true`` is a check of nothing."""
    del context
    result = dict(mapping(value, "a health check", "a mapping such as {test: curl -f localhost:8080}"))
    off = False
    if "disable" in result:
        try:
            off = boolean(result.pop("disable"))
        except SpecError as error:
            raise wrong(error.faults[0].message, "disable") from error
    if off:
        return {"shell": Parsed(value=False), **result, "test": Parsed(())}
    if "test" in result:
        try:
            shell, words = check_test(result["test"])
        except SpecError:
            return result
        return {"shell": Parsed(shell), **result, "test": Parsed(words)}
    return result


def check_words(value: object) -> tuple[str, ...]:
    """A check's arguments."""
    return check_test(value)[1]


def check_retries(value: object) -> int:
    """How often a check may fail."""
    return integer(value, "a number of tries", "a number such as 3", 1, 1000)


def start_period(value: object) -> float:
    """Seconds from the start in which failures do not count."""
    return duration(value, 0, 86400, "30s")


def check_schema(inner: Json) -> Json:
    """JSON Schema of a health check: with ``disable``, without the field that is no key."""
    properties = inner["properties"]
    assert isinstance(properties, dict)
    properties = {key: item for key, item in properties.items() if key != "shell"}
    without = {key: value for key, value in inner.items() if key != "required"}
    either = [{"required": ["test"]}, {"required": ["disable"], "properties": {"disable": templated({"const": True})}}]
    off: Json = {**templated({"type": "boolean"}), "description": "No check at all."}
    return {**without, "properties": {**properties, "disable": off}, "anyOf": either}
