"""Frozen dataclasses to plain JSON values and back, by their annotations; what equals its default is left out.

For the values that the ledger keeps (specifications, owners, states), in normal form. Files of users are read by
:mod:`gpujobs.specfile`, which validates; this trusts what it reads, since only the ledger's writer wrote it.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Plain JSON values of a dataclass, tuple or scalar."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(found)
            for field in fields(value)
            if (found := getattr(value, field.name)) != _default(field)
        }
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def decode(kind: type[T], data: Any) -> T:
    """The value of that kind; keys that a later version wrote are ignored."""
    return _decode(kind, data)  # type: ignore[no-any-return]


def _decode(kind: Any, data: Any) -> Any:
    origin = get_origin(kind)
    if origin is Annotated:
        return _decode(get_args(kind)[0], data)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        return None if data is None else _decode(options[0], data)
    if origin is tuple:
        arguments = get_args(kind)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item) for item in data)
        return tuple(_decode(item_kind, item) for item_kind, item in zip(arguments, data, strict=True))
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _decode(hints[name], item) for name, item in data.items() if name in hints})
    if kind is float and isinstance(data, int):
        return float(data)
    return data
