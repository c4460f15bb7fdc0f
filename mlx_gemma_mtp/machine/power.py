"""Keeps a Mac awake while it works: an idle Mac sleeps amid a long generation, for nobody touches it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any, NamedTuple

KIND = "PreventUserIdleSystemSleep"  # the display may sleep
ON = 255  # kIOPMAssertionLevelOn
UTF8 = 0x08000100  # kCFStringEncodingUTF8
FRAMEWORK = "/System/Library/Frameworks/{0}.framework/{0}"


class Frameworks(NamedTuple):
    """The libraries that power assertions are made with."""

    foundation: Any
    iokit: Any

    @classmethod
    def declared(cls, foundation: Any, iokit: Any) -> Frameworks:
        """Returns the libraries with the types of what is called: pointers are wider than ctypes takes them to be."""
        text, number = ctypes.c_void_p, ctypes.c_uint32
        foundation.CFStringCreateWithCString.restype = text
        foundation.CFStringCreateWithCString.argtypes = (ctypes.c_void_p, ctypes.c_char_p, number)
        foundation.CFRelease.restype, foundation.CFRelease.argtypes = None, (text,)
        iokit.IOPMAssertionCreateWithName.restype = ctypes.c_int32
        iokit.IOPMAssertionCreateWithName.argtypes = (text, number, text, ctypes.POINTER(number))
        iokit.IOPMAssertionRelease.restype, iokit.IOPMAssertionRelease.argtypes = ctypes.c_int32, (number,)
        return cls(foundation, iokit)


@cache
def _system() -> Frameworks | None:
    """Returns the frameworks of a Mac; None elsewhere, and where they cannot be loaded."""
    if sys.platform != "darwin":
        return None
    try:
        return Frameworks.declared(*(ctypes.CDLL(FRAMEWORK.format(name)) for name in ("CoreFoundation", "IOKit")))
    except (OSError, AttributeError):
        return None


class Awake:
    """Keeps the machine from idle sleep between `on` and `off`. It does nothing elsewhere than on a Mac, and nothing
    where the system refuses: then the machine may sleep, as before.

    reason: what `pmset -g assertions` shows. frameworks: None for the system's.
    """

    def __init__(self, reason: str, frameworks: Frameworks | None = None):
        self.reason = reason
        self._frameworks = frameworks or _system()
        self._assertion: int | None = None

    def on(self) -> None:
        """Keeps the machine awake from now on. A second call changes nothing."""
        if self._frameworks is None or self._assertion is not None:
            return
        foundation, iokit = self._frameworks
        made = [foundation.CFStringCreateWithCString(None, text.encode(), UTF8) for text in (KIND, self.reason)]
        number = ctypes.c_uint32(0)
        try:
            if all(made) and iokit.IOPMAssertionCreateWithName(made[0], ON, made[1], ctypes.byref(number)) == 0:
                self._assertion = number.value
        finally:
            for text in filter(None, made):
                foundation.CFRelease(text)

    def off(self) -> None:
        """Lets the machine sleep again. A second call changes nothing."""
        if self._assertion is not None:
            self._frameworks.iokit.IOPMAssertionRelease(self._assertion)
            self._assertion = None
