"""Buffers that end at a page nobody may touch, so that an overrun faults instead of reading its neighbour."""

from __future__ import annotations

import ctypes

PAGE = 4096
ALIGN = 16  # an overrun within the last 16 bytes is seen only if it writes
FENCE = b"\xa5"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guarded:
    """`size` bytes between two inaccessible pages, as close to the second as alignment allows."""

    def __init__(self, name: str, size: int, fill: int | None = None):
        self.name, self.size = name, size
        body = max(1, -(-size // PAGE)) * PAGE
        self.total = body + 2 * PAGE
        self.base = _libc.mmap(None, self.total, 3, 0x22, -1, 0)  # read and write; private, anonymous
        if self.base in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"no {self.total} bytes for buffer {name!r}")
        end = self.base + PAGE + body
        _libc.mprotect(self.base, PAGE, 0)
        _libc.mprotect(end, PAGE, 0)
        self.ptr = (end - size) & ~(ALIGN - 1) if size else end - ALIGN
        self.slack = end - (self.ptr + size)
        ctypes.memset(self.ptr + size, FENCE[0], self.slack)
        if fill is not None:
            ctypes.memset(self.ptr, fill, size)

    def bytes(self) -> bytes:
        return ctypes.string_at(self.ptr, self.size)

    def overwritten(self) -> bool:
        """Whether something was written just past the end."""
        return ctypes.string_at(self.ptr + self.size, self.slack) != FENCE * self.slack

    def holds(self, address: int) -> bool:
        """Whether the address is in the buffer or in its fences."""
        return self.base <= address < self.base + self.total

    def free(self) -> None:
        _libc.munmap(self.base, self.total)
