"""Secrets: how they are written in the job file, what the client is to read, and how the init is handed them.

Of a secret the specification has its name, where it came from and where the program finds it; its value is in none of
the values here but the one that goes to the init.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gpujobs.core.forms import env_name, host_path
from gpujobs.core.interpolate import interpolate
from gpujobs.core.values import (
    Context,
    Faults,
    Json,
    SpecError,
    known_keys,
    not_a,
    shown,
    templated,
    text,
    wrong,
)

DIRECTORY = "/run/secrets"
"""Where a container has them, each a file of mode 0400 of the job's user's; in memory, as in Compose."""

OTHER_NAMES = (DIRECTORY, f"/var{DIRECTORY}")
"""Paths of that directory in most images: nothing else can be mounted there or below."""

VALUE_MAX = 256 << 10
"""Bytes of one secret: keys, tokens and certificates have a few thousand."""

TOTAL_MAX = 1 << 20
"""Bytes of all secrets of one job file; the init's SECRETS_MAX is this and room for the names."""

COUNT_MAX = 64
"""Secrets of one job."""

MEMORY = 8 << 20
"""Bytes that the file system in memory may take: all of them, each in pages of its own of up to 64 KiB."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_KEYS = ("file", "environment", "target", "variable")
_REFUSED = {
    "external": "secrets of others cannot be used; write file: or environment:",
    "name": "a secret has one name, its key; leave it out",
    "content": "a value does not belong into the job file; write file: or environment:",
    "value": "a value does not belong into the job file; write file: or environment:",
    **dict.fromkeys(("uid", "gid"), "a secret is the job's user's; leave it out"),
    "mode": "a secret can be read by the job's user alone (0400); leave it out",
    **dict.fromkeys(("labels", "driver", "driver_opts", "template_driver"), "it is not supported; leave it out"),
}
_EXAMPLE = "{file: ~/.wandb-key}, {environment: WANDB_API_KEY}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """One secret of a job.

    Attributes:
        name: What the job file calls it.
        target: Its file's name below :data:`DIRECTORY`.
        file: The absolute path that it was read from, on the client's machine; empty where it was a variable.
        environment: The client's variable that it was read from; empty where it was a file.
        variable: The program's variable that has its value; empty for none.
    """

    name: str
    target: str
    file: str = ""
    environment: str = ""
    variable: str = ""


def secrets(value: object, context: Context) -> tuple[Secret, ...]:
    """Secrets as a mapping of names, or as a list; each one's value has come with the file.

    Raises:
        SpecError: With every mistake, also those that the client met when it read the values.
    """
    faults = Faults()
    found = _read(value, context, faults, lambda words: words)
    for loc, secret in found:
        if (problem := context.secrets.get(secret.name, "its value was not sent; is gpujobs here older?")) != "":
            faults.add(problem, *loc)
    faults.check()
    return tuple(secret for _, secret in found)


def sources(value: object, context: Context) -> tuple[Secret, ...]:
    """What the client is to read; what is wrong with the rest is for :func:`secrets` to say.

    Args:
        value: As the file has it, ``${VAR}`` not replaced yet.
        context: With the variables for that.
    """
    return tuple(s for _, s in _read(value, context, Faults(), lambda words: interpolate(words, context.variables)))


def _read(
    value: object, context: Context, faults: Faults, given: Callable[[str], str]
) -> list[tuple[tuple[str | int, ...], Secret]]:
    """The secrets that are well formed, and where in the value each is."""
    entries: list[tuple[str | int, object, object]] = []  # where, the name, the rest
    if isinstance(value, Mapping):
        entries = [(name, name, item) for name, item in value.items()]
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if isinstance(item, Mapping) and "source" in item:
                entries.append((index, item["source"], {key: of for key, of in item.items() if key != "source"}))
            elif isinstance(item, Mapping):
                faults.add("source is missing; write source: and the secret's name", index)
            else:
                entries.append((index, item, {"environment": item}))
    else:
        faults.add(str(not_a(value, "a set of secrets", "names and sources, such as {wandb: {file: ~/.wandb-key}}")))
    if len(entries) > COUNT_MAX:
        faults.add(f"{len(entries):,} secrets are too many; at most {COUNT_MAX} are allowed")
        return []
    result: list[tuple[tuple[str | int, ...], Secret]] = []
    seen: set[tuple[str, str]] = set()
    for at, name, rest in entries:
        # Variables are replaced in values, not in keys.
        called = faults.run_key(at, _named) if isinstance(at, str) else faults.run((at,), _named, name, given)
        secret = None if called is None else faults.run((at,), _one, called, rest, context, given)
        if secret is None:
            continue
        words = {("secret", secret.name), ("target", secret.target), ("variable", secret.variable)} - {("variable", "")}
        for what, word in sorted(words & seen)[:1]:
            faults.add(f"the {what} {shown(word)} is given twice; keep one", at)
        seen |= words
        result.append(((at,), secret))
    return result


def _one(called: str, rest: object, context: Context, given: Callable[[str], str]) -> Secret:
    if not isinstance(rest, Mapping):
        raise not_a(rest, "where a secret is", f"one of {_EXAMPLE}")
    faults = Faults()
    known_keys(rest, _KEYS, _REFUSED, faults)
    if ("file" in rest) == ("environment" in rest):
        faults.add(f"write one of file: and environment:, such as {_EXAMPLE}")
    file = faults.run(("file",), _path, rest["file"], context, given) if "file" in rest else ""
    source = faults.run(("environment",), _variable, rest["environment"], given) if "environment" in rest else ""
    target = faults.run(("target",), _named, rest["target"], given) if "target" in rest else called
    variable = faults.run(("variable",), _own_variable, rest["variable"], given) if "variable" in rest else ""
    faults.check()
    return Secret(name=called, target=target or "", file=file or "", environment=source or "", variable=variable or "")


def _named(value: object, given: Callable[[str], str] = str) -> str:
    words = given(text(value, "a secret's name", "a name, such as wandb"))
    if not _NAME.fullmatch(words):
        raise wrong(
            f"{shown(words)} is not a secret's name; write letters, digits and . _ -: "
            f"it is the name of a file in {DIRECTORY}"
        )
    return words


def _path(value: object, context: Context, given: Callable[[str], str]) -> str:
    return host_path(given(text(value, "a path", "a file's path, such as ~/.wandb-key")), context)


def _variable(value: object, given: Callable[[str], str]) -> str:
    words = given(text(value, "a variable's name", "the name of a variable of yours, such as WANDB_API_KEY"))
    if "=" in words or any(char.isspace() for char in words):
        raise wrong(f"{shown(words)} is not a variable's name; write one of yours, such as WANDB_API_KEY")
    return words


def _own_variable(value: object, given: Callable[[str], str]) -> str:
    return env_name(given(text(value, "a variable's name", "the name that the program knows, such as WANDB_API_KEY")))


_NAME_SCHEMA: Json = templated({"type": "string", "pattern": f"^{_NAME.pattern}$"}, allowed="letters, digits and . _ -")
_PROPERTIES: Json = {
    "file": {"type": "string", "minLength": 1},
    "environment": {"type": "string", "pattern": r"^[^=\s]+$"},
    "target": _NAME_SCHEMA,
    "variable": {"type": "string", "pattern": r"^(?!NVIDIA_|GPUJOBS_)[^=\s]{1,256}$"},
}
_SOURCE: list[Json] = [{"required": ["file"]}, {"required": ["environment"]}]
SECRETS_SCHEMA: Json = {
    "$comment": "that the file can be read, and the variable is set, is not the schema's matter",
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": f"^{_NAME.pattern}$"},
            "additionalProperties": {
                "type": "object",
                "properties": _PROPERTIES,
                "additionalProperties": False,
                "oneOf": _SOURCE,
            },
        },
        {
            "type": "array",
            "items": {
                "anyOf": [
                    _NAME_SCHEMA,
                    {
                        "type": "object",
                        "properties": {"source": _NAME_SCHEMA, **_PROPERTIES},
                        "required": ["source"],
                        "additionalProperties": False,
                        "oneOf": _SOURCE,
                    },
                ]
            },
        },
    ],
}


def covers(target: str) -> bool:
    """Whether a mount at that path of the container would be in the secrets' place."""
    return any(target == place or target.startswith(f"{place}/") for place in OTHER_NAMES)


def too_large(sizes: Iterable[int]) -> str:
    """What is wrong with values of so many bytes; empty for nothing."""
    total = 0
    for size in sizes:
        if size > VALUE_MAX:
            return f"it has more than {VALUE_MAX >> 10} KiB, which is the limit of one secret"
        total += size
    return f"all of them have more than {TOTAL_MAX >> 20} MiB, which is the limit" if total > TOTAL_MAX else ""


def handed_over(found: Iterable[Secret], values: Mapping[str, bytes]) -> bytes:
    """What the init reads: for each secret its file's name, its variable, its length, each ended by a NUL; its value.

    A NUL follows the value too, so that the init can hand it on as a variable where it is.

    Raises:
        KeyError: A value is missing.
    """
    return b"".join(
        b"%s\0%s\0%d\0%s\0" % (s.target.encode(), s.variable.encode(), len(values[s.name]), values[s.name])
        for s in found
    )


__all__ = ["Secret", "SpecError", "covers", "handed_over", "secrets", "sources", "too_large"]
