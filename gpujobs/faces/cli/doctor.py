"""The command ``doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gpujobs.faces.cli.common import emit, emit_grid, emit_json, hooks_of, terminal_width
from gpujobs.faces.words import clean

if TYPE_CHECKING:
    from gpujobs.core.finding import Report
    from gpujobs.faces.grid import Grid

EXAMPLES = """\b
Examples:
  gpujobs doctor
  sudo gpujobs doctor                what only root may look at, too
  gpujobs doctor --json | jq -r '.findings[] | select(.level == "error") | .message'"""

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Check this machine: Docker, the NVIDIA toolkit and driver, disks, permissions; each with what to do.

    Needs no server and changes nothing. Exit code 0 without an error, 3 with one, 4 where the Docker Engine cannot
    be reached.
    """
    examine = hooks_of(context).doctor
    assert examine is not None
    report = examine()
    if json:
        emit_json(
            {
                "ok": report.ok,
                "findings": [
                    {"area": item.area, "level": item.level.value, "message": item.message, "hint": item.hint}
                    for item in report.findings
                ],
            }
        )
    else:
        emit_grid(table(report))
        emit(f"\n{summary(report)}\n")
    return report.exit


def table(report: Report) -> Grid:
    """The findings as a table: on a terminal each hint stands below its finding, in a pipe it is the last column."""
    from gpujobs.faces.grid import Cell, Column, Grid

    below = terminal_width() is not None
    columns = (Column("AREA"), Column("LEVEL"), Column("FINDING", fold=True), Column("WHAT TO DO", fold=True))
    grid = Grid(columns[:-1] if below else columns)
    for item in report.findings:
        level = item.level.value
        cells = (Cell(item.area, "bold"), Cell(level, STYLES[level]), Cell(clean(item.message)))
        if below:
            grid.add(*cells, below=Cell(f"→ {clean(item.hint)}" if item.hint else "", "dim"))
        else:
            grid.add(*cells, clean(item.hint))
    return grid


def summary(report: Report) -> str:
    """How many of each level, in a sentence."""
    count = {level: sum(item.level.value == level for item in report.findings) for level in STYLES}
    errors, warnings = count["error"], count["warning"]
    if not errors and not warnings:
        return "All is well."
    told = (f"{errors} error{'' if errors == 1 else 's'}", f"{warnings} warning{'' if warnings == 1 else 's'}")
    return f"{', '.join(told)}, {count['ok']} ok"
