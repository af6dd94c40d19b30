"""The job file: YAML text to validated jobs, with the position of every mistake; its JSON Schema.

    text -> tree (values and places) -> ${VAR} -> matrix -> {{ name }} -> the model -> elements

The validator is loaded only when a file is validated: what the client needs (:func:`needs`) is light.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

from gpujobs.core import spec
from gpujobs.core.errors import InvalidInput, Problem
from gpujobs.core.forms import env_file_paths
from gpujobs.core.interpolate import interpolate, names, references
from gpujobs.core.spec import JobFile, JobSpec
from gpujobs.core.values import Context, Fault, Json, Loc, Parsed, SpecError, amount, printable, shown, typed, wrong
from gpujobs.specfile import matrix
from gpujobs.specfile.words import MISSING, unknown
from gpujobs.yamltree import Place, TextError, Tree, path_of, read

if TYPE_CHECKING:
    from pydantic import TypeAdapter

PROBLEMS_MAX = 100
"""Mistakes that are told of one file."""
GATHERED_MAX = 1000
"""Mistakes that are looked at in one element, to tell the first of them in the file's order."""
EXPANDED_MAX = 64 << 20
"""Bounds what ``${VAR}`` and a matrix make of one file: characters, and 64 for each text."""


@dataclass(frozen=True, slots=True)
class Element:
    """One job of a file.

    Attributes:
        spec: The job.
        index: None without a matrix, else 0, 1, … in the matrix's order.
        axes: Name and value of each axis, as the file writes them.
    """

    spec: JobSpec
    index: int | None = None
    axes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Needs:
    """What the client has to send along with a file's text.

    Attributes:
        variables: Names of environment variables.
        env_files: Paths of the files under ``env_file``, ``${VAR}`` replaced where that was possible.
    """

    variables: frozenset[str]
    env_files: tuple[str, ...]


def parse(text: bytes | str, context: Context) -> list[Element]:
    """Validates a job file and expands its matrix.

    Args:
        text: The file, UTF-8, at most 1 MiB.
        context: What the client sent along.

    Raises:
        InvalidInput: With all mistakes, in the file's order.
    """
    return _Reading(context).elements(text)


def needs(text: bytes | str, variables: Mapping[str, str] | None = None) -> Needs:
    """What a file's text names: variables (also ``environment: [NAME]``) and env_files.

    Never raises: what is wrong with the text is for :func:`parse` to say.
    """
    try:
        value = read(text).value
    except TextError:
        return Needs(frozenset(), ())
    found: set[str] = set()
    for _, words in matrix.strings(value):
        found |= names(words)
    if not isinstance(value, Mapping):
        return Needs(frozenset(found), ())
    build = value.get("build")
    for pairs in (value.get("environment"), build.get("args") if isinstance(build, Mapping) else None):
        if isinstance(pairs, Mapping):
            found |= {key for key, item in pairs.items() if typed(item) is None}
        elif isinstance(pairs, list):
            found |= {str(item) for item in pairs if isinstance(item, str) and "=" not in item}
    paths = []
    for path in env_file_paths(value["env_file"]) if "env_file" in value else ():
        try:
            paths.append(interpolate(path, variables or {}))
        except SpecError:
            paths.append(path)
    return Needs(frozenset(found), tuple(paths))


def variables(text: bytes | str) -> frozenset[str]:
    """The names that a file uses as ``${VAR}`` in any of its forms, or as a variable without a value."""
    return needs(text).variables


@cache
def _adapter() -> TypeAdapter[JobFile]:
    from pydantic import TypeAdapter

    return TypeAdapter(spec.AnyJobFile)


def schema() -> Json:
    """JSON Schema (2020-12) of the job file, from the model that validates it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_tidy(_adapter().json_schema()),
        "title": "gpujobs job file",
        "description": "One job, or one for each combination of a matrix.",
    }


def _tidy(value: Json) -> Json:
    """Without the titles that the generator makes of field names, and definitions that nothing names.

    Patterns end at the text's end for every reader: a ``$`` of Python's also matches before a last line end.
    """
    holders = {"properties", "$defs", "patternProperties"}

    def walk(item: object, *, names_of: bool = False) -> object:
        if isinstance(item, dict):
            return {
                key: inner + "(?!\\n)" if key == "pattern" and str(inner).endswith("$") and not names_of
                else walk(inner, names_of=key in holders and not names_of)
                for key, inner in item.items()
                if names_of or key not in {"title", "default"}
            }
        return [walk(inner) for inner in item] if isinstance(item, list) else item

    result = walk(value)
    assert isinstance(result, dict)
    used = str({key: item for key, item in result.items() if key != "$defs"})
    kept = {key: item for key, item in result.pop("$defs", {}).items() if f"#/$defs/{key}'" in used}
    return {**result, **({"$defs": kept} if kept else {})}


class _Reading:
    """One file on its way to elements; gathers its mistakes."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._problems: set[Problem] = set()
        self._tree = Tree()
        self._left = EXPANDED_MAX

    def elements(self, text: bytes | str) -> list[Element]:
        try:
            self._tree = read(text)
        except TextError as error:
            self._note(error.note.place, (), error.note.message)
            self._raise()
        for note in self._tree.notes:
            self._note(note.place, note.loc, note.message)
        value = self._tree.value
        if not isinstance(value, dict):
            self._faults([Fault((), "the file is not a mapping; write keys and values, such as `name: train`")])
            self._raise()
        assert isinstance(value, dict)
        value = {key: item for key, item in value.items() if not key.startswith("x-")}
        value, broken = self._interpolated(value)
        result = self._expanded(value, broken)
        self._raise()
        return result

    def _interpolated(self, value: dict[str, object]) -> tuple[dict[str, object], set[str]]:
        """Variables replaced; keys of the top level in which that failed (their values mean nothing)."""
        broken: set[str] = set()
        result: dict[str, object] = {}

        def change(words: str) -> str:
            new = interpolate(words, self._context.variables)
            if new is words:
                return words
            # `NAME: ${NAME:-}` is the empty text, as in Compose, and not a key without a value.
            return type(words)(new) if new else new

        for key, item in value.items():
            result[key] = item
            for loc, words in matrix.strings(item, (key,)):
                if "$" in words:
                    try:
                        self._spend(change(words))
                    except SpecError as error:
                        broken.add(key)
                        self._faults(error.faults, loc)
            if key not in broken:
                result[key] = matrix.replace(item, change)
        return result, broken

    def _expanded(self, value: dict[str, object], broken: set[str]) -> list[Element]:
        has_matrix = "matrix" in value
        elements: list[dict[str, str]] = [{}]
        names_known = True
        if has_matrix and "matrix" not in broken:
            try:
                elements = matrix.combinations(value["matrix"])
            except SpecError as error:
                self._faults(error.faults, ("matrix",))
                names_known = False
        elif has_matrix:
            names_known = False
        templates: dict[str, frozenset[str]] = {}
        if names_known:
            axes = list(elements[0])
            try:
                seen, templates = matrix.used(value, axes, matrix=has_matrix)
            except SpecError as error:
                self._faults(error.faults)
                names_known = False
            else:
                for name in axes:
                    if name not in seen and not broken:
                        loc: Loc = ("matrix", name)
                        if loc not in self._tree.keys:
                            loc = ("matrix", "include", 0, name)
                        self._faults(
                            [
                                Fault(
                                    loc,
                                    f"the axis is not used; write {{{{ {name} }}}} in some value",
                                    at_key=True,
                                )
                            ]
                        )
        if not names_known:
            # Values with {{ }} cannot be known: the rest is still checked.
            broken = broken | {key for key, item in value.items() if _braced(item)} | {"matrix"}
            templates = {}
            elements = [{}]
        return self._validated(value, broken, elements, templates, has_matrix=has_matrix)

    def _validated(
        self,
        value: dict[str, object],
        broken: set[str],
        elements: list[dict[str, str]],
        templates: dict[str, frozenset[str]],
        *,
        has_matrix: bool,
    ) -> list[Element]:
        result: list[Element] = []
        fixed: dict[str, object] = {key: Parsed(None) for key in broken if key in spec.KEYS}
        raw = {key: item for key, item in value.items() if key not in broken}
        raw.pop("matrix", None)
        for key in [name for name, item in raw.items() if typed(item) is None and name in spec.KEYS]:
            self._faults([Fault((key,), "the key has no value; write one, or leave the key out")])
            fixed[key] = Parsed(None)
        braced = [key for key, item in raw.items() if _braced(item)]
        for index, element in enumerate(elements):
            try:
                filled = {**raw, **{key: matrix.fill(raw[key], element, self._spend) for key in braced}}
            except SpecError as error:
                self._faults(error.faults, ("matrix",) if has_matrix else ())
                break
            done = self._one({**filled, **fixed}, element, again=index > 0)
            if done is None or self._problems:
                if len(self._problems) >= PROBLEMS_MAX:
                    break
                continue
            result.append(
                Element(
                    done.spec(self._context.file),
                    index if has_matrix else None,
                    tuple((name, str(item)) for name, item in element.items()),
                )
            )
            if index == 0:
                # What no name stands in is the same in every element: validated once.
                for key in [key for key in raw if not templates.get(key)]:
                    fixed[key] = Parsed(getattr(done, key))
        return result

    def _spend(self, text: str) -> None:
        self._left -= len(text) + 64
        if self._left < 0:
            raise wrong(
                f"the file grows to more than {amount(EXPANDED_MAX)} of text; use shorter values or fewer elements"
            )

    def _one(self, raw: dict[str, object], element: dict[str, str], *, again: bool) -> JobFile | None:
        from pydantic import ValidationError

        try:
            return _adapter().validate_python(raw, context=self._context)
        except ValidationError as error:
            known = {(problem.line, problem.column, problem.path) for problem in self._problems} if again else set()
            for fault in islice(_flat(error), GATHERED_MAX):
                # Elements of a matrix go wrong in the same place: told for the first of them.
                loc = self._known(fault.loc)
                place = self._place(loc, at_key=fault.at_key)
                if (place.line, place.column, path_of(loc)) not in known:
                    self._faults([self._with(fault, element)])
        return None

    def _with(self, fault: Fault, element: Mapping[str, str]) -> Fault:
        """Says with which values of the matrix a template went wrong."""
        template: object = self._tree.value
        for step in fault.loc:
            if isinstance(template, Mapping):
                template = template.get(step)
            elif isinstance(template, list) and isinstance(step, int):
                template = template[step] if step < len(template) else None
        here = sorted(references(template) & set(element)) if element and isinstance(template, str) else []
        shown_values = ", ".join(f"{name}={shown(str(element[name]), 30)[1:-1]}" for name in here)
        return fault._replace(message=f"{fault.message} (with {shown_values})") if here else fault

    def _faults(self, faults: Iterable[Fault], above: Loc = ()) -> None:
        for fault in faults:
            loc = self._known((*above, *fault.loc))
            self._note(self._place(loc, at_key=fault.at_key), loc, fault.message)

    def _known(self, loc: Loc) -> Loc:
        """The part of a path that the file has: of a short form the whole is meant."""
        while loc and loc not in self._tree.values:
            loc = loc[:-1]
        return loc

    def _place(self, loc: Loc, *, at_key: bool) -> Place:
        if at_key and loc in self._tree.keys:
            return self._tree.keys[loc]
        return self._tree.values.get(loc, Place(1, 1))

    def _note(self, place: Place, loc: Loc, message: str) -> None:
        # Readers quote what they were given; whatever else of the file is in a sentence is made harmless here.
        self._problems.add(Problem(self._context.file, place.line, place.column, path_of(loc), printable(message)))

    def _raise(self) -> None:
        if not self._problems:
            return
        problems = sorted(self._problems)
        name = self._context.file or "the job file"
        message = f"{name} has {len(problems)} mistakes" if len(problems) > 1 else f"{name} has a mistake"
        hint = "" if len(problems) <= PROBLEMS_MAX else f"The first {PROBLEMS_MAX} are shown."
        raise InvalidInput(message, hint=hint, problems=tuple(problems[:PROBLEMS_MAX]))


def _braced(value: object) -> bool:
    return any("{{" in words for _, words in matrix.strings(value))


def _flat(error: ValueError, above: Loc = ()) -> Iterator[Fault]:
    """The mistakes in a validator's error, paths joined."""
    from pydantic import ValidationError

    if isinstance(error, SpecError):
        for fault in error.faults:
            yield fault._replace(loc=(*above, *fault.loc))
        if error.inner is not None:
            yield from _flat(error.inner, above)
        return
    assert isinstance(error, ValidationError)
    for item in error.errors(include_url=False, include_input=False):
        loc = (*above, *item["loc"])
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, SpecError):
            yield from _flat(inner, loc)
        elif item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
            yield Fault(loc, unknown(loc), at_key=True)
        elif item["type"] == "missing":
            yield Fault(loc[:-1], f"{loc[-1]} is missing; {MISSING[str(loc[-1])]}")
        else:
            raise AssertionError(item)


__all__ = ["Context", "Element", "InvalidInput", "Needs", "Problem", "needs", "parse", "schema", "variables"]
