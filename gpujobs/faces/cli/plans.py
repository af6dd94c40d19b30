"""The commands ``plan`` and ``rerun``: what a job would get, and a job once more."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gpujobs.core.errors import OK, Refused
from gpujobs.core.shellwords import folded
from gpujobs.faces.cli.common import client, emit, emit_grid, emit_json, tell, terminal_width
from gpujobs.faces.cli.ids import all_ids
from gpujobs.faces.cli.pulls import send_contexts
from gpujobs.faces.grid import Cell, Column, Grid
from gpujobs.faces.words import clean

PLAN_EXAMPLES = """\b
Examples:
  gpujobs plan train.yaml
  gpujobs plan train.yaml --as docker
  gpujobs plan train.yaml --as compose > compose.yaml
  gpujobs plan train.yaml --simulate configs/simulated/dgx-a100.yaml"""

RERUN_EXAMPLES = """\b
Examples:
  gpujobs rerun 12
  gpujobs logs -f $(gpujobs rerun 12 --quiet)"""


class Words(StrEnum):
    """Whose words a plan is printed in."""

    DOCKER = "docker"
    COMPOSE = "compose"


def plan(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A job file; - is the standard input.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    words: Annotated[Words | None, typer.Option("--as", help="Print only the same job in those words.")] = None,
    simulate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="On a simulated machine, without a server.")
    ] = None,
    run_as: Annotated[
        str | None, typer.Option("--run-as", metavar="USER", help="The account to run as. For root and administrators.")
    ] = None,
) -> int:
    """Show what a job would get if it were submitted now: GPUs and why, mounts, the same as a docker run line."""
    answer = _simulated(file, simulate) if simulate else client().plan([file], run_as=run_as)
    if json:
        emit_json(answer)
    elif words is not None:
        text = answer["docker_run" if words is Words.DOCKER else "compose"]
        if text is None:
            raise Refused(
                f"it would wait now: {clean(answer['message'])}", hint="`gpujobs plan` without --as says why."
            )
        emit(_pasted(text) + "\n" if words is Words.DOCKER else text)
    else:
        _print(answer)
    return OK


def _simulated(file: str, machine_file: Path) -> dict[str, Any]:
    from gpujobs import simulated
    from gpujobs.core.container import Image
    from gpujobs.core.decide import Host, Policy, View
    from gpujobs.core.planning import as_row, plan
    from gpujobs.core.queue import QueueState
    from gpujobs.faces.cli.files import elements_in, this_account

    machine = simulated.load(machine_file)
    host = Host(cpus=float(machine.cpus), memory=machine.memory_bytes)
    view = View(queue=QueueState(), inventory=machine.inventory, host=host, policy=Policy())
    uuids = tuple(gpu.uuid for gpu in machine.inventory.gpus)
    specs = [element.spec for element in elements_in(file, uuids)]
    rows = [
        as_row(plan(spec, this_account(), Image(id="", reference=spec.image or "(built)"), view))
        for spec in specs[:100]
    ]
    return {**rows[0], "jobs": len(specs), "others": rows[1:], "simulated": True}


def _print(answer: dict[str, Any]) -> None:
    if answer.get("simulated"):
        tell("SIMULATED: these GPUs are those of a file")
    if answer["jobs"] > 1:
        tell(f"the first of {answer['jobs']} jobs; --json has all of them")
    grid = Grid((Column(""), Column("GPU", right=True), Column("UUID"), Column("WHY", fold=True)))
    for reason in answer["reasons"]:
        mark = Cell("→", "green") if reason["chosen"] else Cell("")
        grid.add(mark, Cell(clean(reason.get("index", ""))), Cell(clean(reason["uuid"])), Cell(clean(reason["reason"])))
    if answer["message"]:
        verb = "Note" if answer["starts"] else "It would wait now"
        emit(f"{verb}: {clean(answer['message'])}\n")
    elif answer["starts"]:
        emit(f"It could start now, {f'on {_counted(gpus)}' if (gpus := answer['gpus']) else 'without GPUs'}.\n")
    if answer["reasons"]:
        emit_grid(grid)
    for mount in answer["mounts"]:
        end = " (read-only)\n" if mount["read_only"] else "\n"
        emit(f"Mount: {clean(mount['source'])} at {clean(mount['target'])}{end}")
    if answer["docker_run"]:
        line = _pasted(answer["docker_run"])
        # Over several lines for people; as it is where nobody looks.
        emit(f"The same with docker:\n  {folded(line) if terminal_width() else line}\n")


def _pasted(line: str) -> str:
    """A shell's line without what a terminal would act on; line ends and tabs within quotes belong to it."""
    return "".join(part if part in "\n\t" else clean(part) for part in re.split("([\n\t])", line))


def _counted(gpus: list[str]) -> str:
    return f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}"


def rerun(
    job: Annotated[str, typer.Argument(metavar="ID", help="A job's or an array's id.", autocompletion=all_ids)],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the new id.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Submit a job again as it was: the same specification, and the same image by its digest."""
    server = client()
    answer = server.rerun(job)
    new = answer["jobs"][0]["id"]
    if json:
        emit_json(answer)
    elif quiet:
        emit(f"{new}\n")
    else:
        emit(f"job {new} submitted, as job {clean(job)} was\n")
    send_contexts(server, answer, of=job)
    return OK
