"""A command line as a shell reads it, as far as one can without running it; and words written for one."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

from gpujobs.core.errors import InvalidInput

DOLLAR = "\0"
"""Stands for a dollar sign that is meant as such; one that begins a variable stays ``$``."""


def raw(text: str) -> str:
    """A word with its dollar signs."""
    return text.replace(DOLLAR, "$")


_ENDS = frozenset(";|&<>()")
_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)|`([^`]*)`|\$\{[A-Za-z_][A-Za-z0-9_]*(?!:?[-?+}]|[A-Za-z0-9_])[^{}]*\}")
"""Also ``${NAME%…}`` and the like, which a shell computes and a job file does not."""
_HERE = frozenset({"pwd", "pwd -P", "pwd -L", "realpath .", "readlink -f ."})


@dataclass(slots=True)
class Words:
    """The words of one command.

    Attributes:
        words: With :data:`DOLLAR` for literal dollar signs.
        rest: What follows the command (a pipe, a second command); empty if nothing does.
        unknown: Substitutions (``$(…)``) whose result cannot be known.
    """

    words: list[str] = field(default_factory=list)
    rest: str = ""
    unknown: list[str] = field(default_factory=list)


def split(line: str) -> Words:
    """Splits a line; variables stay, ``$(pwd)`` becomes ``$PWD``.

    Raises:
        InvalidInput: A quote is not closed.
    """
    if "\0" in line:
        raise InvalidInput("the command line contains a NUL character")
    return _Splitter(line.replace("\\\r\n", "\\\n").strip()).run()


class _Splitter:
    def __init__(self, line: str) -> None:
        self._line = line
        self._at = 0
        self._word: list[str] | None = None
        self._result = Words()

    def run(self) -> Words:
        line = self._line
        while self._at < len(line):
            char = line[self._at]
            if char in "'\"":
                self._quoted(char)
            elif char == "\\":
                after = line[self._at + 1 : self._at + 2]
                if after != "\n":
                    self._add(DOLLAR if after == "$" else after)
                self._at += 2
            elif char in "$`":
                self._dollar()
            elif char in " \t\r":
                self._end()
                self._at += 1
            elif char == "#" and self._word is None:
                newline = line.find("\n", self._at)
                self._at = newline if newline >= 0 else len(line)
            elif char in _ENDS or char == "\n":
                self._result.rest = line[self._at :].strip()
                break
            else:
                self._add(char)
                self._at += 1
        self._end()
        return self._result

    def _add(self, text: str) -> None:
        if self._word is None:
            self._word = []
        self._word.append(text)

    def _end(self) -> None:
        if self._word is not None:
            self._result.words.append("".join(self._word))
            self._word = None

    def _quoted(self, quote: str) -> None:
        line = self._line
        self._add("")
        self._at += 1
        while line[self._at : self._at + 1] != quote:
            char = line[self._at : self._at + 1]
            after = line[self._at + 1 : self._at + 2]
            if not char:
                raise InvalidInput(f"the command line has a quote {quote} that is not closed")
            if quote == "'":
                self._add(DOLLAR if char == "$" else char)
                self._at += 1
            elif char == "\\" and after and after in '$`"\\\n':
                self._add({"$": DOLLAR, "\n": ""}.get(after, after))
                self._at += 2
            elif char in "$`":
                self._dollar()
            else:
                self._add(char)
                self._at += 1
        self._at += 1

    def _dollar(self) -> None:
        """A variable, a substitution, or a dollar sign."""
        found = _SUBSTITUTION.match(self._line, self._at)
        variable = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{[A-Za-z_][^{}]*\})").match(self._line, self._at)
        if found is not None:
            command = (found[1] or found[2] or "").strip()
            if command in _HERE:
                self._add("${PWD}")
            else:
                self._result.unknown.append(found[0])
                self._add(found[0].replace("$", DOLLAR))
            self._at = found.end()
        elif variable is not None:
            self._add(f"${{{variable[1]}}}" if variable[1] else variable[0])
            self._at = variable.end()
        else:
            self._add(DOLLAR if self._line[self._at] == "$" else "`")
            self._at += 1


def folded(line: str) -> str:
    """A shell's line over several lines, each option on its own; what is quoted stays as it is."""
    words = re.findall(r"""(?:\$'(?:[^'\\]|\\.)*'|'[^']*'|"(?:\$\([^"]*\)|[^"\\])*"|\\.|[^\s'"\\])+""", line)
    return "".join((" \\\n    " if word.startswith("--") and at else " " if at else "") + word
                   for at, word in enumerate(words))  # fmt: skip


def quoted(word: str) -> str:
    """A word for a shell; line ends and tabs stay, what else no terminal shows is ``$'…'``, of bash, zsh and ksh."""
    if all(char.isprintable() or char in "\n\t" for char in word):
        return shlex.quote(word)
    return "$'" + "".join(_ESCAPES.get(char) or (char if char.isprintable() else _escape(char)) for char in word) + "'"


_ESCAPES = {"\n": r"\n", "\t": r"\t", "\\": r"\\", "'": r"\'"}


def _escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 128 else f"\\u{ord(char):04x}" if ord(char) < 65536 else (
        f"\\U{ord(char):08x}")  # fmt: skip
