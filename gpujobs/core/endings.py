"""How an attempt ended, in the contract's words and in a sentence."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from gpujobs.core.container import INIT_REFUSED

_GIB, _MIB = 2**30, 2**20

_LAST_SIGNAL = 64
"""signal(7): SIGRTMAX. Exit codes above 128 + 64, such as the 255 of ssh and of exit(-1), name no signal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What the ledger records of an end."""

    outcome: str
    reason: str
    message: str


def size(value: int) -> str:
    """Bytes for people: ``8 GiB``, ``512 MiB``."""
    return f"{value / _GIB:.4g} GiB" if value >= _GIB else f"{value / _MIB:.4g} MiB"


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal 64`` where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_SENT_BY_ENGINE = frozenset({128 + signal.SIGKILL, 128 + signal.SIGTERM, 255})
"""How containers end with their Engine: killed, or with 255 where it cannot tell how."""


def ending_of(
    exit_code: int,
    *,
    oom: bool,
    memory: int,
    released: bool,
    stop: tuple[str, str] | None,
    engine_was_away: bool = False,
) -> Ending:
    """The ending that a container's last state tells of.

    Args:
        exit_code: The container's.
        oom: The kernel ended a process of it for its memory limit.
        memory: That limit in bytes.
        released: Its program was let run.
        stop: The reason and sentence with which we ended it, if we did.
        engine_was_away: It ended while the Engine was stopped or restarted.
    """
    if stop is not None:
        reason, message = stop
        outcome = "cancelled" if reason == "cancelled" else "failed"
        return Ending(outcome=outcome, reason=reason, message=message)
    if not released and exit_code == INIT_REFUSED:
        return Ending(
            outcome="failed",
            reason="isolation",
            message="its program never ran: the container's identity was not its owner's (the log says how)",
        )
    if exit_code == 0 and released:
        return Ending(outcome="succeeded", reason="", message="")
    if oom:  # the kernel kills when the usage is at the limit: that is the peak
        return Ending(
            outcome="failed", reason="oom",
            message=f"exit {exit_code}: killed: the {size(memory)} memory limit was reached (peak {size(memory)}): "
            "raise `mem_limit`, or hold less in memory at once",
        )  # fmt: skip
    if not released:
        message = f"its program never ran: its container ended before it was released (exit {exit_code})"
        return Ending(outcome="failed", reason="server", message=message)
    if engine_was_away and exit_code in _SENT_BY_ENGINE:
        message = f"exit {exit_code}: the Docker Engine was stopped or restarted, and its container ended with it"
        return Ending(outcome="failed", reason="server", message=message)
    if 0 < exit_code - 128 <= _LAST_SIGNAL:
        name = signal_name(exit_code - 128)
        return Ending(outcome="failed", reason="exit", message=f"exit {exit_code}: ended by {name}")
    words = {126: ": the command could not be run", 127: ": the command was not found in the image"}
    return Ending(outcome="failed", reason="exit", message=f"exit {exit_code}{words.get(exit_code, '')}")
