"""Memory pressure, as macOS sees it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

NORMAL, WARNING, CRITICAL = 1, 2, 4  # the kernel's own numbers
NAME = b"kern.memorystatus_vm_pressure_level"


@cache
def _system() -> ctypes.CDLL | None:
    """Returns the C library of a Mac, which every process has; None elsewhere."""
    return ctypes.CDLL(None) if sys.platform == "darwin" else None


def level(library: Any = None) -> int:
    """Returns NORMAL, WARNING or CRITICAL. It takes a microsecond. Where nobody can say, the pressure is NORMAL.

    library: the C library that has `sysctlbyname`; None for the system's.
    """
    library = library or _system()
    if library is None:
        return NORMAL
    value = ctypes.c_int32(NORMAL)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    failed = library.sysctlbyname(NAME, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    if failed:
        return NORMAL
    return max((each for each in (WARNING, CRITICAL) if each <= value.value), default=NORMAL)
