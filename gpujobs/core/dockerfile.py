"""Dockerfiles: which images they take, and the same build written so that it can take no other.

The Engine's classic builder lets ``FROM`` and ``COPY --from`` name any image of the machine and shares the cache of
its layers among everybody who builds. So what it is given is never the file as it came, but one made of what was
understood here: each instruction on one line, each image by its full id, and behind each ``FROM`` a label with the
owner, which makes the owner part of what every later layer is cached by. What is not understood is refused; so
there is no way of writing an instruction that the Engine would read and this does not.

The grammar is that of https://docs.docker.com/reference/dockerfile/ without what needs BuildKit.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gpujobs.core import forms
from gpujobs.core.errors import InvalidInput, Problem
from gpujobs.core.values import SpecError

OWNER_LABEL = "gpujobs.owner"
"""Whose build an image is, by uid: on the result and on every layer on the way to it."""

SCRATCH = "scratch"

MAX_BYTES = 1 << 20
MAX_LINE_BYTES = 65_000
"""The Engine's reader takes lines of less than 64 KiB."""

MAX_STAGES = 100

_FLAGS: Mapping[str, frozenset[str]] = {
    "ADD": frozenset({"chown"}),
    "COPY": frozenset({"chown", "from"}),
    "FROM": frozenset({"platform"}),
    "HEALTHCHECK": frozenset({"interval", "timeout", "start-period", "start-interval", "retries"}),
    **dict.fromkeys(
        ("ARG", "CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "MAINTAINER", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL",
         "USER", "VOLUME", "WORKDIR"),
        frozenset(),
    ),
}  # fmt: skip
"""Every instruction, with the flags that the classic builder knows."""

_BUILDKIT = frozenset({"mount", "network", "security", "link", "chmod", "parents", "exclude", "checksum",
                       "keep-git-dir", "device", "unpack"})  # fmt: skip

_DIRECTIVE = re.compile(r"#[ \t]*([A-Za-z][A-Za-z0-9]*)[ \t]*=[ \t]*(.+?)[ \t]*$")
_FLAG = re.compile(r"--([a-z][a-z-]*)(?:=([!#-&(-\[\]-~]*))?(?=[ \t]|$)")
"""A flag in printable ASCII without quotes and backslashes: the Engine reads flags byte by byte and takes halves of
other characters for spaces."""

_CONTINUED = re.compile(r"\\[ \t]*$")
_HEREDOC = re.compile(r"(?:^|\s)\d*<<-?[\"']?[A-Za-z_]")
_STAGE_NAME = re.compile(r"[a-z][a-z0-9\-_.]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_SPACE = re.compile(r"[ \t]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VARIABLE = re.compile(r"\\(.)|'([^']*)'|\"|\$(?:\{([A-Za-z_]\w*)(?:(:[-+])((?:[^{}]|\$\{\w+\})*))?\}|([A-Za-z_]\w*))")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        keyword: In capitals.
        flags: (name, value) of each ``--name=value``, in order.
        rest: What follows, on one line.
        line: Where it began in the file, from 1.
    """

    keyword: str
    flags: tuple[tuple[str, str], ...]
    rest: str
    line: int

    def flag(self, name: str) -> str | None:
        """A flag's value; None where it is not given."""
        return dict(self.flags).get(name)

    def __str__(self) -> str:
        return " ".join((self.keyword, *(f"--{name}={value}" for name, value in self.flags), self.rest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What a Dockerfile takes and does, up to the stage that is built.

    Attributes:
        instructions: Those before the first ``FROM`` and those of the stages.
        bases: For each ``FROM``, in order, the image, the name of an earlier stage, or ``scratch``.
        stages: The stages' names; empty for one without.
        images: The images that are taken, each once, in order of mention.
    """

    instructions: tuple[Instruction, ...]
    bases: tuple[str, ...]
    stages: tuple[str, ...]
    images: tuple[str, ...]

    @property
    def from_scratch(self) -> bool:
        """Whether a stage begins with nothing: the Engine's cache is then open to images made by strangers."""
        return SCRATCH in self.bases

    def rewritten(self, ids: Mapping[str, str], owner: int) -> tuple[str, tuple[int, ...]]:
        """The file for the Engine, and for each of its lines the line of the original that it came from.

        Args:
            ids: The full id of each of :attr:`images`.
            owner: Whose build it is, as a uid.
        """
        lines: list[tuple[str, int]] = []
        stage = -1
        for instruction in self.instructions:
            if instruction.keyword == "FROM":
                stage += 1
                base, name = self.bases[stage], self.stages[stage]
                source = base if base == SCRATCH or base in self.stages[:stage] else ids[base]
                lines.append((f"FROM {source} AS {name}" if name else f"FROM {source}", instruction.line))
                lines.append((f"LABEL {OWNER_LABEL}={owner}", instruction.line))
                continue
            taken = instruction.flag("from")
            if taken is not None and taken in ids and not _is_stage(taken, self.stages[:stage], stage):
                flags = tuple((n, ids[taken] if n == "from" else v) for n, v in instruction.flags)
                instruction = Instruction(instruction.keyword, flags, instruction.rest, instruction.line)
            lines.append((str(instruction), instruction.line))
        return "\n".join(text for text, _ in lines) + "\n", tuple(line for _, line in lines)


def outline(text: str, *, file: str = "Dockerfile", args: Iterable[tuple[str, str]] = (), target: str | None = None,
            platform: str = "linux/amd64") -> Outline:  # fmt: skip
    """Read a Dockerfile.

    Args:
        text: The file.
        file: Its name, for messages.
        args: Build arguments.
        target: The stage that is wanted; the last by default.
        platform: The machine's: no other can be built.

    Raises:
        InvalidInput: It is not valid, or has something that cannot be built here; with its line.
    """
    return _Reader(file, dict(args), platform).read(text, target)


def triggers_problem(triggers: Iterable[str]) -> str | None:
    """Why a base image's ``ONBUILD`` instructions cannot be let run; None where they can.

    They run as they are: one that takes files from an image would take them from any image of the machine.
    """
    for trigger in triggers:
        try:
            found = list(instructions(trigger))
        except InvalidInput as error:
            return f"its ONBUILD {trigger[:80]!r} is not understood: {error.message}"
        for instruction in found:
            if instruction.flag("from") is not None:
                return f"its ONBUILD {trigger[:80]!r} takes files from another image"
    return None


def instructions(text: str, file: str = "Dockerfile") -> Iterator[Instruction]:
    """The instructions of a Dockerfile, each joined to one line, comments left out.

    Raises:
        InvalidInput: A line is not valid, or is for BuildKit alone.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise InvalidInput(f"{file} is larger than {MAX_BYTES >> 20} MiB")
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    _check_directives(lines, file)
    joined, start = "", 0
    for number, line in enumerate(lines, 1):
        if _CONTROL.search(line):
            raise _wrong(file, number, "it has a control character")
        if line.lstrip().startswith("#") or not line.strip():
            continue
        start = start or number
        if line.rstrip(" \t").endswith("\\\\"):
            raise _wrong(file, number, "it ends in two backslashes, which are read in different ways; end it in one")
        continued = _CONTINUED.search(line)
        joined += (line if joined else line.lstrip())[: continued.start() if continued else None]
        if not continued:
            yield _instruction(joined, start, file)
            joined, start = "", 0
    if joined.strip():
        yield _instruction(joined, start, file)


def _check_directives(lines: list[str], file: str) -> None:
    """Refuse the directives that stand before all else and change how the rest is read, or by whom."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("#"):
            return
        directive = _DIRECTIVE.match(line.strip())
        if directive is None:
            continue
        name, value = directive[1].lower(), directive[2]
        if name == "syntax":
            raise _wrong(
                file, number, f"`# syntax={value}` names a program to read this file; it is not run here: leave it out"
            )
        if name == "escape" and value != "\\":
            raise _wrong(file, number, f"`# escape={value}` is not supported; end lines that go on with a backslash")


def _instruction(text: str, line: int, file: str) -> Instruction:
    if len(text.encode()) > MAX_LINE_BYTES:
        raise _wrong(file, line, f"the instruction is longer than {MAX_LINE_BYTES:,} bytes")
    word, *others = _SPACE.split(text.strip(" \t"), maxsplit=1)
    keyword, rest = word.upper(), others[0] if others else ""
    known = _FLAGS.get(keyword)
    if known is None:
        close = difflib.get_close_matches(keyword, _FLAGS, n=1, cutoff=0.7)
        raise _wrong(file, line, f"{word[:40]!r} is no instruction" + (f"; did you mean {close[0]}?" if close else ""))
    flags: list[tuple[str, str]] = []
    while rest.startswith("--"):
        found = _FLAG.match(rest)
        if found is None:
            flag = rest.split()[0][:40]
            raise _wrong(file, line, f"{flag!r} is not understood; write flags as --name=value, unquoted")
        name, value = found[1], found[2]
        if name not in known or value is None:
            raise _wrong(file, line, _unknown_flag(keyword, name, known))
        flags.append((name, value))
        rest = rest[found.end() :].lstrip(" \t")
    if rest[:1].isspace():
        raise _wrong(file, line, "there is a space that is none of ASCII before its arguments")
    if keyword in ("RUN", "COPY", "ADD") and _HEREDOC.search(rest):
        raise _wrong(file, line, f"{keyword} with a here-document (<<) needs BuildKit, which is not used here; "
                                 "use && between commands, or COPY a script")  # fmt: skip
    if keyword == "ONBUILD":
        inner = _instruction(rest, line, file) if rest else None
        if inner is None or inner.keyword in ("FROM", "ONBUILD", "MAINTAINER"):
            raise _wrong(file, line, "ONBUILD needs an instruction that is none of FROM, ONBUILD, MAINTAINER")
        if inner.flag("from") is not None:
            raise _wrong(file, line, "ONBUILD COPY --from is not supported")
    return Instruction(keyword, tuple(flags), rest, line)


def _unknown_flag(keyword: str, name: str, known: frozenset[str]) -> str:
    if name in _BUILDKIT and name not in known:
        instead = {"chmod": "use RUN chmod", "mount": "COPY the files"}.get(name, "leave it out")
        return f"{keyword} --{name} needs BuildKit, which is not used here; {instead}"
    allowed = f"it knows {', '.join(f'--{flag}=…' for flag in sorted(known))}" if known else "it has no flags"
    return f"{keyword} --{name}: {allowed}"


class _Reader:
    """Goes through a file once, with the arguments that its ``FROM`` lines may use."""

    def __init__(self, file: str, args: Mapping[str, str], platform: str) -> None:
        self._file = file
        self._args = args
        self._platform = platform
        self._declared: dict[str, str] = {}
        self._bases: list[str] = []
        self._stages: list[str] = []
        self._images: dict[str, None] = {}

    def read(self, text: str, target: str | None) -> Outline:
        kept: list[Instruction] = []
        ends: list[int] = []  # where each stage ends
        for instruction in instructions(text, self._file):
            if instruction.keyword == "FROM":
                if self._bases:
                    ends.append(len(kept))
                    if target is not None and self._built(target):
                        return self._outline(kept)
                self._from(instruction)
            elif not self._bases:
                self._before_first(instruction)
            elif (taken := instruction.flag("from")) is not None:
                self._take(taken, instruction)
            kept.append(instruction)
        if not self._bases:
            raise InvalidInput(f"{self._file} has no FROM", hint="FROM says which image to begin with.")
        if target is not None and not self._built(target):
            names = [name for name in self._stages if name]
            close = difflib.get_close_matches(target.lower(), names, n=1)
            meant = f"Did you mean {close[0]}?" if close else f"Its stages: {', '.join(names) or 'none has a name'}."
            raise InvalidInput(f"{self._file} has no stage {target!r}", hint=meant)
        return self._outline(kept)

    def _outline(self, kept: list[Instruction]) -> Outline:
        return Outline(
            instructions=tuple(kept), bases=tuple(self._bases), stages=tuple(self._stages), images=tuple(self._images)
        )

    def _built(self, target: str) -> bool:
        """Whether the stage that is being read is the wanted one."""
        last = len(self._stages) - 1
        return target.lower() == self._stages[last] or (target.isdecimal() and int(target) == last)

    def _before_first(self, instruction: Instruction) -> None:
        if instruction.keyword != "ARG":
            raise _wrong(self._file, instruction.line, f"{instruction.keyword} before the first FROM; only ARG may be")
        for word in _SPACE.split(instruction.rest.strip()):
            name, given, default = word.partition("=")
            if not _NAME.fullmatch(name):
                raise _wrong(self._file, instruction.line, f"{word[:40]!r} is no argument; write ARG NAME=default")
            if name in self._args:
                self._declared[name] = self._args[name]
            elif given:
                self._declared[name] = self._expanded(default, instruction.line)

    def _from(self, instruction: Instruction) -> None:
        line = instruction.line
        if len(self._bases) >= MAX_STAGES:
            raise _wrong(self._file, line, f"it has more than {MAX_STAGES} stages")
        words = _SPACE.split(instruction.rest.strip())
        name = ""
        if len(words) == 3 and words[1].lower() == "as":
            name = words[2].lower()
            if not _STAGE_NAME.fullmatch(name) or name == SCRATCH:
                raise _wrong(self._file, line, f"{words[2][:40]!r} is no name for a stage; use letters, digits, - _ .")
            if name in self._stages:
                raise _wrong(self._file, line, f"there is a stage {name!r} already")
        elif len(words) != 1 or not words[0]:
            raise _wrong(self._file, line, "write FROM image, or FROM image AS stage")
        platform = self._expanded(instruction.flag("platform") or "", line)
        if platform and platform not in (self._platform, self._platform.partition("/")[0]):
            raise _wrong(self._file, line, f"--platform={platform}: images are built for {self._platform} here")
        base = self._expanded(words[0], line)
        if not base:
            raise _wrong(self._file, line, f"{words[0]} is empty; give it a default: ARG NAME=image before it")
        if base.lower() in self._stages:
            base = base.lower()
        elif base != SCRATCH:
            self._image(base, line)
        self._bases.append(base)
        self._stages.append(name)

    def _take(self, name: str, instruction: Instruction) -> None:
        if "$" in name or not name:
            raise _wrong(self._file, instruction.line, "--from takes no variables; name an image, or a stage that does")
        current = len(self._stages) - 1
        if name.isdecimal() and int(name) >= current:
            raise _wrong(self._file, instruction.line, f"--from={name}: there is no earlier stage of that number")
        if not _is_stage(name, self._stages[:current], current):
            self._image(name, instruction.line)

    def _image(self, name: str, line: int) -> None:
        try:
            self._images[forms.image(name)] = None
        except SpecError as error:
            raise _wrong(self._file, line, str(error)) from error

    def _expanded(self, word: str, line: int) -> str:
        """A word with its variables, as a ``FROM`` line has them: arguments that were declared before it."""

        def value(match: re.Match[str]) -> str:
            escaped, literal, braced, operator, other, plain = match.groups()
            if escaped is not None:
                return escaped
            if literal is not None:
                return literal
            if match[0] == '"':
                return ""
            found = self._declared.get(braced or plain, "")
            if operator == ":-":
                return found or self._expanded(other, line)
            if operator == ":+":
                return self._expanded(other, line) if found else ""
            return found

        expanded = _VARIABLE.sub(value, word)
        if "${" in _VARIABLE.sub("", word):
            raise _wrong(self._file, line, f"{word[:80]!r}: write ${{NAME}}, ${{NAME:-default}} or ${{NAME:+other}}")
        return expanded


def _is_stage(name: str, earlier: Iterable[str], current: int) -> bool:
    return name.lower() in set(earlier) - {""} or (name.isdecimal() and int(name) < current)


def _wrong(file: str, line: int, message: str) -> InvalidInput:
    return InvalidInput(f"{file}:{line}: {message}", problems=(Problem(file, line, 1, "", message),))
