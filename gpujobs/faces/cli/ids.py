"""The completion of ids by the shell, with what the server knows; quiet where that fails."""

from __future__ import annotations

import os
import re

from gpujobs.core.errors import GpujobsError
from gpujobs.faces.client import Client, find_host, id_of

_MOST = 200
_UNSAFE = re.compile(r"[^A-Za-z0-9._ -]")
"""Shells evaluate what completion prints: nothing but these characters gets there."""


def active_ids(incomplete: str) -> list[tuple[str, str]]:
    """Ids of jobs that have not ended."""
    return _ids(incomplete, everything=False)


def all_ids(incomplete: str) -> list[tuple[str, str]]:
    """Ids of all jobs, the newest first."""
    return _ids(incomplete, everything=True)


def _ids(incomplete: str, *, everything: bool) -> list[tuple[str, str]]:
    try:
        rows = Client(find_host(os.environ), answer=2.0).jobs(everything=everything, limit=_MOST)
    except GpujobsError:
        return []
    found = {id_of(row): f"{row.get('state')} {row.get('name')}" for row in reversed(rows)}
    for array in {name.partition("_")[0] for name in found if "_" in name}:
        found.setdefault(array, "array")
    return [
        (name, _UNSAFE.sub("", text))
        for name, text in found.items()
        if name.startswith(incomplete) and re.fullmatch(r"[0-9]+(_[0-9]+)?", name)
    ]
