"""What the commands share: errors as one line, exit codes, files written whole or not at all, progress."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import UserError, clipped, shown
from ..files.files import is_stream, whole
from ..machine import blas
from . import leave_quietly, raise_again

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..engine.engine import Engine

DIGITS = re.compile(r"\d{100,}")  # of an integer, in a message
LONG = re.compile(r"\S{200,}")  # an argument in a message
PLOTS = (".png", ".svg", ".pdf")
ESCAPED = "[^\ud800-\udc7f\udd00-\udfff]*"  # of lone surrogates, those that stand for bytes alone


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help tells when it cannot be written."""

    def error(self, message: str) -> None:
        """Raises UserError. Long arguments are shortened in the message."""
        raise UserError(f"{LONG.sub(lambda found: clipped(found[0]), message)} (see {self.prog} --help)")

    def print_help(self, file: IO[str] | None = None) -> None:
        """Writes the help. Raises OSError where that fails, which argparse itself passes over."""
        (file or sys.stdout).write(self.format_help())


def command(
    run: Callable[[argparse.Namespace], int], parser: Callable[[], argparse.ArgumentParser], argv: list[str] | None
) -> int:
    """Parses the arguments, calls `run` with them, and returns the exit code (see `guarded`). argv: None takes the
    process's own.
    """
    return guarded(lambda: run(parser().parse_args(texts(argv))))


def guarded(call: Callable[[], int]) -> int:
    """Runs a command and returns its exit code.

    That is what `call` returns; 2, with one line on standard error, for bad input and for what cannot be read or
    written; 1 where the reader of standard output has gone; 130 after Ctrl-C.
    """
    open_streams()
    try:
        raise_again()
        try:
            if sys.stdout is None:
                raise UserError("standard output is closed; expected a terminal, a pipe or a file")
            return call()
        finally:
            _flush()
    except BrokenPipeError:  # the reader has gone, as in `... | head`
        _discard_output()
        return 1
    except UserError as error:
        tell(f"error: {DIGITS.sub(lambda found: clipped(found[0], 40), ' '.join(str(error).splitlines()))}")
        return 2
    except OSError as error:
        tell(f"error: {_reason(error)}")
        return 2
    except KeyboardInterrupt as stop:
        if str(stop):
            tell(f"error: {stop}")
        return 130
    finally:
        leave_quietly()


def open_streams() -> None:
    """Opens the standard streams that the caller has closed (`2>&-`), and writes UTF-8 whatever the locale says.

    Else Python would print notes on standard output, and a file that is opened would take the number of standard error.
    Characters that are no text, as in some paths, are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process runs
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def _flush() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _discard_output()
        raise


def _reason(error: OSError) -> str:
    """Names the file and what is wrong with it, in a line.

    An error without a name comes from what is open (standard output, a file that is being written) or from a working
    directory that is gone.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the working directory was deleted; change to a folder that exists"
    reason = " ".join((error.strerror or str(error)).splitlines())
    if error.filename is None:
        return f"standard output or a file cannot be written ({reason}); expected a disk with space, or a pipe"
    return f"{os.fsdecode(error.filename)}: {reason}"


def _discard_output() -> None:
    """What is still to be written goes nowhere, so that the end of the process does not try again."""
    with suppress(OSError, ValueError):  # no file, as in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def texts(argv: Sequence[str] | None) -> list[str]:
    """Returns arguments as text.

    argv: None takes the process's own. Bytes that the locale cannot read are read as UTF-8.

    Raises UserError, naming the argument, for bytes that are no text (they would arrive as lone surrogates).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    found, flag = [], ""
    for argument in argv:
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            argument = _decoded(argument, flag)
        found.append(argument)
    return found


def _decoded(argument: str, flag: str) -> str:
    data = argument.encode("utf-8", "surrogateescape" if re.fullmatch(ESCAPED, argument) else "surrogatepass")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"argument {flag}" if flag else "an argument"
        raise UserError(
            f"{where}: {argument!r} is not UTF-8 (byte {data[error.start]:#04x} at {error.start}); give it in UTF-8"
        ) from None


def tell(*lines: str) -> None:
    """Prints on standard error. What cannot be printed there (a full disk, a reader that has gone) stops nothing."""
    with suppress(OSError):
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Prints what the user should know on standard error."""
    tell(f"note: {message}")


class Stage:
    """Tells on standard error what is being done, once it takes longer than `seconds`.

    Call it with what begins, or with '' where nothing is done any more. It is a context manager, which ends with ''.
    """

    def __init__(self, seconds: float = 1.0):
        self.seconds = seconds
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: object) -> None:
        self("")

    def __call__(self, what: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(self.seconds, note, (f"{what} \u2026",)) if what else None
        if self._timer is not None:
            self._timer.daemon = True  # an error must not wait for it
            self._timer.start()


def loaded(model: str | None, draft_model: str, *, notice: Callable[[str], None] = note, **options: Any) -> Engine:
    """Loads an engine for a command line: see engine.load.load for the arguments.

    A fast BLAS is loaded first. A progress bar and what takes long go to standard error, and so do notes, unless
    `notice` takes them. Raises UserError.
    """
    with Stage() as stage:
        stage("checking the BLAS")
        blas.preload()
        from ..engine.load import load  # after the BLAS: it imports MLX
        from ..engine.warmup import keep_kernels

        keep_kernels()
        return load(model, draft_model, notice=notice, progress=Bar("loading"), stage=stage, **options)


def check_file(flag: str, path: Path) -> None:
    """Refuses a file that could not be written, before anything is measured. Raises UserError."""
    if "\0" in str(path):
        raise UserError(f"{flag} {shown(str(path))} is no name of a file; expected a file in a folder that exists")
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; expected a file in a folder that exists; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: expected a file in a folder that exists; create {path.parent}")
    try:
        place = path if is_stream(path) else Path(os.path.realpath(path)).parent
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror}); name another file") from None
    if not place.exists() or not os.access(place, os.W_OK):
        raise UserError(f"{flag} {path}: {place} cannot be written; name another file")


def check_plot(path: Path) -> None:
    """Refuses a --plot that could not be drawn or written, before anything is measured. Raises UserError."""
    check_file("--plot", path)
    if path.suffix not in PLOTS:
        raise UserError(f"--plot {path}: expected a name that ends in {', '.join(PLOTS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib; install it: pip install 'mlx-gemma-mtp[bench]'") from None


@contextmanager
def interruptible(cancel: threading.Event) -> Iterator[None]:
    """Lets the first Ctrl-C set the event, and the second raise KeyboardInterrupt, until the block ends."""

    def stop(signum: int, frame: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yields where to write a file that the user named; the file appears whole, or not at all (see files.whole).

    Raises UserError where it cannot be written.
    """
    try:
        with whole(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another file") from None


class Bar:
    """A progress bar on a terminal's standard error, which appears after a second. Call it with (done, total)."""

    def __init__(self, what: str):
        self.what = what
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            from tqdm import tqdm  # a tenth of the time to `--version`

            self.bar = tqdm(total=total, desc=self.what, delay=1, leave=False, disable=None)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()
            self.bar = None
