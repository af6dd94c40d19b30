"""Builds: how they are written in the job file, and the JSON Schema."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

from gpujobs.core import forms
from gpujobs.core.values import Context, Json, mapping, shown, templated, text, typed, wrong

CONTEXT_SCHEMA = templated(
    {"type": "string", "pattern": r"\S", "not": {"pattern": r"://|^git@|^~[^/]|[\x00-\x1f\x7f-\x9f]"}},
    allowed="a directory of this machine, such as .",
)


def build_context(value: object, context: Context) -> str:
    """The directory to build from, absolute, on the client's machine."""
    words = text(value, "a build context", "a directory, such as .")
    if "://" in words or words.startswith("git@"):
        raise wrong(f"{shown(words)} is an address; write a directory of this machine, such as .")
    return forms.host_path(words, context)


def dockerfile(value: object) -> str:
    """The Dockerfile's path, within the build context."""
    words = posixpath.normpath(text(value, "a Dockerfile's path", "a path in the context, such as Dockerfile.cuda"))
    if words.startswith(("/", "..")):
        raise wrong(f"{shown(words)} is outside the build context; write a path inside it, such as Dockerfile.cuda")
    return words


def build_args(value: object, context: Context) -> tuple[tuple[str, str], ...]:
    """Arguments of the build, written as an environment is."""
    return forms.environment(value, context)


def stage(value: object) -> str:
    """The stage to build."""
    return text(value, "a stage", "the name of a stage in the Dockerfile", limit=128)


def build_forms(value: object, context: Context) -> Mapping[str, object]:
    """A build as a mapping of the fields, from a directory or a mapping."""
    del context
    if isinstance(typed(value), str):
        return {"context": value}
    return mapping(value, "a build", "a directory, or a mapping such as {context: ., dockerfile: Dockerfile.cuda}")


def build_schema(inner: Json) -> Json:
    """JSON Schema of a build: a directory, or the mapping."""
    return {"anyOf": [CONTEXT_SCHEMA, inner]}
