"""What a check of the machine says: findings, each with what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gpujobs.core.errors import OK, Refused, Unavailable


class Level(StrEnum):
    """How bad a finding is; in :data:`WORST_FIRST` the worst comes first."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


WORST_FIRST = (Level.ERROR, Level.WARNING, Level.OK)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: What it is about, one of :data:`gpujobs.core.checkup.AREAS`.
        level: ``warning`` where jobs run but something is amiss or could not be looked at, ``error`` where jobs
            do not run, do not get their GPUs, or where the machine can be taken over through them.
        message: A sentence: what was found.
        hint: What to do about it; empty where nothing is to be done.
    """

    area: str
    level: Level
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order in which they are shown.

    Attributes:
        engine_answers: Whether the Docker Engine could be asked, or need not be by this account.
    """

    findings: tuple[Finding, ...]
    engine_answers: bool

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return all(finding.level is not Level.ERROR for finding in self.findings)

    @property
    def exit(self) -> int:
        """The exit code: 4 without an Engine, 3 with an error, else 0."""
        if not self.engine_answers:
            return Unavailable.exit
        return OK if self.ok else Refused.exit
