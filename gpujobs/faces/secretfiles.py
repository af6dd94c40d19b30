"""Reading the secrets that a job file names, as whoever submits it, for the server to hand on."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpujobs.core.secrets import VALUE_MAX, Secret, sources, too_large
from gpujobs.core.values import Context


@dataclass(frozen=True, slots=True)
class Found:
    """What came of looking for one secret: its value, or why there is none."""

    value: bytes = b""
    problem: str = ""


AS_SOMEBODY_ELSE = "secrets are read by whoever submits: with --run-as there are none; its user can submit the file"


def secrets_of(text: str, context: Context, *, own: bool = True) -> dict[str, Found]:
    """The secrets that a job file names, by their names there.

    Never raises: what is wrong with the file's text, or with a secret, is for the server to say in its place.

    Args:
        text: The job file.
        context: Its directory, the home directory, and the variables of whoever submits it.
        own: The job is to be theirs. What root can read is not for a job of somebody else's, who may have written
            the file.
    """
    if "secrets" not in text:
        return {}  # reading YAML takes longer than all else that a submission needs
    from gpujobs.yamltree import TextError, read

    try:
        tree = read(text).value
    except TextError:
        return {}
    named = tree.get("secrets") if isinstance(tree, Mapping) else None
    wanted = sources(named, context)
    if not own:
        return {secret.name: Found(problem=AS_SOMEBODY_ELSE) for secret in wanted}
    found = {secret.name: _looked_for(secret, context.variables) for secret in wanted}
    if problem := too_large(len(item.value) for item in found.values()):
        return dict.fromkeys(found, Found(problem=problem))
    return found


def as_sent(found: Mapping[str, Found], *, values: bool) -> dict[str, dict[str, str]]:
    """What was found as the API takes it; without the values for what only asks whether a job could run."""
    return {
        name: {"problem": item.problem} if item.problem
        else {"value": base64.b64encode(item.value).decode()} if values else {}
        for name, item in found.items()
    }  # fmt: skip


def _looked_for(secret: Secret, variables: Mapping[str, str]) -> Found:
    if secret.file:
        found = _file(Path(secret.file))
    elif secret.environment in variables:
        found = Found(os.fsencode(variables[secret.environment]))
    else:
        return Found(problem=f"the variable {secret.environment} is not set in your environment")
    where = secret.file or f"the variable {secret.environment}"
    if found.problem:
        return Found(problem=f"{where}: {found.problem}")
    if not found.value:
        return Found(problem=f"{where} is empty")
    if len(found.value) > VALUE_MAX:
        return Found(problem=f"{where}: {too_large([len(found.value)])}")
    if secret.variable and b"\0" in found.value:
        return Found(problem=f"{where} holds a NUL byte, which no variable can; leave variable: out and use the file")
    return found


def _file(path: Path) -> Found:
    try:
        # A pipe that nobody writes must not hang the command.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return Found(problem="it is not a regular file")
            return Found(file.read(VALUE_MAX + 1))
    except OSError as error:
        return Found(problem=error.strerror or str(error))
