"""Mounts and ports: how they are written in the job file, what is refused, and the JSON Schema."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gpujobs.core.forms import IP_HINT, IP_PATTERN, absolute, host_ip, host_path
from gpujobs.core.values import (
    TEXT,
    Context,
    Faults,
    Json,
    boolean,
    choice,
    did_you_mean,
    integer,
    integer_schema,
    known_keys,
    not_a,
    shown,
    size,
    size_schema,
    templated,
    text,
    typed,
    wrong,
)


def _items(value: object, what: str, example: str) -> Sequence[object]:
    if isinstance(value, list | tuple):
        return value
    raise not_a(value, f"a list of {what}", f"a list, such as {example}")


# ---------------------------------------------------------------------------------------------- volumes

RawVolume = tuple[str, str, str, bool, int | None]
"""Type, source, target, read-only, size of a tmpfs in bytes."""

_FORBIDDEN = ("/proc", "/sys", "/dev", "/.gpujobs", "/etc/passwd", "/etc/group",
              "/run/nvidia-container-devices", "/var/run/nvidia-container-devices")  # fmt: skip
_VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_PROPAGATION = frozenset({"shared", "rshared", "slave", "rslave", "private", "rprivate", "unbindable", "runbindable"})
_MODE_REASONS = {
    "z": "SELinux labels are not changed here; leave it out",
    "Z": "SELinux labels are not changed here; leave it out",
    "nocopy": "it is not supported; leave it out",
    **dict.fromkeys(_PROPAGATION, "mount propagation cannot be chosen; leave it out"),
    **dict.fromkeys(("cached", "delegated", "consistent"), "it has no meaning on Linux; leave it out"),
}
TMPFS_LEAST = 64 * 1024
"""In bytes; a smaller one is a unit forgotten."""


def target(value: object) -> str:
    """A mount's place in the container; some can never be covered."""
    path = absolute(value, "a path in the container", "a path from the root, such as /data")
    if path == "/":
        raise wrong("the container's root cannot be mounted over; write a path below it, such as /data")
    for place in _FORBIDDEN:
        if path == place or path.startswith(place + "/"):
            hint = "; did you mean `shm_size`?" if path == "/dev/shm" else ""  # noqa: S108 - not a file that is made
            raise wrong(f"nothing can be mounted at {shown(path)}; write another path, such as /data{hint}")
    return path


def _short(value: object, context: Context) -> RawVolume:
    words = text(value, "a volume", "source:target, such as ~/data:/data:ro")
    parts = words.split(":")
    if len(parts) == 1:
        near = f"; did you mean `{words}:/{words.strip('./~') or 'data'}`?" if not words.startswith("/") else ""
        raise wrong(f"{shown(words)} has no target; write source:target, such as ~/data:/data:ro{near}")
    if len(parts) > 3:
        raise wrong(
            f"{shown(words)} has {len(parts)} parts; write source:target or source:target:ro "
            "(the long form takes paths with a colon)"
        )
    mode = parts[2] if len(parts) == 3 else "rw"
    words_of = mode.split(",")
    for word in words_of:
        if word in _MODE_REASONS:
            raise wrong(f"mode {shown(word)}: {_MODE_REASONS[word]}")
        if word not in {"ro", "rw"}:
            raise wrong(f"{shown(word)} is not a mode; write ro or rw{did_you_mean(word, ('ro', 'rw'))}")
    if len(words_of) > 1:
        raise wrong(f"{shown(mode)} gives two modes; write ro or rw")
    where = target(parts[1])
    if parts[0].startswith(("/", ".", "~")):
        return "bind", host_path(parts[0], context), where, mode == "ro", None
    return "volume", _volume_name(parts[0]), where, mode == "ro", None


def _volume_name(name: str) -> str:
    if not name:
        raise wrong("the source is empty; write a path or a volume's name before the colon")
    if "/" in name:
        raise wrong(
            f"{shown(name)} is neither a path nor a volume's name; write ./ before a relative path; "
            f"did you mean `./{name}`?"
        )
    if not _VOLUME_NAME.fullmatch(name):
        raise wrong(f"{shown(name)} is not a volume's name; write letters, digits and . _ -")
    return name


_LONG_KEYS = ("type", "source", "target", "read_only", "bind", "volume", "tmpfs")
_LONG_REFUSED = {
    "driver_opts": "driver options are not allowed: a volume is a plain local one; leave it out",
    "volume_driver": "only plain local volumes are supported; leave it out",
    "consistency": "it has no meaning on Linux; leave it out",
    "external": "volumes of others cannot be used; leave it out",
}
_SUB_REFUSED = {
    "propagation": "mount propagation cannot be chosen; leave it out",
    "selinux": "SELinux labels are not changed here; leave it out",
    "nocopy": "it is not supported; leave it out",
    "subpath": "it is not supported; leave it out",
    "driver_opts": "driver options are not allowed: a volume is a plain local one; leave it out",
    "mode": "it is not supported: the job's owner owns the tmpfs; leave it out",
}


def _long(value: Mapping[str, object], context: Context) -> RawVolume:
    faults = Faults()
    known_keys(value, _LONG_KEYS, _LONG_REFUSED, faults)
    kinds = ("bind", "volume", "tmpfs")
    kind = faults.run(("type",), choice, value["type"], "a type of mount", kinds) if "type" in value else None
    if "type" not in value:
        faults.add(f"type is missing; write type: and one of {', '.join(kinds)}")
    where = faults.run(("target",), target, value["target"]) if "target" in value else None
    if "target" not in value:
        faults.add("target is missing; write target: and a path in the container")
    read_only = faults.run(("read_only",), boolean, value["read_only"]) if "read_only" in value else False
    origin = ""
    if kind in {"bind", "volume"} and "source" not in value:
        faults.add(f"source is missing; a {kind} needs one")
    elif kind == "bind":
        origin = faults.run(("source",), _bind_source, value["source"], context) or ""
    elif kind == "volume":
        origin = faults.run(("source",), _named_source, value["source"]) or ""
    elif kind == "tmpfs" and "source" in value:
        faults.add("a tmpfs has no source; leave it out", "source", at_key=True)
    amount = None
    for key in kinds:
        if key in value:
            amount = faults.run((key,), _options, value[key], key, kind) or amount
    faults.check()
    return str(kind), origin, str(where), bool(read_only), amount


def _bind_source(value: object, context: Context) -> str:
    return host_path(text(value, "a path", "a path, such as ~/data or ./src"), context)


def _named_source(value: object) -> str:
    name = text(value, "a volume's name", "a name, such as datasets")
    if name.startswith(("/", ".", "~")):
        raise wrong(f"{shown(name)} is a path; write type: bind, or a name such as datasets")
    return _volume_name(name)


def _options(value: object, key: str, kind: str | None) -> int | None:
    if kind is not None and key != kind:
        raise wrong(f"options of a {key} do not belong to a {kind}; leave them out")
    if not isinstance(value, Mapping):
        raise not_a(value, "a mapping of options", "{size: 1g}" if key == "tmpfs" else "nothing here")
    faults = Faults()
    known = {"bind": ("create_host_path",), "volume": (), "tmpfs": ("size",)}[key]
    known_keys(value, known, _SUB_REFUSED, faults)
    if "create_host_path" in value and key == "bind":
        made = faults.run(("create_host_path",), boolean, value["create_host_path"])
        if made:
            faults.add(
                "sources are never created; make the directory, and write false or leave it out",
                "create_host_path",
            )
    amount = (
        faults.run(("size",), size, value["size"], TMPFS_LEAST, "1g") if "size" in value and key == "tmpfs" else None
    )
    faults.check()
    return amount


VOLUMES_MAX = 256
"""Of one job: each is opened and pinned before it starts."""


def volumes(value: object, context: Context) -> tuple[RawVolume, ...]:
    """Mounts in Compose's short and long forms, sources made absolute; no target twice."""
    faults = Faults()
    result: list[RawVolume] = []
    seen: dict[str, int] = {}
    items = list(_items(value, "volumes", "[~/data:/data:ro]"))
    if len(items) > VOLUMES_MAX:
        raise wrong(f"{len(items):,} volumes are too many; at most {VOLUMES_MAX} are allowed")
    for index, item in enumerate(items):
        read = _long if isinstance(item, Mapping) else _short
        volume = faults.run((index,), read, item, context)  # type: ignore[arg-type]
        if volume is None:
            continue
        if volume[2] in seen:
            faults.add(f"{shown(volume[2])} is mounted twice (also by volumes[{seen[volume[2]]}]); keep one", index)
        seen.setdefault(volume[2], index)
        result.append(volume)
    faults.check()
    return tuple(result)


_NEVER = r"(?!/+(proc|sys|dev|\.gpujobs|etc/(passwd|group)|(var/)?run/nvidia-container-devices)(/|:|$))(?!/+(:|$))"
_TARGET_SCHEMA = templated(
    {"type": "string", "pattern": f"^{_NEVER}/"}, allowed="a path from the root where something can be mounted"
)
_NAMED_SCHEMA = templated(
    {"type": "string", "pattern": f"^{_VOLUME_NAME.pattern}$"}, allowed="a volume's name, such as datasets"
)
VOLUMES_SCHEMA: Json = {
    "type": "array",
    "items": {
        "anyOf": [
            templated(
                {
                    "type": "string",
                    "pattern": rf"^(~|~/[^:]*|[./][^:]*|{_VOLUME_NAME.pattern}):{_NEVER}/[^:]*(:(ro|rw))?$",
                    "not": {"pattern": r"[\x00-\x1f\x7f-\x9f]"},
                },
                allowed="source:target, such as ~/data:/data:ro or .:/workspace",
            ),
            {
                "type": "object",
                "additionalProperties": False,
                "required": ["type", "target"],
                "properties": {
                    "type": templated({"enum": ["bind", "volume", "tmpfs"]}),
                    "source": TEXT,
                    "target": _TARGET_SCHEMA,
                    "read_only": templated({"type": "boolean"}),
                    "bind": {
                        "type": "object",
                        "properties": {"create_host_path": templated({"const": False})},
                        "additionalProperties": False,
                    },
                    "volume": {"type": "object", "additionalProperties": False},
                    "tmpfs": {
                        "type": "object",
                        "properties": {"size": size_schema(TMPFS_LEAST)},
                        "additionalProperties": False,
                    },
                },
                "allOf": [
                    {
                        "if": {"properties": {"type": {"const": "tmpfs"}}},
                        "then": {"properties": {"source": False, "bind": False, "volume": False}},
                        "else": {"required": ["source"], "properties": {"tmpfs": False}},
                    },
                    {
                        "if": {"properties": {"type": {"const": "bind"}}},
                        "then": {"properties": {"volume": False, "source": {"not": {"pattern": r"^~[^/]"}}}},
                    },
                    {
                        "if": {"properties": {"type": {"const": "volume"}}},
                        "then": {"properties": {"bind": False, "source": _NAMED_SCHEMA}},
                    },
                ],
            },
        ]
    },
}

# ---------------------------------------------------------------------------------------------- ports

RawPort = tuple[int, int | None, str, str]
"""Target, published or None for any free one, host address, protocol."""

_PORT = r"([0-9]{1,6})(?:-([0-9]{1,6}))?"
_ADDRESS = r"(\[[^\]]{1,60}\]|[^:/\[\]]{1,60})"
_PORTS = re.compile(rf"(?:{_ADDRESS}:(?:{_PORT})?:|{_PORT}:)?{_PORT}(?:/([A-Za-z]{{1,10}}))?")
_PORT_EXAMPLE = "a port such as 8888, or published:target such as 8080:80"
LOOPBACK = "127.0.0.1"
PORTS_MAX = 1000
"""Of one job: each is a process or a rule of the Engine."""


def _short_port(value: object) -> list[RawPort]:
    real = typed(value)
    words = str(real).strip() if isinstance(real, str | int) and not isinstance(real, bool) else ""
    match = _PORTS.fullmatch(words)
    if match is None:
        raise not_a(value, "a port", _PORT_EXAMPLE)
    address = host_ip(match[1]) if match[1] else LOOPBACK
    protocol = choice((match[8] or "tcp").lower(), "a protocol", ("tcp", "udp"))
    inside = _range(match[6], match[7])
    first, last = (match[2], match[3]) if match[1] else (match[4], match[5])
    outside: Sequence[int | None] = _range(first, last) if first else [None] * len(inside)
    if len(outside) != len(inside):
        raise wrong(
            f"{shown(words)} publishes {len(outside)} ports for {len(inside)}; both ranges need the same length"
        )
    return [(to, at, address, protocol) for to, at in zip(inside, outside, strict=True)]


def _range(first: str, last: str | None) -> list[int]:
    low = integer(first.lstrip("0") or "0", "a port", "a port", 1, 65535)
    high = integer(last.lstrip("0") or "0", "a port", "a port", 1, 65535) if last else low
    if high < low:
        raise wrong(f"the range {first}-{last} ends before it begins; write the lower port first")
    if high - low >= PORTS_MAX:
        raise wrong(f"the range {first}-{last} has {high - low + 1:,} ports; at most {PORTS_MAX:,} are allowed")
    return list(range(low, high + 1))


def _long_port(value: Mapping[str, object]) -> list[RawPort]:
    faults = Faults()
    keys = ("target", "published", "host_ip", "protocol")
    known_keys(value, keys, {"mode": "it has a meaning in a swarm only; leave it out"}, faults)
    to = at = None
    if "target" in value:
        to = faults.run(("target",), integer, value["target"], "a port", "a port", 1, 65535)
    else:
        faults.add("target is missing; write target: and the container's port")
    if "published" in value:
        at = faults.run(("published",), integer, value["published"], "a port", "a port", 1, 65535)
    address = faults.run(("host_ip",), host_ip, value.get("host_ip", LOOPBACK))
    kinds = ("tcp", "udp")
    protocol = faults.run(("protocol",), choice, value.get("protocol", "tcp"), "a protocol", kinds)
    faults.check()
    return [(to or 0, at, address or LOOPBACK, protocol or "tcp")]


def ports(value: object) -> tuple[RawPort, ...]:
    """Ports in Compose's short and long forms, ranges expanded; on loopback unless an address is given."""
    faults = Faults()
    result: list[RawPort] = []
    seen: dict[object, int] = {}
    for index, item in enumerate(_items(value, "ports", "[8888, 8080:80]")):
        if isinstance(item, Mapping):
            found = faults.run((index,), _long_port, item)
        else:
            found = faults.run((index,), _short_port, item)
        for port in found or ():
            key = (port[0], port[3]) if port[1] is None else (port[1], port[2], port[3])
            if key in seen:
                faults.add(f"port {port[1] or port[0]} is given twice (also by ports[{seen[key]}]); keep one", index)
                break
            seen[key] = index
            result.append(port)
        if len(result) > PORTS_MAX:
            faults.add(f"{len(result):,} ports are too many; at most {PORTS_MAX:,} are allowed", index)
            break
    faults.check()
    return tuple(result)


_PORT_SCHEMA = integer_schema(1, 65535)
_TOO_HIGH = r"0+|6553[6-9]|655[4-9][0-9]|65[6-9][0-9]{2}|6[6-9][0-9]{3}|[7-9][0-9]{4}|[1-9][0-9]{5,}"
"""A pattern of no port: 0, or above 65535."""
PORTS_SCHEMA: Json = {
    "type": "array",
    "items": {
        "anyOf": [
            templated(
                {"type": "integer", "minimum": 1, "maximum": 65535},
                {
                    "type": "string",
                    "pattern": r"^\s*"
                    + _PORTS.pattern.replace("(?:", "(")
                    .replace("[A-Za-z]{1,10}", "[tT][cC][pP]|[uU][dD][pP]")
                    .replace(r"[^\]]{1,60}", IP_PATTERN)
                    .replace(r"[^:/\[\]]{1,60}", IP_PATTERN)
                    + r"\s*$",
                    "not": {"pattern": rf"(^|[:-])\s*0*({_TOO_HIGH})(-|:|/|\s*$)"},
                },
                allowed=_PORT_EXAMPLE,
            ),
            {
                "type": "object",
                "additionalProperties": False,
                "required": ["target"],
                "properties": {
                    "target": _PORT_SCHEMA,
                    "published": _PORT_SCHEMA,
                    "host_ip": templated(
                        {"type": "string", "pattern": rf"^(\[{IP_PATTERN}\]|{IP_PATTERN})$"}, allowed=IP_HINT
                    ),
                    "protocol": templated({"enum": ["tcp", "udp"]}),
                },
            },
        ]
    },
}
