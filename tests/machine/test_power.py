"""Power assertions by frameworks that stand in for a Mac's, called through ctypes."""

import ctypes
from types import SimpleNamespace

import pytest

from mlx_gemma_mtp.machine import power

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_uint32
CREATE = ctypes.CFUNCTYPE(POINTER, POINTER, ctypes.c_char_p, NUMBER)
RELEASE = ctypes.CFUNCTYPE(None, POINTER)
ASSERT = ctypes.CFUNCTYPE(ctypes.c_int32, POINTER, NUMBER, POINTER, ctypes.POINTER(NUMBER))
END = ctypes.CFUNCTYPE(ctypes.c_int32, NUMBER)
HIGH = 0x7FFF_1234_0000  # addresses that an int of 32 bits would cut


class Mac:
    """Frameworks that count what is alive. refuses: what IOPMAssertionCreateWithName returns."""

    def __init__(self, refuses: int = 0):
        self.texts: dict[int, str] = {}
        self.assertions: dict[int, tuple[str, int, str]] = {}
        self.made, self.refuses = 0, refuses
        foundation = SimpleNamespace(CFStringCreateWithCString=CREATE(self.create), CFRelease=RELEASE(self.release))
        iokit = SimpleNamespace(IOPMAssertionCreateWithName=ASSERT(self.hold), IOPMAssertionRelease=END(self.end))
        self.frameworks = power.Frameworks.declared(foundation, iokit)

    def create(self, allocator, text, encoding):
        assert not allocator and encoding == 0x08000100
        address = HIGH + len(self.texts)
        self.texts[address] = text.decode()
        return address

    def release(self, text):
        del self.texts[text]

    def hold(self, kind, level, name, number):
        if self.refuses:
            return self.refuses
        self.made += 1
        self.assertions[self.made] = self.texts[kind], level, self.texts[name]
        number[0] = self.made
        return 0

    def end(self, number):
        del self.assertions[number]
        return 0


def test_a_mac_stays_awake_from_on_to_off():
    mac = Mac()
    awake = power.Awake("generating text", mac.frameworks)
    awake.on()
    awake.on()
    assert mac.assertions == {1: ("PreventUserIdleSystemSleep", 255, "generating text")}
    awake.off()
    awake.off()
    assert mac.assertions == {} and mac.texts == {}
    awake.on()
    assert list(mac.assertions) == [2]


def test_a_system_that_refuses_is_left_alone():
    mac = Mac(refuses=-536870206)
    awake = power.Awake("generating text", mac.frameworks)
    awake.on()
    awake.off()
    assert mac.made == 0 and mac.texts == {}


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_nothing_is_done_elsewhere(monkeypatch, platform):
    monkeypatch.setattr(power.sys, "platform", platform)
    power._system.cache_clear()
    awake = power.Awake("generating text")
    awake.on()
    awake.off()
    power._system.cache_clear()
