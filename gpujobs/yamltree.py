"""YAML text to plain values with the position of each, under limits: for job files and the server's settings.

Only what both a person and any YAML reader would read alike gets through: YAML 1.2's core schema, no
duplicate keys, no tags, one document. Aliases and merge keys work, and what they expand to is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import yaml

from gpujobs.core.values import Loc, Plain, shown

BYTES_MAX = 1 << 20
"""Of a file: 1 MiB."""
NODES_MAX = 50_000
"""Values in a file once aliases are expanded; each costs about half a kilobyte while it is read."""
DEPTH_MAX = 24
"""Of lists and mappings within each other; a job file needs five."""
EMPTY = "the file is empty; write at least image: or build:"
SECOND = "a second document begins; write one job a file, or a matrix"

_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that YAML 1.2 does not take unescaped (production 1, c-printable)."""

_Parser: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Place:
    """A position, both counted from 1; the column in characters."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something wrong with the text itself."""

    place: Place
    loc: Loc
    message: str


class TextError(Exception):
    """The text cannot be read on; earlier notes stand."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.note = Note(place, (), message)


@dataclass(slots=True)
class Tree:
    """What a text holds.

    Attributes:
        value: ``dict``, ``list``, ``str`` and ``Plain``; keys are text.
        values: The place of each value by its path.
        keys: The place of each key by its path.
        notes: Mistakes that did not keep the rest from being read.
    """

    value: object = None
    values: dict[Loc, Place] = field(default_factory=dict)
    keys: dict[Loc, Place] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


@dataclass(slots=True)
class _Node:
    place: Place
    value: object  # str, Plain, list[_Node] or list[tuple[_Node, _Node]]
    mapping: bool = False
    done: bool = False
    weight: int = 1  # values in it, aliases expanded
    height: int = 1


def decode(text: bytes | str) -> str:
    """The text of a file: UTF-8, without a byte order mark, not too large.

    Raises:
        TextError: It is none, with the place where it goes wrong.
    """
    start = Place(1, 1)
    if len(text) > BYTES_MAX:
        raise TextError(start, f"the file has {len(text):,} bytes; at most {BYTES_MAX:,} (1 MiB) are allowed")
    if isinstance(text, bytes):
        raw = text
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise TextError(start, "the file is UTF-16; save it as UTF-8")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            before = raw[: error.start].decode()
            raise TextError(
                _at(before), f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
            ) from error
    text = text.removeprefix("\ufeff")
    if bad := _FORBIDDEN.search(text):
        char, place = bad[0], _at(text[: bad.start()])
        if char < " ":
            what = "a NUL character" if char == "\0" else f"control character \\x{ord(char):02x}"
            raise TextError(place, f"{what} in the file; remove it (in double quotes \\x{ord(char):02x})")
        raise TextError(place, f"character U+{ord(char):04X} in the file; remove it")
    if len(text.encode()) > BYTES_MAX:
        raise TextError(start, f"the file has {len(text.encode()):,} bytes; at most {BYTES_MAX:,} (1 MiB) are allowed")
    return text


def _at(before: str) -> Place:
    return Place(before.count("\n") + 1, len(before) - before.rfind("\n"))


def read(text: bytes | str, *, empty: str | None = EMPTY, second: str = SECOND) -> Tree:
    """Reads one document.

    Args:
        text: The file, UTF-8.
        empty: What is said of a text that holds no value; None where that is allowed: the tree's value is None.
        second: What is said where another document begins.

    Raises:
        TextError: It cannot be read to its end.
    """
    plain = decode(text)
    tree = Tree()
    root = _compose(plain, tree, second)
    if root is not None:
        _expand(root, tree)
    elif empty is not None:
        raise TextError(Place(1, 1), empty)
    return tree


def path_of(loc: Loc) -> str:
    """A value's path as it is told to people: ``gpus.count``, ``volumes[2]``."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
            continue
        plain = step.replace("_", "").replace("-", "").isalnum() and step.isascii()
        word = step if plain else shown(step, 40)
        path += f".{word}" if path else word
    return path


def _compose(text: str, tree: Tree, second: str) -> _Node | None:
    parser = _Parser(text)
    try:
        return _Composer(tree, second).document(parser.get_event)
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, text) from error
    except yaml.YAMLError as error:
        raise TextError(Place(1, 1), f"not valid YAML: {shown(str(error), 100)}") from error
    finally:
        parser.dispose()


_SAID = (
    (
        "mapping values are not allowed",
        "a `:` where no key can be; indent keys alike, and quote texts that hold `: `",
    ),
    (
        "could not find expected ':'",
        "a key without `:`; write `key: value`, and quote texts over several lines",
    ),
    (
        "did not find expected key",
        "this does not line up with the lines above; indent keys of one mapping alike",
    ),
    (
        "did not find expected '-'",
        "this does not line up with the list above; begin each of its items with `- `",
    ),
    (
        "did not find expected ',' or '}'",
        "a `{` is not closed; close it with `}`, and put commas between its keys",
    ),
    (
        "did not find expected ',' or ']'",
        "a `[` is not closed; close it with `]`, and put commas between its items",
    ),
    (
        "did not find expected node content",
        "brackets do not match, or an item between them is missing; write such as [a, b] or {a: b}",
    ),
    ("unexpected end of stream", "a quote is not closed; close it"),
    ("unexpected document indicator", "a quote is not closed; close it"),
    (
        "found character that cannot start any token",
        "no text can begin with this character; put the text in quotes",
    ),
    ("found undefined alias", "an alias of no anchor; write `&name` before the value it stands for"),
    (
        "unknown escape character",
        r"no such escape in double quotes; write `\\` for a backslash, or single quotes",
    ),
    ("block sequence entries are not allowed", "a list cannot begin here; begin it on a line of its own"),
    ("invalid leading UTF-8", "not UTF-8; save the file as UTF-8"),
)


def _syntax(error: yaml.MarkedYAMLError, text: str) -> TextError:
    mark = error.problem_mark or error.context_mark
    place = Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)
    lines = text.split("\n")
    near = lines[place.line - 1] if place.line <= len(lines) else ""
    if "\t" in near[: len(near) - len(near.lstrip())]:
        return TextError(Place(place.line, near.index("\t") + 1), "a tab indents this line; indent with spaces")
    problem = str(error.problem or error.context or "")
    begun = any(words in _say(problem) for words in ("not closed", "a key without"))
    opened = error.context_mark if begun else None
    if opened is not None:
        place = Place(opened.line + 1, opened.column + 1)
    return TextError(place, f"not valid YAML: {_say(problem)}")


def _say(problem: str) -> str:
    return next((said for start, said in _SAID if start in problem), problem)


class _Composer:
    """Builds nodes from events without recursion, under the limits."""

    def __init__(self, tree: Tree, second: str) -> None:
        self._tree = tree
        self._second = second
        self._anchors: dict[str, _Node] = {}
        self._stack: list[tuple[_Node, list[_Node]]] = []
        self._made = 0
        self._root: _Node | None = None

    def document(self, next_event: Callable[[], yaml.Event | None]) -> _Node | None:
        documents = 0
        while (event := next_event()) is not None and not isinstance(event, yaml.StreamEndEvent):
            mark = event.start_mark
            assert mark is not None
            place = Place(mark.line + 1, mark.column + 1)
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise TextError(place, self._second)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(str(event.anchor), place)
            elif isinstance(event, yaml.ScalarEvent):
                self._scalar(event, place)
            elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
                self._tag(event.tag, event.implicit, place)
                node = _Node(place, [], mapping=isinstance(event, yaml.MappingStartEvent))
                self._anchor(event.anchor, node)
                self._stack.append((node, []))
                if len(self._stack) > DEPTH_MAX:
                    raise TextError(place, f"lists and mappings are nested more than {DEPTH_MAX} deep")
                self._count(place)
            elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
                node, items = self._stack.pop()
                node.value = list(zip(items[::2], items[1::2], strict=True)) if node.mapping else items
                node.weight = 1 + sum(item.weight for item in items)
                node.height = 1 + max((item.height for item in items), default=0)
                node.done = True
                self._add(node)
        return self._root

    def _scalar(self, event: yaml.ScalarEvent, place: Place) -> None:
        text = str(event.value)
        if event.tag == "tag:yaml.org,2002:str":
            plain = False
        else:
            self._tag(event.tag, any(event.implicit), place)
            plain = bool(event.implicit[0])
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise TextError(place, r"the text contains a NUL character or half a character; remove the \0 or \u in it")
        self._count(place)
        node = _Node(place, Plain(text) if plain else text, done=True)
        self._anchor(event.anchor, node)
        self._add(node)

    def _tag(self, tag: str | None, implicit: object, place: Place) -> None:
        if tag is not None and tag != "!" and not implicit:
            shorter = tag.replace("tag:yaml.org,2002:", "!!")
            self._tree.notes.append(Note(place, (), f"tag {shown(shorter)} is not allowed; leave it out"))

    def _anchor(self, anchor: str | None, node: _Node) -> None:
        if anchor is not None:
            self._anchors[anchor] = node

    def _alias(self, anchor: str, place: Place) -> None:
        node = self._anchors.get(anchor)
        if node is None:
            raise TextError(place, f"not valid YAML: {_say('found undefined alias')}")
        if not node.done:
            raise TextError(place, f"alias {shown('*' + anchor)} is part of what it stands for; write the value out")
        # A value may be used many times: its size counts each time, before anything of that size is made.
        self._count(place, node.weight)
        self._add(_Node(place, node.value, node.mapping, done=True, weight=node.weight, height=node.height))

    def _count(self, place: Place, weight: int = 1) -> None:
        self._made += weight
        if self._made > NODES_MAX:
            raise TextError(place, f"the file has more than {NODES_MAX:,} values (aliases count each time)")

    def _add(self, node: _Node) -> None:
        if self._stack:
            self._stack[-1][1].append(node)
            if len(self._stack) + node.height > DEPTH_MAX + 2:
                raise TextError(node.place, f"lists and mappings are nested more than {DEPTH_MAX} deep")
        else:
            self._root = node


def _expand(root: _Node, tree: Tree) -> None:
    """Makes plain values; the depth is limited already."""
    tree.value = _build(root, (), tree)


def _build(node: _Node, loc: Loc, tree: Tree) -> object:
    tree.values[loc] = node.place
    if node.mapping:
        return _fill(node, loc, {}, tree, merging=False)
    if isinstance(node.value, list):
        return [_build(item, (*loc, index), tree) for index, item in enumerate(node.value)]
    return node.value


def _fill(node: _Node, loc: Loc, result: dict[str, object], tree: Tree, *, merging: bool) -> dict[str, object]:
    """Puts a mapping's keys into ``result`` where they are not there yet; then those it merges."""
    merges: list[_Node] = []
    seen: dict[str, Place] = {}
    assert isinstance(node.value, list)
    for key, value in node.value:
        name = _key(key, loc, tree)
        if name is None:
            continue
        if name == "<<" and isinstance(key.value, Plain):
            merges.extend(value.value if isinstance(value.value, list) and not value.mapping else [value])
            continue
        if name in seen and not merging:
            said = f"the key is given twice (also in line {seen[name].line}); keep one"
            tree.notes.append(Note(key.place, (*loc, name), said))
        seen.setdefault(name, key.place)
        if name not in result:
            tree.keys[(*loc, name)] = key.place
            result[name] = _build(value, (*loc, name), tree)
    for merge in merges:
        if merge.mapping:
            _fill(merge, loc, result, tree, merging=True)
        else:
            said = "only a mapping can be merged; write <<: *anchor of one"
            tree.notes.append(Note(merge.place, (*loc, "<<"), said))
    return result


def _key(key: _Node, loc: Loc, tree: Tree) -> str | None:
    if not isinstance(key.value, list):
        return str(key.value)
    brace = " (a text that begins with { needs quotes)" if key.mapping else ""
    tree.notes.append(Note(key.place, loc, f"a key has to be a text; write one word{brace}"))
    return None
