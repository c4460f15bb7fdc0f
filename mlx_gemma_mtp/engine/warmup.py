"""The first run of everything, while something else is waited for.

On a GPU our kernels are compiled at their first launch in a process, one for each format and number of rows: each would
stall a reply. On a CPU a fused kernel costs MLX half a second of g++ the first time on a machine; afterwards it lies
below the folder for temporary files. Which of these there are follows from the kinds of layers and the layout of
arrays, not from their sizes.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from ..cache.spec import KVSpec
from ..errors import UserError
from ..files.files import cache_folder, whole
from ..machine import device
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..models.linear import first_products
from ..models.loading import step_bytes
from .calibration import KINDS, Bench

MOST_BYTES = 1e9  # a step of a larger model takes so long that its kernels may be made as they come
PROMPT = [2, 3, 4, 5]
GPU_ROUNDS = ((1, (1, 3, 7)), (2, (7,)))  # rows, and their drafts: passes of 1, 2, 4, 8 and 16 tokens
SAFE = re.compile(r"[\w./+ -]+", re.ASCII)  # MLX puts the folder's name into a shell command
PREAMBLE = "mlx/backend/cpu/compiled_preamble.h"  # in MLX's include folder
FLAGS = ("-std=c++17", "-O3", "-Wall", "-fPIC")  # MLX's: a compiled header serves no others
FEW = 10  # kernels: there are many to come
PATIENCE = 120  # more than a first start takes
_done: set[tuple] = set()


def keep_kernels() -> None:
    """Has MLX keep what it compiles for a Linux CPU in the user's cache folder, by setting TMPDIR.

    A reboot empties /tmp, and there the folder belongs to whoever came first: others cannot add to it, and would run
    what lies in it. A TMPDIR that can be written stays. Only command lines call this, since TMPDIR is the process's.
    """
    if not sys.platform.startswith("linux") or not device.traits().compiles_on_host:
        return
    if os.path.isdir(given := os.environ.get("TMPDIR", "")) and _can_hold(kernel_folder()):
        return
    os.environ.pop("TMPDIR", None)
    usual = tempfile.gettempdir()  # Python's own stays where it was
    folder = cache_folder() / "kernels" / f"{platform.machine()}-{_libc()}"
    if SAFE.fullmatch(str(folder)) and _can_hold(folder):
        os.environ["TMPDIR"] = str(folder)
    elif given:
        os.environ["TMPDIR"] = usual


def check_kernel_folder() -> None:
    """Raises UserError where MLX must compile for this CPU and cannot: its folder is not there and cannot be made."""
    if not device.traits().compiles_on_host:
        return
    try:
        kernel_folder().mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"MLX cannot keep the kernels that it compiles in {kernel_folder()} ({error}); set TMPDIR to a folder that "
            "can be written"
        ) from None


def _libc() -> str:
    """A home may be shared by machines; a library of a newer one does not load on an older."""
    with suppress(ValueError, OSError):
        return (os.confstr("CS_GNU_LIBC_VERSION") or "libc").replace(" ", "-")
    return "libc"


def _can_hold(folder: Path) -> bool:
    """Whether libraries can be written there, and loaded."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK) and not os.statvfs(folder).f_flag & os.ST_NOEXEC
    except OSError:
        return False


def kernel_folder() -> Path:
    """Returns the folder where MLX keeps the kernels that it compiled for the CPU. It may not exist."""
    return Path(os.environ.get("TMPDIR") or tempfile.gettempdir(), "mlx", mx.__version__, "cpu")


def wanted(target: Gemma4) -> bool:
    """Returns whether kernels are to be compiled before they are needed."""
    return device.traits().compiles_on_host and step_bytes(target) <= MOST_BYTES


def making_ready(target: Gemma4) -> str:
    """Returns what `load` does last, for whoever waits."""
    if not device.traits().compiles_on_host:
        return "running everything once, which compiles kernels, and importing the tokenizer"
    if wanted(target) and shutil.which("g++") and not any(kernel_folder().glob("*.so")):
        return "compiling kernels for this CPU (once on this machine) and importing the tokenizer"
    return "importing the tokenizer"


def warm_up(
    target: Gemma4,
    drafter: Drafter | None,
    max_rows: int,
    pause: Callable[[], None] = lambda: None,
    specs: Sequence[KVSpec] | None = None,
) -> None:
    """Runs a short prompt, and rounds with drafts and without, in one row and, where max_rows allows, in two.

    On a CPU it does so once a process for each kind of pair; on a GPU at every load, with more numbers of drafts, and
    runs all products of few rows. pause: called in between. specs: of the caches, as Bench takes them. Raises UserError
    where MLX cannot keep its kernels.
    """
    if not device.traits().compiles_on_host:
        return _warm_gpu(target, drafter, max_rows, pause, specs)
    check_kernel_folder()
    if not wanted(target):
        return
    for rows in (1, 2)[:max_rows]:
        pause()
        bits = frozenset((spec.window is None, spec.bits) for spec in specs or () if spec.bits)
        kind = (rows, type(target), target.config.moe is None, drafter and type(drafter.masked_embedding), bits)
        if kind not in _done:
            _done.add(kind)
            with _one_at_a_time(), preamble_compiled():
                Bench(target, drafter, PROMPT, KINDS["greedy"], rows, 0, specs=specs).rounds(2)


def _warm_gpu(
    target: Gemma4,
    drafter: Drafter | None,
    max_rows: int,
    pause: Callable[[], None],
    specs: Sequence[KVSpec] | None,
) -> None:
    for model in (target, drafter) if drafter else (target,):
        for products in first_products(model, target.dtype):
            pause()
            mx.eval(products)
    for rows, drafts in GPU_ROUNDS:
        if rows <= max_rows:
            pause()
            bench = Bench(target, drafter, PROMPT, KINDS["greedy"], rows, 0, specs=specs)
            for count in drafts:
                bench.rounds(count)
    mx.clear_cache()


@contextmanager
def preamble_compiled(few: int = FEW) -> Iterator[None]:
    """Where fewer kernels than that are compiled yet, compiles the header that all of them include once, before them.

    That is most of a kernel's time: 0.17 seconds instead of 0.82. g++ looks for it beside a kernel's source first, and
    passes over one that does not fit. It has 50 MB, so whoever made it removes it.
    """
    header, folder = Path(mx.__file__).parent / "include" / PREAMBLE, kernel_folder()
    made = folder / f"{PREAMBLE}.gch"
    mine = header.is_file() and shutil.which("g++") and len(list(folder.glob("*.so"))) < few and not made.exists()
    if mine:
        command = ["g++", *FLAGS, f"-I{header.parents[3]}", "-x", "c++-header", str(header), "-o"]
        with suppress(OSError, subprocess.SubprocessError):  # then each kernel reads it anew
            made.parent.mkdir(parents=True, exist_ok=True)
            with whole(made) as part:
                subprocess.run([*command, str(part)], check=True, capture_output=True, timeout=PATIENCE)
    try:
        yield
    finally:
        if mine:
            shutil.rmtree(folder / PREAMBLE.split("/")[0], ignore_errors=True)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keeps processes that start together from loading libraries that another one's g++ still writes.

    One that is stopped holds the others up for PATIENCE seconds; where there are no locks, nothing waits.
    """
    lock = None
    with suppress(OSError):
        kernel_folder().mkdir(parents=True, exist_ok=True)
        lock = os.open(kernel_folder(), os.O_RDONLY)
        began = time.monotonic()
        while not _locked(lock) and time.monotonic() - began < PATIENCE:
            time.sleep(0.1)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _locked(folder: int) -> bool:
    import fcntl  # Unix alone, and so is MLX's CPU compiler here

    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
