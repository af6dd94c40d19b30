"""The messages of the HTTP API as plain values; the standard library only, for clients start fast.

All paths are below ``/v1``. Errors are ``{code, exit, message, hint, problems}``, each problem
``{file, line, column, path, message}``.

    GET  /v1/server                     who answers
    POST /v1/jobs                       Submission -> {"jobs": [{"id", "elements"}], "contexts", "notes"}
    PUT  /v1/jobs/ID/context/KEY        the tar file of one of the "contexts": [{"id", "key", "context", "dockerfile"}]
    POST /v1/plan                       Submission -> the plan of its first job, with "jobs" and "others"
    GET  /v1/jobs?all=0|1&limit=N       {"jobs": [row]}, and {"others": {state: count}} where they are only counted
    GET  /v1/jobs/ID                    {"jobs": [row + spec, container, attempts]}
    GET  /v1/jobs/ID/watch              rows as JSON lines, one at each change, until all have ended
    GET  /v1/jobs/ID/logs?follow=&tail=&since=&attempt=   frames of gpujobs.logwire
    POST /v1/jobs/ID/cancel             {"jobs": [row]}
    POST /v1/jobs/ID/rerun              like a submission
    GET  /v1/gpus                       the inventory and who has what
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from gpujobs.core.errors import BY_CODE, GpujobsError, Problem

API = 1
"""The API's version: part of every path. A client of an older version goes on working."""

MAX_REQUEST_BYTES = 8 * 2**20

LOG_MEDIA_TYPE = "application/vnd.gpujobs.log"
LINES_MEDIA_TYPE = "application/x-ndjson"


def rfc3339(seconds: float | None) -> str | None:
    """A time as the contract writes it: UTC, RFC 3339, microseconds."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def from_rfc3339(text: str) -> float:
    """Seconds since the epoch of such a time.

    Raises:
        ValueError: It is no such time.
    """
    return datetime.fromisoformat(text).timestamp()


_VARIABLE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)|([A-Za-z_][A-Za-z0-9_]*))")


def variables_in(text: str) -> frozenset[str]:
    """The names that a job file's text may ask for as ``${NAME}`` or ``$NAME``; ``$$`` is a dollar sign.

    A superset of what the parser will use is harmless: the client sends those that it has.
    """
    return frozenset(name for pair in _VARIABLE.findall(text) for name in pair if name)


def error_body(error: GpujobsError) -> dict[str, Any]:
    """An error as the API answers it."""
    return {
        "code": error.code,
        "exit": error.exit,
        "message": error.message,
        "hint": error.hint,
        "problems": [
            {"file": p.file, "line": p.line, "column": p.column, "path": p.path, "message": p.message}
            for p in error.problems
        ],
    }


def error_of(body: dict[str, Any]) -> GpujobsError:
    """The error that an answer tells of."""
    kind = BY_CODE.get(str(body.get("code")), GpujobsError)
    problems = tuple(
        Problem(str(p["file"]), int(p["line"]), int(p["column"]), str(p["path"]), str(p["message"]))
        for p in body.get("problems", [])
    )
    return kind(str(body.get("message", "the server answered in an unknown way")), hint=str(body.get("hint", "")),
                problems=problems)  # fmt: skip
