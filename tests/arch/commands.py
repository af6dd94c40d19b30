"""docs/commands.md, made from the commands themselves: ``python -m tests.arch.commands`` writes it anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from gpujobs.faces.cli import app

PATH = Path(__file__).parents[2] / "docs" / "commands.md"

INTRO = """\
# Commands

Every command, as `gpujobs COMMAND --help` tells it; `python -m tests.arch.commands` writes this page from the same
source. What a server does with the files that it keeps is in [operations.md](operations.md).

**Where they look for a server**: `GPUJOBS_HOST` (`unix:///path/of/the.sock`), else the system's socket
`/run/gpujobs/gpujobs.sock`, else your own. `run` and `submit` start one of your own where no server is installed on
the machine and you may use Docker, and say so.

**Streams**: a job's own output is passed on as it is, its standard error on standard error; all that gpujobs itself
has to say goes to standard error. Tables fold to the width of a terminal and are plain columns in a pipe.

**Exit codes**: 0 well; 1 the job failed and has no code of its own (`run` and `wait` otherwise end with the job's
code, of several jobs with the first that is not 0); 2 bad input or an unknown id, nothing was done; 3 refused; 4 the
server or the Docker Engine does not answer; 130 interrupted, and jobs go on.

**Ids**: `12` is a job or a whole array, `12_3` the element 3 of the array 12.
"""


def commands() -> dict[str, Any]:
    """The commands that are shown, by name, in the order in which help lists them."""
    group: Any = typer.main.get_command(app)
    return {name: command for name, command in group.commands.items() if not command.hidden}


def page() -> str:
    """The page as it should be."""
    return "\n".join([INTRO, *(_entry(name, command) for name, command in commands().items())])


def _entry(name: str, command: Any) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    usage = " ".join(
        [f"gpujobs {name}", *(["[OPTIONS]"] if options else []), *(_argument(param) for param in arguments)]
    )
    paragraphs = [" ".join(part.split()) for part in str(command.help).split("\n\n")]
    lines = [f"## {name}", "", f"`{usage}`", "", "\n\n".join(paragraphs), ""]
    told = [(_argument(param), param.help) for param in arguments] + [
        (_option(param), _said(param)) for param in options
    ]
    if told:
        lines += [
            "| | |",
            "| --- | --- |",
            *(f"| `{what.replace('|', chr(92) + '|')}` | {words} |" for what, words in told),
            "",
        ]
    examples = [line.removeprefix("  ") for line in str(command.epilog or "").splitlines() if line.startswith("  ")]
    if examples:
        lines += ["```", *examples, "```", ""]
    return "\n".join(lines)


def _argument(param: Any) -> str:
    choices = getattr(param.type, "choices", None)
    return "|".join(map(str, choices)) if choices else str(param.metavar or param.human_readable_name.upper())


def _option(param: Any) -> str:
    names = ", ".join(param.opts)
    if param.is_flag:
        return names
    choices = getattr(param.type, "choices", None)
    return f"{names} {'|'.join(map(str, choices)) if choices else param.metavar}"


def _said(param: Any) -> str:
    default = param.default
    return str(param.help) + (f" ({default:g} by default.)" if isinstance(default, float) else "")


if __name__ == "__main__":
    PATH.write_text(page())
