"""What the recipe's commands share: errors as one line, the kinds of their arguments."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from mlx_gemma_mtp.errors import UserError

Main = Callable[[list[str] | None], None]


def command(main: Main) -> Callable[[list[str] | None], int]:
    """`main` with an exit code: 0, 2 with one line on standard error for bad input, 130 after Ctrl-C."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            main(argv)
        except (UserError, OSError) as error:
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
            return 130
        return 0

    return run


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1")
    return int(text)


def rate(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")
    return value


def require(folder: Path, file: str, option: str, fix: str) -> None:
    """Raises UserError where `folder` does not hold `file`."""
    if not (folder / file).is_file():
        raise UserError(f"{option} {folder} holds no {file}; {fix}")
