"""The commands about jobs: ``run submit ps show wait cancel``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from gpujobs.core.errors import OK, GpujobsError, Interrupted
from gpujobs.faces import render
from gpujobs.faces.cli.common import (
    client,
    emit,
    emit_grid,
    emit_json,
    ready_client,
    report,
    tell,
    terminal_width,
)
from gpujobs.faces.cli.follow import Follower, Printer, in_order
from gpujobs.faces.cli.ids import active_ids, all_ids
from gpujobs.faces.cli.pulls import send_contexts
from gpujobs.faces.client import Row, exit_code_of, id_of
from gpujobs.faces.words import clean, end_sentence

Files = Annotated[list[str], typer.Argument(metavar="FILE…", help="Job files; - is the standard input.")]
RunAs = Annotated[
    str | None,
    typer.Option("--run-as", metavar="USER", help="The account to run as. For root and administrators."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RUN_EXAMPLES = """\b
Examples:
  gpujobs run train.yaml
  gpujobs run - < train.yaml
  sudo gpujobs run --run-as alice train.yaml"""

SUBMIT_EXAMPLES = """\b
Examples:
  gpujobs submit train.yaml
  id=$(gpujobs submit --quiet train.yaml) && gpujobs wait $id
  gpujobs submit prepare.yaml train.yaml --json"""

PS_EXAMPLES = """\b
Examples:
  gpujobs ps
  gpujobs ps --all --limit 20
  gpujobs ps --json | jq '.jobs[] | select(.state == "queued") | .message'"""

SHOW_EXAMPLES = """\b
Examples:
  gpujobs show 12
  gpujobs show 12_3 --json"""

WAIT_EXAMPLES = """\b
Examples:
  gpujobs wait 12 && echo done
  gpujobs wait 12 13_0 --json"""

CANCEL_EXAMPLES = """\b
Examples:
  gpujobs cancel 12
  gpujobs cancel 13_0 13_1"""


def run(context: typer.Context, files: Files, run_as: RunAs = None) -> int:
    """Submit jobs and follow them to their ends.

    Their output is passed on as it is; gpujobs' own words are on standard error. The exit code is the job's.
    Ctrl-C ends only this command: the job goes on.
    """
    server = ready_client(context)
    answer = server.submit(files, run_as=run_as)
    jobs = _submitted(answer)
    send_contexts(server, answer)
    try:
        _tell_notes(answer)
        rows = Follower(server, Printer(prefixed=len(jobs) > 1), progress=True).follow(jobs)
    except KeyboardInterrupt:
        raise _left(jobs) from None
    return _told_ends(rows)


def _left(jobs: list[str]) -> Interrupted:
    verb, them = ("jobs {} go", "them") if len(jobs) > 1 else ("job {} goes", "it")
    return Interrupted(
        f"{verb.format(', '.join(jobs))} on without this command",
        hint=f"`gpujobs logs -f {jobs[0]}` follows it again, `gpujobs cancel {' '.join(jobs)}` ends {them}.",
    )


def _submitted(answer: dict[str, Any]) -> list[str]:
    """The ids that a submission was given, one for each file: an array's once."""
    numbers = [id_of(job).partition("_")[0] for job in answer.get("jobs") or []]
    if not numbers:
        raise GpujobsError("the server took the submission and gave it no id")
    return list(dict.fromkeys(numbers))


def _tell_notes(answer: dict[str, Any]) -> None:
    """What the server wants to be known about every job that it takes."""
    for note in answer.get("notes") or []:
        tell(clean(note))


def _told_ends(rows: list[Row]) -> int:
    """Say how each job ended, and return the first exit code that is not 0."""
    for row in rows:
        tell(end_sentence(row, clean(id_of(row))))
    return next((code for row in rows if (code := exit_code_of(row)) != OK), OK)


def submit(
    context: typer.Context,
    files: Files,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the id of each job.")] = False,
    json: Json = False,
    run_as: RunAs = None,
) -> int:
    """Submit jobs and return once they are safely recorded: all of them or, with a mistake in one, none."""
    server = ready_client(context)
    answer = server.submit(files, run_as=run_as)
    jobs = _submitted(answer)
    if json:
        emit_json(answer)
    elif quiet:
        emit("".join(f"{job}\n" for job in jobs))
    else:
        said = answer.get("message") or f"job{'s' * (len(jobs) > 1)} {', '.join(jobs)} submitted"
        _tell_notes(answer)
        emit(f"{clean(said)}\n")
    send_contexts(server, answer)
    return OK


def ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also the jobs that have ended.")] = False,
    json: Json = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="At most so many, the newest.")] = None,
) -> int:
    """List jobs: what runs where, what waits and why."""
    answer = client().listing(everything=everything, limit=limit)
    rows, others = list(answer.get("jobs") or []), answer.get("others")
    if json:
        emit_json({"jobs": rows, **({} if others is None else {"others": others})})
    else:
        emit_grid(render.ps(rows, time.time(), terminal_width()))
        if others:
            tell("jobs of others: " + ", ".join(f"{clean(count)} {clean(state)}" for state, count in others.items()))
    return OK


def show(
    job: Annotated[str, typer.Argument(metavar="ID", help="A job's id.", autocompletion=all_ids)],
    json: Json = False,
) -> int:
    """Show one job in full: GPUs, container, attempts, mounts, and why it waits or how it ended."""
    rows = client().job(job)
    if json:
        emit_json(rows[0] if len(rows) == 1 else {"jobs": rows})
    elif len(rows) == 1:
        emit(render.show(rows[0], time.time()))
    else:
        before, grid = render.summary(rows, time.time(), terminal_width())
        emit_grid(grid, before)
    return OK


def wait(
    jobs: Annotated[
        list[str], typer.Argument(metavar="ID…", help="Jobs' ids; an array's stands for all of it.",
                                  autocompletion=active_ids)
    ],
    json: Json = False,
) -> int:  # fmt: skip
    """Wait until jobs have ended. The exit code is the first one that is not 0, in the order of the ids."""
    server = client()
    last: dict[str, Row] = {}
    for job in jobs:
        for row in server.watch(job):
            last[id_of(row)] = row
    rows = in_order(last, jobs)
    code = _told_ends(rows)
    if json:
        emit_json({"jobs": rows})
    return code


def cancel(
    jobs: Annotated[
        list[str], typer.Argument(metavar="ID…", help="Jobs' ids; an array's stands for all of it.",
                                  autocompletion=active_ids)
    ],
) -> int:  # fmt: skip
    """Cancel jobs: those that wait never start, those that run are stopped. Returns once it is recorded."""
    server = client()
    code = OK
    for job in jobs:
        try:
            rows = server.cancel(job)
        except GpujobsError as error:
            code = code or report(error)
            continue
        emit("".join(f"job {clean(id_of(row))} {clean(row.get('state'))}\n" for row in rows))
    return code
