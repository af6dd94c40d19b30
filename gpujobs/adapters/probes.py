"""Questions to a machine that may be ill: each has a time limit, and what it reads has an end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from gpujobs.core import codec

T = TypeVar("T")

MOST_BYTES = 1 << 20
"""Of any file or output that is read."""


def within(seconds: float, kind: type[T], probe: Callable[[], T]) -> T | None:
    """What a probe answers, asked in a child process; None where it crashes or gives no answer in time.

    A child, since a thread that hangs in the kernel would keep this process from ending, and since a library that
    crashes would take it along.

    Args:
        seconds: After which the child is killed.
        kind: The dataclass that it returns.
        probe: Runs in the child.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child is not traced
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as answer:
                json.dump(codec.encode(probe()), answer)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as source:
        text, ended = _read(source.fileno(), seconds)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _reap(pid)
    if not ended or not text:
        return None
    try:
        return codec.decode(kind, json.loads(text))
    except ValueError:  # it died while it wrote
        return None


def _read(descriptor: int, seconds: float) -> tuple[bytes, bool]:
    """What comes from a descriptor, and whether it came to its end in time and within the limit."""
    end, text = time.monotonic() + seconds, b""
    while len(text) < MOST_BYTES:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return text, False
        part = os.read(descriptor, 65536)
        if not part:
            return text, True
        text += part
    return text, False


def _reap(pid: int, seconds: float = 1.0) -> None:
    """Wait for a child that is ending; one that hangs in the kernel is left to init."""
    end = time.monotonic() + seconds
    while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < end:
        time.sleep(0.005)


def output_of(argv: list[str], environ: Mapping[str, str], seconds: float) -> tuple[str, str]:
    """What a program prints on both streams, and why that is not to be had; one of the two is empty.

    Args:
        argv: The program and its arguments.
        environ: Its environment.
        seconds: After which it and its children are killed.
    """
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(environ),
            start_new_session=True, cwd="/",
        )  # fmt: skip
    except OSError as error:
        return "", f"it does not start: {error.strerror}"
    assert process.stdout is not None
    with process.stdout:
        text, ended = _read(process.stdout.fileno(), seconds)
    # The whole group: a script's own children would go on, and hold nothing of ours but a place in the table.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    if not ended:
        return "", f"it gave no answer in {seconds:.0f} s"
    return text.decode("utf-8", "replace"), ""


def head_of(path: Path) -> bytes:
    """The beginning of a regular file: a FIFO or a device is not waited for.

    Raises:
        OSError: It cannot be read, or is of another kind.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read(MOST_BYTES)
