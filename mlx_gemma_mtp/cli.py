"""What the commands share: errors as one line, exit codes, files written whole or not at all, progress."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from .errors import UserError


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


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the name at the end, and goes where something fails.

    Raises UserError where it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another file") from None
    finally:
        part.unlink(missing_ok=True)


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
