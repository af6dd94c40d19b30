"""Plain substitution in texts: ``${VAR}`` as Compose has it, ``{{ name }}`` of a matrix: no engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from gpujobs.core.values import did_you_mean, shown, wrong

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DEPTH = 8
_WITHIN = {":-", "-", ":?", "?", ":+", "+"}
LENGTH_MAX = 256 * 1024
"""Of one text after substitution, in characters: more than the kernel takes as one argument (128 KiB)."""


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Replaces ``$VAR``, ``${VAR}``, ``${VAR:-x}``, ``${VAR-x}``, ``${VAR:?x}``, ``${VAR?x}``, ``${VAR:+x}``.

    ``$$`` gives one dollar sign. Defaults may hold variables themselves.

    Raises:
        SpecError: A variable without a default is not set, or the form is none of these.
    """
    if "$" not in text:
        return text

    def resolve(name: str, operator: str, rest: str, depth: int) -> str:
        value = variables.get(name)
        if operator == "":
            if value is None:
                near = did_you_mean(name, [known for known in variables if known.isidentifier()])
                raise wrong(
                    f"variable {name} is not set; set it, write ${{{name}:-default}}, or $$ for a dollar sign{near}"
                )
            return value
        present = value is not None and (value != "" or not operator.startswith(":"))
        if operator.endswith("+"):
            return expand(rest, depth) if present else ""
        if value is not None and present:
            return value
        if operator.endswith("?"):
            raise wrong(f"variable {name} is not set: {expand(rest, depth) or 'it is required'}")
        return expand(rest, depth)

    def expand(part: str, depth: int) -> str:
        result = "".join(_pieces(part, lambda name, operator, rest: resolve(name, operator, rest, depth + 1), depth))
        if len(result) > LENGTH_MAX:
            raise wrong(f"the text has {len(result):,} characters after ${{…}}; at most {LENGTH_MAX:,} are allowed")
        return result

    return expand(text, 0)


def names(text: str) -> frozenset[str]:
    """The variables that a text names, also in defaults; what :func:`interpolate` refuses is passed over.

    It reads any text, also a whole file's: for a client that does not read YAML. Comments count then too.
    """
    found: set[str] = set()

    def note(name: str, operator: str, rest: str) -> str:
        del operator
        found.add(name)
        if "$" in rest:
            found.update(names(rest[:10_000]))
        return ""

    for _ in _pieces(text, note, 0, strict=False):
        pass
    return frozenset(found)


def _pieces(text: str, resolve: Callable[[str, str, str], str], depth: int, *, strict: bool = True) -> Iterator[str]:
    """The text's parts in order, with variables resolved."""
    if depth > _DEPTH:
        raise wrong(f"defaults within defaults are nested more than {_DEPTH} deep")
    start = 0
    while (dollar := text.find("$", start)) >= 0:
        yield text[start:dollar]
        after = text[dollar + 1 : dollar + 2]
        plain = _NAME.match(text, dollar + 1)
        if after == "$":
            yield "$"
            start = dollar + 2
        elif plain is not None:
            yield resolve(plain[0], "", "")
            start = plain.end()
        elif after == "{" and (braced := _braced(text, dollar)) is not None:
            name, operator, rest, start = braced
            yield resolve(name, operator, rest)
        elif strict:
            raise wrong(f"{shown(text[dollar:], 20)} is not a variable; write ${{NAME}}, or $$ for a dollar sign")
        else:
            start = dollar + 1
    yield text[start:]


def _braced(text: str, dollar: int) -> tuple[str, str, str, int] | None:
    """Name, operator, operand and end of the ``${…}`` at an offset; None if it is not well formed."""
    name = _NAME.match(text, dollar + 2)
    if name is None:
        return None
    at = name.end()
    if text[at : at + 1] == "}":
        return name[0], "", "", at + 1
    operator = text[at : at + 2] if text[at : at + 1] == ":" else text[at : at + 1]
    if operator not in _WITHIN:
        return None
    at += len(operator)
    depth, begin = 1, at
    for brace in re.compile(r"\$\{|\}").finditer(text, at, at + LENGTH_MAX):
        depth += 1 if brace[0] == "${" else -1
        if depth == 0:
            return name[0], operator, text[begin : brace.start()], brace.end()
    return None


_BRACES = re.compile(r"\{\{\{\{|\{\{(.*?)\}\}|\{\{", re.DOTALL)


def references(text: str) -> frozenset[str]:
    """The matrix names in a text.

    Raises:
        SpecError: Something else stands between the double braces.
    """
    if "{{" not in text:
        return frozenset()
    found = set()
    for match in _BRACES.finditer(text):
        if match[0] == "{{{{":
            continue
        name = (match[1] or "").strip()
        if not _NAME.fullmatch(name):
            raise wrong(
                f"{shown(match[0], 30)} is no matrix name; write {{{{ name }}}} (names only, no expressions)"
                ", or {{{{ for two literal braces"
            )
        found.add(name)
    return frozenset(found)


def substitute(text: str, values: Mapping[str, str]) -> str:
    """Replaces ``{{ name }}`` by its value, once: what a value brings in is not replaced again.

    ``{{{{`` gives two literal braces. A text that is one reference and nothing else becomes the value itself,
    so that an unquoted number stays a number.
    """
    whole = _BRACES.match(text)
    if whole is not None and whole.end() == len(text) and whole[1] is not None:
        return values[whole[1].strip()]
    length = len(text) + sum(len(values[match[1].strip()]) for match in _BRACES.finditer(text) if match[1] is not None)
    if length > LENGTH_MAX:
        raise wrong(f"the text has {length:,} characters after {{{{ }}}}; at most {LENGTH_MAX:,} are allowed")
    result = _BRACES.sub(lambda match: "{{" if match[1] is None else values[match[1].strip()], text)
    return type(text)(result)
