"""Markers on the model's fields: how the form in the file is read, and its JSON Schema.

They speak the validator's protocol in plain mappings, so that nothing here needs the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from gpujobs.core.values import Context, Fault, Json, Parsed, SpecError

T = TypeVar("T")


class Info(Protocol):
    """What the validator hands to a reader."""

    @property
    def context(self) -> Context | None:
        """The context of the file."""


class Form(Generic[T]):
    """Marks a field with the reader of its form in the file and with the JSON Schema of that form.

    The two methods with ``pydantic`` in their names are that library's protocol; they use plain mappings, so
    that this module does not need the library.

    Args:
        read: Gives the normal form, or raises SpecError.
        schema: JSON Schema of what ``read`` accepts.
        about: One line for people, shown by editors.
    """

    def __init__(self, read: Callable[[object], T], schema: Json, about: str = "") -> None:
        self._read = read
        self._schema = schema
        self._about = about

    def _call(self, value: object, info: Info) -> object:
        del info
        return value.value if isinstance(value, Parsed) else self._read(value)

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> Json:
        return {"type": "function-plain", "function": {"type": "with-info", "function": self._call}}

    def __get_pydantic_json_schema__(self, core_schema: object, handler: object) -> Json:
        return {**({"description": self._about} if self._about else {}), **self._schema}


class ContextForm(Form[T]):
    """As :class:`Form`, for what can be read only with the file's context."""

    def __init__(self, read: Callable[[object, Context], T], schema: Json, about: str = "") -> None:
        super().__init__(self._none, schema, about)
        self._read_in = read

    @staticmethod
    def _none(value: object) -> T:
        raise AssertionError(f"{value!r}: read with its context only")

    def _call(self, value: object, info: Info) -> object:
        if isinstance(value, Parsed):
            return value.value
        assert info.context is not None
        return self._read_in(value, info.context)


class Around:
    """Marks a dataclass that has short forms besides the mapping, or rules across its keys.

    Args:
        before: Turns the file's form into a mapping of the fields; raises SpecError where it cannot.
        across: Mistakes between keys of the mapping that ``before`` gave.
        schema: Turns the JSON Schema of the mapping into that of all forms.
        about: One line for people, shown by editors.
    """

    def __init__(
        self,
        before: Callable[[object, Context], Mapping[str, object]],
        across: Callable[[Mapping[str, object]], list[Fault]],
        schema: Callable[[Json], Json],
        about: str = "",
    ) -> None:
        self._before = before
        self._across = across
        self._schema = schema
        self._about = about

    def _call(self, value: object, handler: Callable[[object], object], info: Info) -> object:
        if isinstance(value, Parsed):
            return value.value
        assert info.context is not None
        mapping = self._before(value, info.context)
        faults = self._across(mapping)
        try:
            result = handler(mapping)
        except ValueError as error:
            raise SpecError(faults, error) from error
        if faults:
            raise SpecError(faults)
        return result

    def __get_pydantic_core_schema__(self, source: object, handler: Callable[[object], Json]) -> Json:
        function = {"type": "with-info", "function": self._call}
        return {"type": "function-wrap", "function": function, "schema": handler(source)}

    def __get_pydantic_json_schema__(self, core_schema: Json, handler: _JsonHandler) -> Json:
        inner = core_schema["schema"]
        assert isinstance(inner, dict)
        if inner["type"] == "nullable":
            # That a field may be None means that its key may be left out, not that it may be null.
            inner = inner["schema"]
        plain = dict(handler.resolve_ref_schema(handler(inner)))
        plain.pop("description", None)  # a docstring, written for programmers
        return {**({"description": self._about} if self._about else {}), **self._schema(plain)}


class _JsonHandler(Protocol):
    def __call__(self, schema: Json, /) -> Json: ...

    def resolve_ref_schema(self, maybe_ref_json_schema: Json, /) -> Json: ...
