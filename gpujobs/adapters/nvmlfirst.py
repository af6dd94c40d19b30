"""The first version of NVML's process lists, which pynvml has dropped: all that drivers before 460 have."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

import pynvml

from gpujobs.adapters.nvmlsession import Handle

_NO_INSTANCE: Final = 0xFFFFFFFF
_NOT_AVAILABLE: Final = 2**64 - 1
"""NVML_VALUE_NOT_AVAILABLE of nvml.h as an unsigned long long."""

_SPARE: Final = 5
"""Entries of room for processes that begin between the two calls."""


class _Info(ctypes.Structure):
    """``nvmlProcessInfo_v1_t`` of nvml.h."""

    _fields_ = (("pid", ctypes.c_uint), ("usedGpuMemory", ctypes.c_ulonglong))


@dataclass(frozen=True, slots=True)
class FirstProcess:
    """One process, under pynvml's own names for the parts that later versions have too."""

    pid: int
    usedGpuMemory: int | None  # noqa: N815
    gpuInstanceId: int = _NO_INSTANCE  # noqa: N815
    computeInstanceId: int = _NO_INSTANCE  # noqa: N815


def first_processes(name: str, handle: Handle) -> list[FirstProcess]:
    """A process list by its call without a version.

    Args:
        name: The function's name in NVML.
        handle: The device.

    Raises:
        pynvml.NVMLError: As pynvml's own functions.
    """
    library: Any = pynvml
    function, count = library._nvmlGetFunctionPointer(name), ctypes.c_uint(0)
    code = function(handle, ctypes.byref(count), None)
    if code == pynvml.NVML_SUCCESS:
        return []
    if code != pynvml.NVML_ERROR_INSUFFICIENT_SIZE:
        raise pynvml.NVMLError(code)
    count.value = count.value * 2 + _SPARE
    found = (_Info * count.value)()
    library._nvmlCheckReturn(function(handle, ctypes.byref(count), found))
    return [
        FirstProcess(int(info.pid), None if info.usedGpuMemory == _NOT_AVAILABLE else int(info.usedGpuMemory))
        for info in found[: count.value]
    ]
