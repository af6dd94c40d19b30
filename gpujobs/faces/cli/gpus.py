"""The command ``gpus``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from gpujobs.core.errors import OK, InvalidInput, Unavailable
from gpujobs.faces.cli.common import client, emit, emit_grid, emit_json, terminal_width
from gpujobs.faces.client import Client
from gpujobs.faces.words import clean

EXAMPLES = """\b
Examples:
  gpujobs gpus
  gpujobs gpus --watch
  gpujobs gpus --topology
  gpujobs gpus --json | jq '.gpus[] | select(.allocations == []) | .uuid'"""


def gpus(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing; Ctrl-C ends it.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="How often, with --watch.")] = 2.0,
    topology: Annotated[bool, typer.Option("--topology", help="How the GPUs are linked, as a matrix.")] = False,
) -> int:
    """Show the GPUs: who has what, how busy they are, and whether they are well."""
    if json + watch + topology > 1:
        raise InvalidInput("only one of --json, --watch and --topology can be given")
    from gpujobs.faces import gpuview

    server = client()
    if watch:
        return _watch(server, interval)
    answer = server.gpus()
    if json:
        emit_json(answer)
    elif topology:
        grid, legend = gpuview.topology(answer)
        emit_grid(grid, gpuview.header(answer) + "\n\n")
        emit("\n" + legend)
    else:
        emit_grid(gpuview.glance(answer, terminal_width()), gpuview.header(answer) + "\n")
    return OK


def _watch(server: Client, interval: float) -> int:
    """Show them again and again: over the whole terminal, or one after another in a pipe."""
    from gpujobs.faces import gpuview

    answer = server.gpus()
    if terminal_width() is None:
        while True:
            emit(f"{gpuview.header(answer)}\n{gpuview.glance(answer, None).plain()}\n")
            time.sleep(interval)
            answer = server.gpus()
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    def screen(shown: dict[str, Any], note: str) -> Group:
        width = terminal_width() or gpuview.NARROW
        head = Text(f"{gpuview.header(shown)} · {time.strftime('%H:%M:%S')}", style="bold")
        return Group(head, Text(note, style="red"), gpuview.glance(shown, width).rich(width))

    with Live(screen(answer, ""), screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            time.sleep(interval)
            note = ""
            try:
                answer = server.gpus()
            except Unavailable as error:
                # A monitor outlives a restart of what it looks at; what it still shows is old: it says so.
                note = f"{clean(error.message)}; shown is the last answer"
            live.update(screen(answer, note), refresh=True)
