"""Everything that can go wrong in words for a person.

    GpujobsError                      exit  code (HTTP API)
    ├── InvalidInput                  2     invalid           a file, an option, a value
    │   └── UnknownId                 2     unknown           a job, GPU or image that is not there
    ├── Refused                       3     refused           policy, permission, can never fit
    ├── Unavailable                   4     unavailable       no server, no Engine, an unclean end
    └── Interrupted                   130   interrupted       the user pressed Ctrl-C

A job's own failure is no error of ours: its exit code is passed on (``JOB_FAILED`` where it has none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

OK = 0
JOB_FAILED = 1


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake in a file: where it is and what is wrong with it.

    Attributes:
        file: The file's name as its user wrote it; empty where the text came from elsewhere.
        line: From 1; 0 where the position is not known.
        column: From 1, in characters; 0 where the position is not known.
        path: The key's path, such as ``gpus.count`` or ``volumes[2]``; empty for the whole file.
        message: What is wrong, what is allowed, and what may have been meant.
    """

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file or '<text>'}:{self.line}:{self.column}"
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class GpujobsError(Exception):
    """Base of all errors that are shown to a person.

    Args:
        message: One sentence: what happened.
        hint: One sentence: what to do about it; may be empty.
        problems: Positions in a file, where there are any.
    """

    exit: ClassVar[int] = 1
    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "", problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = problems


class InvalidInput(GpujobsError):
    """What was given is not valid; nothing was done."""

    exit = 2
    code = "invalid"
    status = 400


class UnknownId(InvalidInput):
    """What was named is not there, or not the asker's to see."""

    code = "unknown"
    status = 404


class Refused(GpujobsError):
    """It is understood and will not be done: a rule, a permission, or a request that can never fit."""

    exit = 3
    code = "refused"
    status = 403


class Unavailable(GpujobsError):
    """The server or the Engine cannot be reached; trying later may help."""

    exit = 4
    code = "unavailable"
    status = 503


class Interrupted(GpujobsError):
    """The user ended the command; the job goes on."""

    exit = 130
    code = "interrupted"
    status = 499


BY_CODE: dict[str, type[GpujobsError]] = {
    kind.code: kind for kind in (InvalidInput, UnknownId, Refused, Unavailable, Interrupted)
}
"""The error classes by their code, for the client that reads them from an answer."""
