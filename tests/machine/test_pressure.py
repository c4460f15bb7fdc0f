"""Memory pressure from a C library that stands in for a Mac's."""

import ctypes
from types import SimpleNamespace

import pytest

from mlx_gemma_mtp.machine import pressure

# int sysctlbyname(const char *name, void *old, size_t *old_size, void *new, size_t new_size)
PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int32),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_void_p,
    ctypes.c_size_t,
)


def library(value: int, failed: int = 0) -> SimpleNamespace:
    """A library whose kernel says `value`, or fails."""

    def call(name, old, size, new, new_size):
        assert name == b"kern.memorystatus_vm_pressure_level" and size[0] == 4 and not new and new_size == 0
        if not failed:
            old[0] = value
        return failed

    return SimpleNamespace(sysctlbyname=PROTOTYPE(call))


@pytest.mark.parametrize(
    ("value", "level"),
    [
        (1, pressure.NORMAL),
        (2, pressure.WARNING),
        (4, pressure.CRITICAL),
        (0, pressure.NORMAL),
        (3, pressure.WARNING),
        (8, pressure.CRITICAL),
    ],
)
def test_the_kernel_is_asked(value, level):
    assert pressure.level(library(value)) == level


def test_a_kernel_without_this_number_has_no_pressure():
    assert pressure.level(library(4, failed=-1)) == pressure.NORMAL


def test_there_is_none_elsewhere(monkeypatch):
    monkeypatch.setattr(pressure.sys, "platform", "linux")
    pressure._system.cache_clear()
    assert pressure.level() == pressure.NORMAL
    pressure._system.cache_clear()
