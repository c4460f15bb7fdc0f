"""What command lines share.

Importing this package from a command line sets what Ctrl-C does until the command runs, and once it has run (see
`guarded`).
"""

from __future__ import annotations

import os
import signal
import sys


def _leave(signum: int, frame: object) -> None:
    os._exit(130)  # nothing was written yet, or all that there was


def leave_quietly() -> None:
    """Lets Ctrl-C end a process that still imports its modules, or has done its work, with exit code 130, quietly.

    Does so for `python -m mlx_gemma_mtp.COMMAND` alone, and not where Ctrl-C is ignored (nohup).
    """
    main = sys.modules["__main__"].__spec__
    started = main is not None and main.name.startswith("mlx_gemma_mtp.")
    if started and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_again() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again, once the command runs."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


leave_quietly()
