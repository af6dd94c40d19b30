"""The command line: a client, but for the commands that need no server. One module for each topic."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpujobs import __version__
from gpujobs.core.errors import OK, GpujobsError, Interrupted, InvalidInput
from gpujobs.faces.cli import doctor as checkup
from gpujobs.faces.cli import files, gpus, jobs, logs, plans, server, upkeep
from gpujobs.faces.cli.common import (
    Hooks,
    Setup,
    emit,
    emit_error,
    open_standard_streams,
    output_closed,
    report,
    report_bug,
)
from gpujobs.faces.client import Host
from gpujobs.faces.words import clean

if TYPE_CHECKING:
    from gpujobs.core.finding import Report

ABOUT = "One YAML file, one command, the right GPUs, in a container, on a server that many people share."

EXAMPLES = """\b
Examples:
  gpujobs run train.yaml         submit a job and follow it
  gpujobs ps                     what runs, what waits and why
  gpujobs gpus                   who has which GPU
  gpujobs logs -f 12             follow a job's output"""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _name, _command, _examples in (
    ("run", jobs.run, jobs.RUN_EXAMPLES),
    ("submit", jobs.submit, jobs.SUBMIT_EXAMPLES),
    ("ps", jobs.ps, jobs.PS_EXAMPLES),
    ("show", jobs.show, jobs.SHOW_EXAMPLES),
    ("logs", logs.logs, logs.EXAMPLES),
    ("wait", jobs.wait, jobs.WAIT_EXAMPLES),
    ("cancel", jobs.cancel, jobs.CANCEL_EXAMPLES),
    ("plan", plans.plan, plans.PLAN_EXAMPLES),
    ("rerun", plans.rerun, plans.RERUN_EXAMPLES),
    ("gpus", gpus.gpus, gpus.EXAMPLES),
    ("check", files.check, files.CHECK_EXAMPLES),
    ("schema", files.schema, files.SCHEMA_EXAMPLES),
    ("from-docker", files.from_docker, files.FROM_DOCKER_EXAMPLES),
    ("doctor", checkup.doctor, checkup.EXAMPLES),
    ("serve", server.serve, server.SERVE_EXAMPLES),
    ("backup", upkeep.backup, upkeep.BACKUP_EXAMPLES),
    ("setup", upkeep.setup, upkeep.SETUP_EXAMPLES),
    ("completion", server.completion, server.COMPLETION_EXAMPLES),
):
    # The options after `docker run` are Docker's.
    _settings = {"allow_interspersed_args": False} if _name == "from-docker" else {}
    app.command(_name, epilog=_examples, context_settings=_settings)(_command)

# What typer raises for a wrong use of a command; it exports only the subclass.
_UsageError: Any = typer.BadParameter.__base__


@app.callback(invoke_without_command=True, help=ABOUT, epilog=EXAMPLES)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> int:
    if version:
        emit(f"gpujobs {__version__}\n")
        raise typer.Exit(OK)
    if context.invoked_subcommand is None:
        emit(context.get_help() + "\n")
    return OK


def main(
    argv: Sequence[str] | None = None,
    *,
    serve: Callable[[Path | None, Path | None, float | None], int],
    ensure_server: Callable[[Host], str | None],
    doctor: Callable[[], Report] | None = None,
    check_state: Callable[[], str] | None = None,
    back_up: Callable[[Path], str] | None = None,
    setup: Setup | None = None,
) -> int:
    """Run one command.

    Args:
        argv: The arguments; those of the process by default.
        serve: Be the server: (settings file, simulated machine, speed) to the exit code.
        ensure_server: Start a server for this account where the rules allow it; what to say of it, or None.
        doctor: Look at the machine, for the command of that name.
        check_state: Look at the server's ledger, for `serve --check-state`.
        back_up: Copy it, for `backup`.
        setup: Make or remove the system installation.

    Returns:
        The exit code. No error leaves this as an exception.
    """
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # A terminal that is not UTF-8 gets escapes for what it cannot show, not a traceback.
            reconfigure(errors="backslashreplace")
    try:
        try:
            hooks = Hooks(serve, ensure_server, doctor, check_state, back_up, setup)
            return _invoke(sys.argv[1:] if argv is None else list(argv), hooks)
        except GpujobsError as error:
            return report(error)
    except KeyboardInterrupt:  # also the second one, while the first is told of
        return Interrupted.exit
    except BrokenPipeError:
        return output_closed().exit_code
    except Exception as error:  # noqa: BLE001 - the last resort: a person gets a sentence and not a traceback
        return report_bug(error)


def _invoke(argv: list[str], hooks: Hooks) -> int:
    command = typer.main.get_command(app)
    if server.COMPLETE_VARIABLE in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
    try:
        result = command.main(argv, prog_name=server.PROGRAM, standalone_mode=False, obj=hooks)
    except _UsageError as error:
        return _misused(error)
    except typer.Abort:
        return Interrupted.exit
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else InvalidInput.exit
    return int(result or OK)


def _misused(error: Any) -> int:  # noqa: ANN401 - typer does not export the class
    """Tell a wrong use of a command."""
    emit_error(f"gpujobs: {clean(error.format_message())}\n")
    if error.ctx is not None:
        emit_error(f"hint: {clean(error.ctx.get_usage())}; `{error.ctx.command_path} --help` says more\n")
    return InvalidInput.exit
