"""What all commands share: where words and bytes go, how errors are told, which server is meant."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer

from gpujobs import places
from gpujobs.core.errors import GpujobsError
from gpujobs.faces.client import Client, Host, find_host
from gpujobs.faces.grid import Grid
from gpujobs.faces.transport import NoServer
from gpujobs.faces.words import clean

if TYPE_CHECKING:
    from gpujobs.core.finding import Report

SIGPIPE_EXIT = 141
"""What a shell reports of a program whose reader went away: 128 + SIGPIPE."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the command line cannot do itself, since it only talks to servers.

    Attributes:
        serve: Be the server: (settings file, simulated machine, speed) to the exit code.
        ensure_server: Start one for this account where the rules allow it; what to say of it, or None.
        doctor: Look at the machine; None where the caller gave none.
        check_state: Look at the server's ledger; what was found, for a person.
        back_up: Copy that ledger into a file; what was done, for a person.
        setup: Make the system installation (or, where ``uninstall``, remove it; ``purge``: with its data; ``dry_run``:
            only say so), telling each step.
    """

    serve: Callable[[Path | None, Path | None, float | None], int]
    ensure_server: Callable[[Host], str | None]
    doctor: Callable[[], Report] | None = None
    check_state: Callable[[], str] | None = None
    back_up: Callable[[Path], str] | None = None
    setup: Setup | None = None


class Setup(Protocol):
    """Makes or removes the system installation."""

    def __call__(self, say: Callable[[str], None], *, uninstall: bool, purge: bool, dry_run: bool) -> None:
        """Do it, or only say what would be done."""


def hooks_of(context: typer.Context) -> Hooks:
    """The hooks that :func:`gpujobs.faces.cli.main` was given."""
    hooks = context.find_root().obj
    assert isinstance(hooks, Hooks)
    return hooks


def client() -> Client:
    """A client of the server that the environment means."""
    return Client(find_host(os.environ), tell=tell)


def ready_client(context: typer.Context) -> Client:
    """As :func:`client`; where no server answers, one is started if that is this account's to do."""
    found = client()
    try:
        found.require()
    except NoServer:
        sentence = hooks_of(context).ensure_server(found.host)
        if sentence:
            tell(sentence)
    return found


def tell(sentence: str) -> None:
    """Our own words, on standard error."""
    emit_error(f"gpujobs: {sentence}\n")


def open_standard_streams() -> None:
    """Let those that the command was started without lead nowhere: else the next file or socket took their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free number is the closed one's: they are gone through in order.
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - open as long as the process runs


def emit(text: str) -> None:
    """Text on standard output.

    Raises:
        typer.Exit: Its reader went away.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise output_closed() from error


def emit_error(text: str) -> None:
    """Text on standard error; where nobody reads that, it is lost."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        _discard(sys.stderr.fileno())


def output_closed() -> typer.Exit:
    """The end of a command whose reader went away: quiet, and nothing is left to be written at exit."""
    _discard(sys.stdout.fileno())
    return typer.Exit(SIGPIPE_EXIT)


def _discard(descriptor: int) -> None:
    """Let whatever is still buffered for a closed pipe go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def emit_json(value: object) -> None:
    """A JSON document on standard output; ASCII only, so that it is harmless in any terminal."""
    emit(json.dumps(value, indent=2) + "\n")


def emit_grid(grid: Grid, before: str = "") -> None:
    """A table on standard output: coloured and folded on a terminal, plain columns elsewhere."""
    width = terminal_width()
    if width is None:
        emit(before + grid.plain())
        return
    from rich.console import Console

    emit(before)
    Console(highlight=False, markup=False, emoji=False, width=width).print(grid.rich(width), end="")


def terminal_width() -> int | None:
    """The columns of the terminal that standard output is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def report(error: GpujobsError) -> int:
    """Tell an error and return its exit code: the sentence, each problem on a line of its own, the hint."""
    lines = [clean(line) for line in f"gpujobs: {error.message}".splitlines()]
    lines += [clean(problem) for problem in error.problems]
    if error.hint:
        lines.append(f"hint: {clean(error.hint)}")
    emit_error("\n".join(lines) + "\n")
    return error.exit


def report_bug(error: BaseException) -> int:
    """Tell of an error that nobody foresaw: one sentence, and the file that has the details."""
    text = "".join(traceback.format_exception(error))
    where = _keep(text)
    emit_error(
        f"gpujobs: this should not have happened: {clean(type(error).__name__)}: {clean(error)[:300]}\n"
        f"hint: The details are in {where}; please report them.\n"
    )
    return GpujobsError.exit


def _keep(text: str) -> str:
    """Write a report into the account's cache, and return its name."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    directory = (Path(base) if base.startswith("/") else places.home(os.environ) / ".cache") / "gpujobs"
    name = f"error-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.txt"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        return f"no file ({error.strerror} in {clean(directory)})"
    return clean(directory / name)
