"""SIGINT, SIGTERM and SIGHUP: each unwinds the stack, but not where that would leave half of something."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """While it is entered, signals raise KeyboardInterrupt; after `hold()` they are only noted in `came`.

    Ignored signals stay ignored (nohup). In threads, which get no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.came, self._held, self._before = False, False, {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """Lets nothing be interrupted from here on: what follows is short, and must be done whole."""
        self._held = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if not self._held:
            raise KeyboardInterrupt
