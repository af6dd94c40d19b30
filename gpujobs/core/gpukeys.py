"""GPUs: how a job asks for them in its file, what is refused, and the JSON Schema."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from gpujobs.core.patterns import between, whole
from gpujobs.core.values import (
    TEXT,
    Context,
    Fault,
    Faults,
    Json,
    Parsed,
    SpecError,
    choice,
    describe,
    integer,
    not_a,
    shown,
    size,
    source,
    templated,
    text,
    typed,
    wrong,
)

FIELDS = ("memory", "model", "capability", "link", "mig", "share", "uuid")
"""What can be asked of GPUs besides their number."""
GPUS_MAX = 1024
GPU_MEMORY_LEAST = 1 << 20
"""In bytes: 1 MiB; catches ``memory: 40`` where ``40g`` was meant."""
LINKS = ("any", "same-numa", "nvlink")
_COUNT_EXAMPLE = "a number such as 2, or a range such as 1-4"
_UUID = re.compile(r"(?:GPU|MIG)-[A-Za-z0-9][A-Za-z0-9/-]{0,95}")
_INDICES = re.compile(r"(?:device=)?\s*([0-9]{1,3}(?:\s*,\s*[0-9]{1,3})+)\s*,?|device=([0-9]{1,3})")
_MIG = re.compile(r"(?:[0-9]c\.)?[0-9]g\.[0-9]{1,3}gb(?:[+-][a-z]+(?:\.[a-z]+)*)*")
_CAPABILITY = re.compile(r"\s*(>=|<=|==|>|<)\s*([0-9]{1,2})\.([0-9])\s*")


def indices(value: object) -> list[int] | None:
    """The GPU indices that a value names, where it looks like a list of them; else None."""
    if isinstance(value, list | tuple) and value:
        numbers = [typed(item) for item in value]
        numbers = [
            int(item) if isinstance(item, str) and item.isascii() and item.isdigit() and len(item) < 4 else item
            for item in numbers
        ]
        if all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in numbers):
            return [int(str(item)) for item in numbers]
    if isinstance(value, str) and (match := _INDICES.fullmatch(str(value).strip(" \"'"))):
        return [int(part) for part in (match[1] or match[2]).split(",") if part.strip()]
    return None


def by_index(found: Sequence[int], context: Context) -> str:
    """What to write instead of GPU indices."""
    named = [context.uuids[index] for index in found[:16] if index < len(context.uuids)]
    if len(named) == len(found):
        return f"GPUs are not chosen by index, which changes; write {{uuid: [{', '.join(named)}]}}"
    if context.uuids:
        return (
            "GPUs are not chosen by index, which changes, and this machine has "
            f"0 to {len(context.uuids) - 1}; write UUIDs instead, `gpujobs gpus` shows them"
        )
    return "GPUs are not chosen by index, which changes; write UUIDs instead, `gpujobs gpus` shows them"


def count(value: object) -> tuple[int, int]:
    """A number of GPUs or a range of numbers, as (fewest, most)."""
    real = typed(value)
    span = re.fullmatch(r"\s*([0-9]{1,6})\s*-\s*([0-9]{1,6})\s*", real) if isinstance(real, str) else None
    if span is not None:
        low = integer(span[1], "a number of GPUs", _COUNT_EXAMPLE, 1, GPUS_MAX)
        high = integer(span[2], "a number of GPUs", _COUNT_EXAMPLE, 1, GPUS_MAX)
        if high < low:
            raise wrong(f"the range {shown(str(real))} ends before it begins; did you mean {high}-{low}?")
        return low, high
    if isinstance(real, str) and real.strip().lower() == "all":
        raise wrong(
            "'all' is not a number of GPUs; write how many, such as 2, or a range such as 1-8: "
            "others share this machine"
        )
    both = integer(value, "a number of GPUs", _COUNT_EXAMPLE, 0, GPUS_MAX)
    return both, both


COUNT_SCHEMA = templated(
    {"type": "integer", "minimum": 0, "maximum": GPUS_MAX},
    {"type": "string", "pattern": whole(0, GPUS_MAX)},
    {"type": "string", "pattern": rf"^\s*{between(1, GPUS_MAX)}\s*-\s*{between(1, GPUS_MAX)}\s*$"},
    allowed=_COUNT_EXAMPLE,
)


def gpu_memory(value: object) -> int:
    """Memory of a GPU, in bytes."""
    return size(value, GPU_MEMORY_LEAST, "40GB")


def strings(what: str, example: str, check: Callable[[str], str]) -> Callable[[object], tuple[str, ...]]:
    """A reader of one text or a list of different ones."""

    def one(value: object) -> str:
        return check(text(value, what, example, limit=256))

    def read(value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            return (one(value),)
        if not value:
            raise wrong(f"an empty list is not {what}; write {example}, or leave it out")
        faults = Faults()
        found: list[str] = []
        for index, item in enumerate(value):
            words = faults.run((index,), one, item)
            if words is not None and words in found:
                faults.add(f"{shown(words)} is given twice; keep one", index)
            elif words is not None:
                found.append(words)
        faults.check()
        return tuple(found)

    return read


def model_glob(words: str) -> str:
    """A model's name or glob."""
    return words.strip()


def uuid(words: str) -> str:
    """A GPU's or MIG device's UUID; upper and lower case differ, as to the runtime."""
    if not _UUID.fullmatch(words):
        near = (
            f"; did you mean `{words[:3].upper()}{words[3:]}`?"
            if words[:4].lower() in {"gpu-", "mig-"} and (_UUID.fullmatch(words[:3].upper() + words[3:]))
            else ""
        )
        raise wrong(f"{shown(words)} is not a GPU's UUID; write GPU-… or MIG-…, `gpujobs gpus` shows them{near}")
    return words


_UUID_STRING: Json = templated(
    {"type": "string", "pattern": r"^(GPU|MIG)-[A-Za-z0-9][A-Za-z0-9/-]{0,95}$"},
    allowed="GPU-… or MIG-…, as `gpujobs gpus` shows them",
)
UUID_SCHEMA: Json = {
    "anyOf": [_UUID_STRING, {"type": "array", "items": _UUID_STRING, "minItems": 1, "uniqueItems": True}]
}
MODEL_SCHEMA: Json = {
    "anyOf": [
        TEXT,
        {"type": "array", "items": TEXT, "minItems": 1, "uniqueItems": True},
    ]
}


def capability(value: object) -> tuple[str, tuple[int, int]]:
    """CUDA compute capability: an operator and a version, such as ``>=8.0``."""
    words = source(value)
    match = _CAPABILITY.fullmatch(words) if isinstance(typed(value), str) else None
    if match is None:
        bare = re.fullmatch(r"\s*=?([0-9]{1,2})(\.[0-9])?\s*", words) if isinstance(value, str | int | float) else None
        near = f'; did you mean ">={bare[1]}{bare[2] or ".0"}"?' if bare else ""
        raise wrong(
            f'{describe(value)} is not a compute capability; write an operator and a version, such as ">=8.0"{near}'
        )
    return match[1], (int(match[2]), int(match[3]))


CAPABILITY_SCHEMA = templated(
    {"type": "string", "pattern": r"^\s*(>=|<=|==|>|<)\s*[0-9]{1,2}\.[0-9]\s*$"},
    allowed='an operator and a version, such as ">=8.0"',
)


def link(value: object) -> str:
    """What has to connect the GPUs."""
    return choice(value, "a link", LINKS)


def mig(value: object) -> str:
    """A MIG profile."""
    words = text(value, "a MIG profile", "a profile such as 3g.20gb").strip().lower()
    if not _MIG.fullmatch(words):
        bare = re.fullmatch(r"(?:mig-)?([0-9]g\.[0-9]{1,3})(?:gb)?", words)
        near = f"; did you mean `{bare[1]}gb`?" if bare else ""
        raise wrong(f"{describe(value)} is not a MIG profile; write one such as 1g.10gb or 3g.20gb{near}")
    return words


MIG_SCHEMA = templated(
    {
        "type": "string",
        "pattern": r"^\s*([0-9][cC]\.)?[0-9][gG]\.[0-9]{1,3}[gG][bB]([+-][A-Za-z]+(\.[A-Za-z]+)*)*\s*$",
    },
    allowed="a profile such as 1g.10gb or 3g.20gb",
)


def fewest(value: object) -> int:
    """The fewest GPUs of a count."""
    return count(value)[0]


models = strings("a GPU model", "a name or a glob, such as A100", model_glob)
_read_uuids = strings("a GPU's UUID", "GPU-… or MIG-…, `gpujobs gpus` shows them", uuid)


def uuids(value: object, context: Context) -> tuple[str, ...]:
    """UUIDs of GPUs; indices are answered with the UUIDs to write."""
    real = typed(value)
    alone = isinstance(real, int) and not isinstance(real, bool) and real >= 0
    found = indices([value] if alone else value)
    if found is not None:
        raise wrong(by_index(found, context))
    return _read_uuids(value)


def gpu_forms(value: object, context: Context) -> Mapping[str, object]:
    """A request as a mapping of the fields, from a number, a range or a mapping."""
    found = indices(value)
    if found is not None:
        raise wrong(by_index(found, context))
    if isinstance(value, list | tuple):
        raise not_a(value, "a request for GPUs", "a number such as 2, or a mapping such as {count: 2, memory: 40GB}")
    if not isinstance(value, Mapping):
        low, high = count(value)
        return {"count": Parsed(low), "max_count": Parsed(high)}
    result = dict(value)
    if "count" in value:
        try:
            low, high = count(value["count"])
        except SpecError:
            return result  # the field's own reader says what is wrong
        return {"max_count": Parsed(high), **result, "count": Parsed(low)}
    listed = value.get("uuid")
    implied = Parsed(len(listed) if isinstance(listed, list | tuple) and listed else 1)
    return {"max_count": implied, **result, "count": implied}


def gpu_rules(value: Mapping[str, object]) -> list[Fault]:
    """What cannot be asked together."""
    faults: list[Fault] = []
    if "mig" in value and "share" in value:
        faults.append(Fault(("share",), "a share of a MIG device cannot be had; keep mig or share", at_key=True))
    if "mig" in value and "link" in value and typed(value["link"]) != "any":
        faults.append(Fault(("link",), "MIG devices have no links; leave link out", at_key=True))
    low, high = value.get("count"), value.get("max_count")
    if isinstance(low, Parsed) and isinstance(high, Parsed):
        listed = value.get("uuid")
        many = len(listed) if isinstance(listed, list | tuple) else 1
        if listed is not None and (low.value, high.value) != (many, many):
            faults.append(
                Fault(
                    ("count",),
                    f"{_span(low, high)} GPUs are asked for and {many} named by uuid; leave count out",
                )
            )
        elif low.value == 0 and any(key in FIELDS for key in value):
            others = ", ".join(key for key in value if key in FIELDS)
            faults.append(Fault(("count",), f"0 asks for no GPU; write a number above 0, or leave {others} out"))
    return faults


def _span(low: Parsed, high: Parsed) -> str:
    return str(low.value) if low == high else f"{low.value}-{high.value}"


def gpu_schema(inner: Json) -> Json:
    """JSON Schema of a request: a count, or the mapping without the field that is no key."""
    properties = inner["properties"]
    assert isinstance(properties, dict)
    properties = {key: item for key, item in properties.items() if key != "max_count"}
    rules: list[Json] = [
        {"if": {"required": ["mig"]}, "then": {"properties": {"share": False}, "errorMessage": "keep mig or share"}}
    ]
    rules.append(
        {
            "if": {"required": ["mig"]},
            "then": {"properties": {"link": {"not": {"enum": ["same-numa", "nvlink"]}}}},
        }
    )
    rules.append(
        {
            "if": {
                # Not an enum: editors would offer its values.
                "properties": {
                    "count": {"anyOf": [{"type": "integer", "maximum": 0}, {"type": "string", "pattern": "^0$"}]}
                },
                "required": ["count"],
            },
            "then": {"maxProperties": 1},
        }
    )
    return {"anyOf": [COUNT_SCHEMA, {**inner, "properties": properties, "allOf": rules}]}
