"""What happens before a job's program runs: sending build contexts, and how far the pull of an image is."""

from __future__ import annotations

import os
import pwd
import re
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpujobs.core.errors import GpujobsError, Refused
from gpujobs.faces.cli.common import tell
from gpujobs.faces.client import Client, Row
from gpujobs.faces.words import clean, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PERCENT = re.compile(r"(\d+) %$")

PLAIN_SECONDS = 2.0
"""Between two lines about the same thing where they are not drawn over each other."""


def send_contexts(server: Client, answer: Mapping[str, Any], *, of: str | None = None) -> None:
    """Send the build contexts that a submission's answer asks for; where that fails, its jobs are cancelled.

    Args:
        server: Who asks.
        answer: The answer to the submission.
        of: A job that was submitted again, maybe by somebody else: what is packed then is named by its owner's job
            file, so only the owner's account packs it.

    Raises:
        GpujobsError: A directory could not be packed or sent.
    """
    contexts = answer.get("contexts") or []
    if not contexts:
        return
    try:
        if of is not None:
            _require_own(server, of)
        for entry in contexts:
            _send(server, entry)
    except BaseException:
        for job in answer.get("jobs") or []:
            try:
                server.cancel(str(job["id"]))
            except GpujobsError as error:
                tell(f"job {clean(job['id'])} could not be cancelled: {clean(error.message)}")
            else:
                tell(f"job {clean(job['id'])} was cancelled: its build context was not sent")
        raise


def _require_own(server: Client, job: str) -> None:
    owner = server.job(job)[0].get("owner")
    try:
        me = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        me = ""
    if owner != me:
        raise Refused(
            f"job {clean(job)} was not built yet, and its build context is {clean(owner)}'s to send",
            hint="They can submit it again themselves.",
        )


def _send(server: Client, entry: Mapping[str, Any]) -> None:
    told = 0.0

    def tell_progress(packed: int, whole: int) -> None:
        nonlocal told
        now = time.monotonic()
        if not told:
            tell(f"job {clean(entry['id'])}: sending its build context {clean(entry['context'])} ({size(whole)})")
        elif now < told + PLAIN_SECONDS or packed == whole:
            return
        else:
            tell(f"job {clean(entry['id'])}: {size(packed)} of {size(whole)} sent")
        told = now

    server.send_context(entry, tell_progress)


class PullView:
    """Shows pulls on standard error: a bar for each layer on a terminal, elsewhere a line now and then."""

    def __init__(self) -> None:
        self._live: Progress | None = None
        self._bars: dict[tuple[str, str], TaskID] = {}
        self._next: dict[str, float] = {}

    def show(self, job: str, row: Row) -> bool:
        """Show how far a job's image is; returns whether the row is about that alone."""
        layers = row.get("progress") or []
        if row.get("state") != "pulling" or not row.get("message"):
            return False
        if layers and sys.stderr.isatty():
            self._draw(job, str(row["message"]), layers)
            return True
        now = time.monotonic()
        if now < self._next.get(job, 0.0):
            return True
        if str(row["message"]).startswith("building"):
            return True  # its output says more
        self._next[job] = now + PLAIN_SECONDS
        self.pause()
        tell(f"job {clean(job)} {clean(row['message'])}")
        return True

    def _draw(self, job: str, message: str, layers: list[Mapping[str, Any]]) -> None:
        live = self._started()
        whole = _PERCENT.search(message)
        wanted = [((job, ""), clean(f"job {job} {message}"), int(whole[1]) if whole else 0, 100)]
        wanted += [
            ((job, str(layer["layer"])), f"  {clean(layer['layer'])} {clean(layer['status'])}", layer["current"],
             layer["total"])
            for layer in layers
        ]  # fmt: skip
        for key, words, current, total in wanted:
            done = words.endswith(("Pull complete", "Already exists"))
            most = total or 1  # small layers have no size
            at = most if done else min(current or 0, most)
            if key not in self._bars:
                self._bars[key] = live.add_task(words, total=most, completed=at)
            else:
                live.update(self._bars[key], description=words, total=most, completed=at)

    def _started(self) -> Progress:
        if self._live is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            console = Console(stderr=True, highlight=False, markup=False, emoji=False)
            columns = (
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %", markup=False),
            )
            self._live = Progress(*columns, console=console, transient=True, redirect_stdout=False,
                                  redirect_stderr=False)  # fmt: skip
            self._live.start()
        return self._live

    def pause(self) -> None:
        """Take the bars away: something else is written now."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._bars.clear()
