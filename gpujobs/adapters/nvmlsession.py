"""The connection to NVIDIA's library NVML: started, asked, shut down and started again.

Every call goes through one function, :meth:`Session.query`, which tells three kinds of failure apart: a
metric that is not there (a gap), a GPU that fell off the bus (:class:`Lost`), and a driver that went away
(:class:`Away`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import pynvml

Handle: TypeAlias = Any
"""What NVML names a device or a set of events by: valid until the library is shut down."""

Answer: TypeAlias = Any
"""What a function of pynvml returns: a number, a text, a C structure."""

Function: TypeAlias = str | Callable[..., Answer]

GAPS: Final = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_NOT_FOUND,
        pynvml.NVML_ERROR_INSUFFICIENT_SIZE,
        pynvml.NVML_ERROR_TIMEOUT,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_CORRUPTED_INFOROM,
        pynvml.NVML_ERROR_IN_USE,
        pynvml.NVML_ERROR_NO_DATA,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_DEPRECATED,
        pynvml.NVML_ERROR_NOT_READY,
    }
)
"""Answers that concern one metric."""

LOST: Final = frozenset(
    {
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_GPU_NOT_FOUND,
        pynvml.NVML_ERROR_INSUFFICIENT_POWER,
        pynvml.NVML_ERROR_IRQ_ISSUE,
    }
)
"""Answers that concern one GPU."""

AWAY: Final = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
"""Answers that concern the driver. All others (INVALID_ARGUMENT of a dead handle, UNKNOWN) leave it open."""

PROBLEMS: Final[Mapping[int, str]] = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "libnvidia-ml.so.1 was not found: no NVIDIA driver is installed.",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "The NVIDIA kernel driver is not loaded.",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "The NVIDIA driver and its library have different versions, as after an update: reload the driver "
        "and restart this server, or reboot."
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: "This account may not use the NVIDIA driver (/dev/nvidiactl).",
}


class Lost(Exception):
    """The GPU that was asked is not there."""


class Away(Exception):
    """The driver is not there, or the handle is one of before it was loaded anew.

    Args:
        code: NVML's error code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    @property
    def problem(self) -> str:
        """A sentence for people."""
        return PROBLEMS.get(self.code) or f"NVML does not answer: {pynvml.NVMLError(self.code)}."


class Session:
    """The library, for one thread. It is found by its soname alone, so that LD_LIBRARY_PATH is honoured.

    Attributes:
        up: Whether the library is started.
        fresh: Whether it was started within the present piece of work: no handle can be dead then.
        generation: Grows with every start. Handles and what was read of the driver are of one generation.
    """

    def __init__(self) -> None:
        self.up = False
        self.fresh = False
        self.generation = 0
        self._odd: set[Function] = set()

    def start(self) -> None:
        """Begin a piece of work: start the library where it is not.

        Raises:
            Away: It cannot be started.
        """
        if self.up:
            self.fresh = False
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise Away(int(error.value)) from error
        self.up = self.fresh = True
        self.generation += 1

    def stop(self) -> None:
        """Shut the library down."""
        if self.up:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
        self.up = self.fresh = False
        self._odd.clear()

    def query(self, function: Function, *arguments: Answer, default: Answer = None, odd: bool = False) -> Answer:
        """Ask NVML.

        Args:
            function: A name in :mod:`pynvml`, or what asks for something that it does not have.
            *arguments: What it takes.
            default: The answer where the metric is not there.
            odd: Whether an answer of no known kind is a gap too (link numbers and MIG slots that do not exist
                are an INVALID_ARGUMENT).

        Raises:
            Lost: The GPU is not there.
            Away: The driver is not there, or the handle is one of before it was loaded anew.
        """
        try:
            return (getattr(pynvml, function) if isinstance(function, str) else function)(*arguments)
        except pynvml.NVMLError as error:
            code = int(error.value)
        except UnicodeDecodeError:  # a process may call itself anything
            return default
        if code in LOST:
            raise Lost
        if code in AWAY:
            raise Away(code)
        if code in GAPS or odd or function in self._odd:
            return default
        if not self.fresh:
            raise Away(code)
        # The library was started a moment ago: the handle is not dead, and another start would not help.
        self._odd.add(function)
        return default

    def must(self, function: str, *arguments: Answer) -> Answer:
        """Ask for what a GPU cannot be listed without.

        Raises:
            Lost: The GPU is not there, or does not tell.
            Away: As for :meth:`query`.
        """
        answer = self.query(function, *arguments)
        if answer is None:
            raise Lost
        return answer
