"""The command ``logs``."""

from __future__ import annotations

import os
import pwd
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from gpujobs.core.errors import OK, InvalidInput
from gpujobs.faces import render
from gpujobs.faces.cli.common import client, tell
from gpujobs.faces.cli.follow import Follower, Look, Printer
from gpujobs.faces.cli.ids import all_ids
from gpujobs.faces.client import has_ended, id_of
from gpujobs.faces.words import clean

EXAMPLES = """\b
Examples:
  gpujobs logs 12
  gpujobs logs -f --tail 100 12
  gpujobs logs --since 10m --timestamps 12_3
  gpujobs logs --grep 'loss=nan' 13 2> /dev/null"""

_AGO = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)


def logs(
    job: Annotated[str, typer.Argument(metavar="ID", help="A job's id.", autocompletion=all_ids)],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it has ended.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, metavar="N", help="Only the last N lines.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only from then on: 10m, 1h30m, or 2024-05-01T12:00.")
    ] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", "-t", help="The time (UTC) before each line.")] = False,
    grep: Annotated[
        str | None,
        typer.Option(metavar="RE", help="Of the lines that --tail and --since leave, those in which this is found."),
    ] = None,
    attempt: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of this attempt; the last by default.")
    ] = None,
) -> int:
    """Show what a job has written, its standard output and error on the same streams, byte for byte.

    Of an array everything is shown, with the element's id before each line. On a terminal, control characters in
    these and in the output of somebody else's job are shown, not obeyed.
    """
    server = client()
    look = Look(timestamps=timestamps, grep=_pattern(grep))
    start = None if since is None else _moment(since, datetime.now(UTC))
    rows = server.job(job)
    printer = Printer(
        look, prefixed=len(rows) > 1 or (bool(rows) and id_of(rows[0]) != job),
        others=any(row.get("owner") != _me() for row in rows),
    )  # fmt: skip
    ran = [row for row in rows if int(row.get("attempt") or 0) > 0]
    if follow and not all(has_ended(row) for row in rows):
        Follower(server, printer, tail=tail, since=start, attempt=attempt).follow([job])
        return OK
    wrote = False
    for row in ran:
        name = id_of(row)
        for batch in server.log_batches(name, tail=tail, since=start, attempt=attempt):
            wrote = True
            printer.records(name, batch)
        printer.end(name)
    printer.flush()
    if rows and not wrote and (not ran or rows[0].get("started_at") is None):
        tell(f"job {clean(job)} has no output: {render.state_line(rows[0])}")
    return OK


def _me() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return ""


def _pattern(text: str | None) -> re.Pattern[bytes] | None:
    if text is None:
        return None
    try:
        return re.compile(text.encode(errors="surrogateescape"))
    except re.error as error:
        raise InvalidInput(f"--grep: {text!r} is no regular expression: {error}") from error


def _moment(text: str, now: datetime) -> float:
    """A time, or how long ago it was, in seconds since the epoch."""
    ago = _AGO.fullmatch(text)
    try:
        if ago is not None and any(ago.groups()):
            days, hours, minutes, seconds = (int(part or 0) for part in ago.groups())
            moment = now - timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        else:
            moment = datetime.fromisoformat(text)
        return moment.timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidInput(
            f"--since: {text!r} is no time", hint="Such as 10m, 1h30m, 2024-05-01 or 2024-05-01T12:00:00Z."
        ) from error
