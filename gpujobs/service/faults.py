"""Named points at which tests kill the server: ``GPUJOBS_FAULT=name`` or ``name:n`` (the n-th time it is passed).

The process ends itself with SIGKILL: no handler runs, nothing is flushed, as when the machine's power fails.
"""

from __future__ import annotations

import os
import signal

POINTS = {
    "submission-received": "a submission was validated, nothing is written",
    "submission-committed": "it is on disk, the client has no answer",
    "decision-made": "GPUs were chosen, nothing is written",
    "decision-committed": "the choice is on disk, the Engine knows nothing",
    "image-ready": "the image is there, no container is",
    "container-created": "the Engine has the container, the ledger does not",
    "container-recorded": "the ledger has the container's id, it is not started",
    "container-started": "its init waits at the gate",
    "devices-verified": "what was granted was compared, it still waits",
    "running-committed": "the ledger says running, the gate is shut",
    "released": "the program runs",
    "container-ended": "it is over, the ledger says running",
    "end-committed": "the ledger says ended, the log is not closed",
    "log-closed": "all is done but the tidying up",
    "cancel-committed": "a cancellation is on disk, nothing was signalled",
    "container-removed": "an old container is gone, the ledger does not know",
}
"""Every point and what is true there; docs/operations.md lists them."""

_WANTED, _, _COUNT = os.environ.get("GPUJOBS_FAULT", "").partition(":")
_left = int(_COUNT) if _COUNT.isdecimal() else 1


def fault(name: str) -> None:
    """Die here if the environment says so."""
    global _left  # noqa: PLW0603 - one count for the process, which it ends
    if name not in POINTS:
        raise KeyError(name)
    if name == _WANTED:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
