"""The matrix of a job file: which jobs it stands for, and what ``{{ name }}`` is in each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from math import prod

from gpujobs.core.interpolate import references, substitute
from gpujobs.core.spec import MATRIX_MAX, MATRIX_NAME
from gpujobs.core.values import Faults, Loc, SpecError, describe, did_you_mean, shown, source, typed

Axes = tuple[tuple[str, str], ...]
Values = dict[str, str]

_FEW = "a list of values, such as [0.1, 0.01]"


def combinations(value: object) -> list[Values]:
    """The elements in order: the product of the axes, last one fastest, less ``exclude``, then ``include``.

    An entry of ``exclude`` drops all elements that have its values; one of ``include`` is an element of its
    own and gives every name. With ``include`` alone its first entry says which names there are.

    Raises:
        SpecError: With paths below ``matrix``.
    """
    faults = Faults()
    if not isinstance(value, Mapping):
        faults.add(f"{describe(value)} is not a matrix; write a mapping of lists, such as {{lr: [0.1, 0.01]}}")
        faults.check()
        return []
    axes = {}
    for name, items in value.items():
        if name not in {"include", "exclude"}:
            found = _axis(name, items, faults)
            if found:
                axes[name] = found
    includes = _sets(value, "include", faults)
    excludes = _sets(value, "exclude", faults)
    names = list(axes) or [name for entry in includes[:1] for name in entry]
    faults.check()
    if not names:
        faults.add(f"the matrix has no axis; write a name and {_FEW}")
        faults.check()
    many = (prod(len(items) for items in axes.values()) if axes else 0) + len(includes)
    if many > MATRIX_MAX:
        faults.add(f"the matrix expands to {many:,} jobs; at most {MATRIX_MAX:,} are allowed")
        faults.check()
    chosen = product(*axes.values()) if axes else ()
    result: list[Values] = [dict(zip(axes, values, strict=True)) for values in chosen]
    result = _exclude(result, excludes, names, faults)
    _include(result, includes, names, faults)
    faults.check()
    if not result:
        faults.add("exclude leaves no element; leave something in", "exclude", at_key=True)
        faults.check()
    return result


def _axis(name: str, items: object, faults: Faults) -> list[str]:
    if not re.fullmatch(MATRIX_NAME, name):
        faults.add(f"{shown(name)} is not a name; write letters, digits and _, such as lr", name, at_key=True)
        return []
    if not isinstance(items, list | tuple):
        faults.add(f"{describe(items)} is not a list; write {_FEW}", name)
        return []
    if not items:
        faults.add(f"the list is empty; write {_FEW}", name)
    found: list[str] = []
    known = set()
    for index, item in enumerate(items):
        if typed(item) is None or isinstance(item, Mapping | list | tuple):
            faults.add(f"{describe(item)} is not a value; write a text or a number", name, index)
        elif source(item) in known:
            faults.add(f"{shown(source(item))} is given twice; keep one", name, index)
        else:
            found.append(_scalar(item))
            known.add(source(item))
    return found


def _scalar(item: object) -> str:
    return item if isinstance(item, str) else source(item)


def _sets(value: Mapping[str, object], key: str, faults: Faults) -> list[Values]:
    given = value.get(key)
    if given is None:
        return []
    if not isinstance(given, list | tuple) or not given:
        what = "an empty list" if isinstance(given, list | tuple) else describe(given)
        faults.add(f"{what} is not a list of elements; write such as [{{lr: 0.1, seed: 1}}]", key)
        return []
    result = []
    for index, entry in enumerate(given):
        if not isinstance(entry, Mapping) or not entry:
            faults.add(
                f"{describe(entry)} is not an element; write names and values, such as {{lr: 0.1}}",
                key,
                index,
            )
            continue
        element = {}
        for name, item in entry.items():
            if not re.fullmatch(MATRIX_NAME, name) or name in {"include", "exclude"}:
                faults.add(
                    f"{shown(name)} is not a name; write letters, digits and _, such as lr",
                    key,
                    index,
                    name,
                    at_key=True,
                )
            elif typed(item) is None or isinstance(item, Mapping | list | tuple):
                faults.add(f"{describe(item)} is not a value; write a text or a number", key, index, name)
            else:
                element[name] = _scalar(item)
        result.append(element)
    return result


def _exclude(elements: list[Values], excludes: list[Values], names: list[str], faults: Faults) -> list[Values]:
    kept = elements
    for index, entry in enumerate(excludes):
        if _strange(entry, names, faults, "exclude", index):
            continue
        if len(excludes) * len(elements) > 50 * MATRIX_MAX:
            faults.add("exclude and the axes are too many together; write the elements as include", "exclude")
            break
        if not any(_matches(element, entry) for element in elements):
            faults.add("no element has these values; leave it out or correct it", "exclude", index)
        kept = [element for element in kept if not _matches(element, entry)]
    return kept


def _include(elements: list[Values], includes: list[Values], names: list[str], faults: Faults) -> None:
    seen = {tuple(element.items()) for element in elements}
    for index, entry in enumerate(includes):
        missing = [name for name in names if name not in entry]
        strange = _strange(entry, names, faults, "include", index)
        if missing:
            faults.add(f"the entry gives no {', '.join(missing)}; give every axis", "include", index)
        if missing or strange:
            continue
        element = {name: entry[name] for name in names}
        if tuple(element.items()) in seen:
            faults.add("this element is there already; leave it out", "include", index)
        seen.add(tuple(element.items()))
        elements.append(element)


def _strange(entry: Values, names: list[str], faults: Faults, *loc: str | int) -> bool:
    """Notes names of an entry that are no axes; says whether there are any."""
    unknown = [name for name in entry if name not in names]
    for name in unknown:
        said = f"there is no such axis; axes are {', '.join(names)}{did_you_mean(name, names)}"
        faults.add(said, *loc, name, at_key=True)
    return bool(unknown)


def _matches(element: Values, entry: Values) -> bool:
    return all(element.get(name) == item for name, item in entry.items())


def strings(value: object, loc: Loc = ()) -> Iterator[tuple[Loc, str]]:
    """Every text within a value, with its path."""
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(item, (*loc, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from strings(item, (*loc, index))


def replace(value: object, change: Callable[[str], str]) -> object:
    """The value with every text in it changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: replace(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace(item, change) for item in value]
    return value


def used(value: Mapping[str, object], names: list[str], *, matrix: bool) -> tuple[set[str], dict[str, frozenset[str]]]:
    """The matrix names in a file, and those in each of its keys.

    Raises:
        SpecError: A reference is malformed or names no axis.
    """
    faults = Faults()
    by_key: dict[str, frozenset[str]] = {}
    for key, item in value.items():
        found: set[str] = set()
        for loc, text in strings(item, (key,)):
            here = faults.run(loc, references, text) or frozenset()
            if key == "matrix" and here:
                faults.add("{{ }} cannot stand in the matrix itself; write the values out", *loc)
            elif key == "env_file" and here:
                faults.add(
                    "{{ }} cannot choose a file: it is read before the matrix; write environment:",
                    *loc,
                )
            elif key == "secrets" and here:
                faults.add("{{ }} cannot choose a secret: all jobs of a matrix have the same; write it out", *loc)
            elif key != "matrix":
                for name in sorted(here - set(names)):
                    allowed = f"names are {', '.join(names)}" if matrix else "there is no matrix: in this file"
                    faults.add(f"{{{{ {name} }}}} names no axis; {allowed}{did_you_mean(name, names)}", *loc)
                found |= here
        by_key[key] = frozenset(found)
    faults.check()
    return set().union(*by_key.values()), by_key


def fill(value: object, element: Values, spend: Callable[[str], None]) -> object:
    """A value of the file as it is in one element; tells ``spend`` of each text in it.

    Raises:
        SpecError: By ``spend``, or because a text grows too long.
    """

    def change(text: str) -> str:
        result = substitute(text, element) if "{{" in text else text
        spend(result)
        return result

    return replace(value, change)


__all__ = ["Axes", "SpecError", "combinations", "fill", "replace", "strings", "used"]
