"""What the commands share: errors as one line, exit codes, files written whole or not at all, progress."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from .errors import UserError
from .files import whole

PLOTS = (".png", ".svg", ".pdf")


class Parser(argparse.ArgumentParser):
    """Usage errors as one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def command(
    run: Callable[[argparse.Namespace], int], parser: Callable[[], argparse.ArgumentParser], argv: list[str] | None
) -> int:
    """The exit code: what `run` returns, 2 with one line on standard error for bad input, 130 after Ctrl-C."""
    try:
        return run(parser().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def note(message: str) -> None:
    """What the user should know, on standard error."""
    print(f"note: {message}", file=sys.stderr)


def check_file(flag: str, path: Path) -> None:
    """Refuses a file that could not be written, before anything is measured. Raises UserError."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{flag} {path}: expected a file in a folder that exists; create {path.parent}")


def check_plot(path: Path) -> None:
    """Likewise a --plot that could not be drawn."""
    check_file("--plot", path)
    if path.suffix not in PLOTS:
        raise UserError(f"--plot {path}: expected a name that ends in {', '.join(PLOTS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib; install it: pip install 'mlx-gemma-mtp[bench]'") from None


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """As files.whole, for a file that the user named. Raises UserError."""
    try:
        with whole(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another file") from None


class Bar:
    """A progress bar on a terminal's standard error that shows itself after a second."""

    def __init__(self, what: str):
        self.what = what
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.what, delay=1, leave=False, disable=None)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()
            self.bar = None
