"""What the last lines of a failed job's log tell: the usual ends of deep-learning programs, with one hint each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause, as a clause that follows ``exit 1: ``, and what to do about it."""

    cause: str
    hint: str


_SIGNS: tuple[tuple[re.Pattern[bytes], Finding], ...] = tuple(
    (re.compile(pattern), Finding(cause, hint))
    for pattern, cause, hint in (
        (
            # PyTorch; XLA (JAX, TensorFlow); the CUDA driver's and the runtime's own names
            (
                rb"CUDA out of memory|OutOfMemoryError: CUDA|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation"
                rb"|RESOURCE_EXHAUSTED: Out of memory|OOM when allocating tensor"
            ),
            "the GPU's memory was full (CUDA out of memory)",
            "use a smaller batch, or ask for a larger GPU: `gpus: {memory: 80GB}`",
        ),
        (
            (
                rb"Bus error.{0,200}(?:shm|shared memory)|insufficient shared memory"
                rb"|unable to (?:open|write to) shared memory"
            ),
            "the shared memory was full",
            "raise `shm_size`, or use fewer data loader workers",
        ),
        (
            (
                rb"Watchdog caught collective operation timeout|NCCL (?:operation )?time(?:d )?-?out"
                rb"|ncclSystemError|ncclRemoteError"
            ),
            "a collective operation between GPUs (NCCL) did not finish",
            "one rank probably died or hangs: look at the first error of each rank; NCCL_DEBUG=INFO says more",
        ),
        (
            rb"No space left on device|Errno 28\b",
            "there was no space left on a disk",
            "write to a volume with space, and less into the container",
        ),
        (
            rb"no kernel image is available for execution|CUDA error: invalid device function",
            "the program has no code for this GPU's architecture",
            'use an image built for it, or ask for another GPU: `gpus: {capability: ">=8.0"}`',
        ),
        (
            rb"CUDA driver version is insufficient|forward compatibility was attempted on non supported HW",
            "the image's CUDA needs a newer driver",
            "use an image with an older CUDA; `gpujobs gpus` shows what the driver supports",
        ),
    )
)


def diagnose(tail: bytes, exit_code: int) -> Finding | None:
    """The cause that the end of a log names; the last sign in it counts.

    Args:
        tail: The last lines of both streams.
        exit_code: The container's.
    """
    found = [(matches[-1].start(), finding) for sign, finding in _SIGNS if (matches := list(sign.finditer(tail)))]
    if found:
        return max(found, key=lambda pair: pair[0])[1]
    if exit_code == 139:
        return Finding(
            "a segmentation fault (SIGSEGV) in native code",
            "PYTHONFAULTHANDLER=1 in `environment` shows where",
        )
    return None


_COMMANDS = ("python3", "python", "pip3", "pip", "bash", "sh", "torchrun", "accelerate", "jupyter", "deepspeed", "uv",
             "conda", "nvidia-smi", "mpirun", "tensorboard", "ls", "cat", "env", "sleep")  # fmt: skip
_TWINS = {"python": "python3", "pip": "pip3", "bash": "sh", "python3": "python", "pip3": "pip"}


def command_hint(command: str) -> str:
    """What may have been meant by a command that an image does not have."""
    close = difflib.get_close_matches(command, [name for name in _COMMANDS if name != command], n=1, cutoff=0.75)
    meant = _TWINS.get(command) or (close[0] if close else None)
    return f"did you mean {meant!r}?" if meant else "is it installed in the image, and in its PATH?"


def image_hint(reference: str, known: Iterable[str]) -> str:
    """What may have been meant by an image that is nowhere."""
    close = difflib.get_close_matches(reference, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else "Check its name and tag, or load it into the Engine."
