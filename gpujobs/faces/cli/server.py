"""The commands ``serve`` and ``completion``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gpujobs.core.errors import OK, InvalidInput
from gpujobs.faces.cli.common import emit, hooks_of

PROGRAM = "gpujobs"
COMPLETE_VARIABLE = "_GPUJOBS_COMPLETE"

SERVE_EXAMPLES = """\b
Examples:
  gpujobs serve
  gpujobs serve --config /etc/gpujobs/server.yaml
  gpujobs serve --check-state        is the ledger whole, and which schema has it?
  GPUJOBS_HOST=unix:///tmp/try.sock gpujobs serve --simulate configs/simulated/dgx-a100.yaml"""

COMPLETION_EXAMPLES = """\b
Examples:
  gpujobs completion bash > ~/.local/share/bash-completion/completions/gpujobs
  gpujobs completion zsh > ~/.zfunc/_gpujobs
  gpujobs completion fish > ~/.config/fish/completions/gpujobs.fish"""


def serve(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="The settings.")] = None,
    simulate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A simulated machine in place of this one's GPUs.")
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(metavar="N", help="With --simulate: no containers, and time passes N times as fast."),
    ] = None,
    look: Annotated[
        bool, typer.Option("--check-state", help="Only look at its ledger: whole or damaged, the schema, the jobs.")
    ] = False,
) -> int:
    """Be the server: take jobs, decide, run them. It says `listening on unix://…` when it is ready.

    SIGHUP makes it read its settings again. With --check-state nothing is started or changed, whether or not a server
    runs; exit code 3 where the ledger is damaged or of a newer gpujobs.
    """
    if look:
        if config is not None or simulate is not None or speed is not None:
            raise InvalidInput("--check-state goes alone: it starts no server")
        examine = hooks_of(context).check_state
        assert examine is not None
        emit(examine())
        return OK
    if speed is not None and simulate is None:
        raise InvalidInput("--speed goes with --simulate only")
    if speed is not None and not 0 < speed < float("inf"):
        raise InvalidInput("--speed must be above 0")
    return hooks_of(context).serve(config, simulate, speed)


class Shell(StrEnum):
    """The shells that there is completion for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="Which shell.")]) -> int:
    """Print the script that lets a shell complete commands, options and the ids of jobs."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    script = get_completion_script(prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE, shell=shell.value)
    if shell is Shell.ZSH:
        # From fpath the file runs at the first Tab, as the function that has to answer it.
        bound = f"compdef _{PROGRAM}_completion {PROGRAM}"
        script = script.replace(bound, _ZSH_BOUND.format(program=PROGRAM, bound=bound))
    emit(script + "\n")
    return OK


_ZSH_BOUND = """\
if [ "$funcstack[1]" = "_{program}" ]; then
  _{program}_completion "$@"
else
  {bound}
fi"""
