"""The commands about job files, which need no server: ``check schema from-docker``."""

from __future__ import annotations

import os
import pwd
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpujobs.core.errors import OK, InvalidInput, Refused
from gpujobs.core.job import Owner
from gpujobs.faces.cli.common import emit, emit_json, report, tell
from gpujobs.faces.words import clean

if TYPE_CHECKING:
    from gpujobs.specfile import Element

CHECK_EXAMPLES = """\b
Examples:
  gpujobs check train.yaml
  gpujobs check examples/*/job.yaml
  gpujobs check - --json < train.yaml"""

SCHEMA_EXAMPLES = """\b
Examples:
  gpujobs schema > gpujobs.schema.json
  and in a job file's first line, for editors with the YAML language server:
  # yaml-language-server: $schema=gpujobs.schema.json"""

FROM_DOCKER_EXAMPLES = """\b
Examples:
  gpujobs from-docker docker run --gpus 2 -v $PWD:/workspace pytorch/pytorch python train.py
  gpujobs from-docker 'docker run --rm --gpus all my/image python train.py' > job.yaml"""


def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE…", help="Job files; - is the standard input.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Check job files without a server: every mistake at once, with its place."""
    from gpujobs.faces import jobfiles

    code = OK
    answers = []
    for name in files:
        answer: dict[str, Any] = {"file": jobfiles.shown_name(name), "ok": True, "jobs": 0, "problems": []}
        try:
            answer["jobs"] = len(elements_in(name))
        except InvalidInput as error:
            code = error.exit
            answer |= {"ok": False, "message": error.message, "problems": [
                {"file": p.file, "line": p.line, "column": p.column, "path": p.path, "message": p.message}
                for p in error.problems
            ]}  # fmt: skip
            if not json:
                report(error)
        else:
            if not json:
                count = answer["jobs"]
                emit(f"{clean(answer['file'])}: ok: {count} job{'' if count == 1 else 's'}\n")
        answers.append(answer)
    if json:
        emit_json({"files": answers})
    return code


def elements_in(name: str, uuids: tuple[str, ...] = ()) -> list[Element]:
    """The jobs that a file describes.

    Args:
        name: The file; ``-`` is the standard input.
        uuids: The machine's GPUs by their index, where it is known.

    Raises:
        InvalidInput: With every mistake.
    """
    from gpujobs import specfile
    from gpujobs.faces import jobfiles
    from gpujobs.faces.secretfiles import secrets_of

    data = jobfiles.read_bytes(name)
    directory = Path.cwd() if name == "-" else (Path.cwd() / name).parent
    text = data.decode(errors="replace")
    context = jobfiles.file_context(name, directory, dict(os.environ))
    context = replace(
        context,
        working_directory=str(Path.cwd()),
        env_files=jobfiles.env_files_of(text, directory, os.environ),
        secrets={key: found.problem for key, found in secrets_of(text, context).items()},
        uuids=uuids,
    )
    return specfile.parse(data, context)


def this_account() -> Owner:
    """The account that runs this command."""
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        raise Refused(f"uid {os.getuid()} has no account on this machine") from None
    groups = tuple(sorted({entry.pw_gid, *os.getgrouplist(entry.pw_name, entry.pw_gid)}))
    return Owner(uid=entry.pw_uid, gid=entry.pw_gid, groups=groups, name=entry.pw_name, home=entry.pw_dir)


def schema() -> int:
    """Print the JSON Schema of the job file, for editors and other programs."""
    from gpujobs import specfile

    emit_json(specfile.schema())
    return OK


def from_docker(
    command: Annotated[
        list[str],
        typer.Argument(metavar="docker run …", help="The command's words, or all of it in quotes."),
    ],
) -> int:
    """Print the job file for a `docker run` command, and what it leaves out and why."""
    from gpujobs.core.translate import from_docker as translated

    result = translated(command[0] if len(command) == 1 else command)
    emit(result.text)
    for note in result.notes:
        tell(clean(note))
    return OK
