"""Which BLAS multiplies float32 matrices on Linux.

MLX's Linux wheel brings the reference BLAS, which is 3 to 9 times slower than OpenBLAS on the products of 4 to 32 rows
that MTP makes. A command line (never the import of the package) puts an OpenBLAS before it, once a child process has
shown that MLX then still multiplies correctly: an installed one, else the one in NumPy's wheel. That one has other
names and 64-bit sizes, so g++, which MLX needs on a CPU anyway, makes a bridge to it at each start, in a twentieth of a
second. MLX_GEMMA_MTP_BLAS: `off`, or the path of a library.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError

VARIABLE = "MLX_GEMMA_MTP_BLAS"
DEFAULT = "libopenblas.so.0"
PATIENCE = 30  # seconds for g++
NUMPYS = "numpy.libs/libscipy_openblas64_*.so"  # beside the package
_PROBE = """
import ctypes, sys
for each in sys.argv[1:]:
    library = ctypes.CDLL(each, mode=ctypes.RTLD_GLOBAL)
library.cblas_sgemm
import mlx.core as mx, numpy as np
r = np.random.default_rng(0)
for m, k, n in ((1, 64, 48), (5, 200, 130), (33, 64, 257)):
    a, b = r.standard_normal((m, k), dtype=np.float32), r.standard_normal((n, k), dtype=np.float32)
    ours = np.array(mx.matmul(mx.array(a), mx.array(b).T, stream=mx.cpu))
    assert np.abs(ours - a @ b.T).max() < 1e-3
"""
_BRIDGE = "bridge_to_openblas.so"
_SOURCE = """
typedef long long wide;
extern "C" void scipy_cblas_sgemm64_(
    int, int, int, wide, wide, wide, float, const float*, wide, const float*, wide, float, float*, wide);
extern "C" void cblas_sgemm(
    int order, int ta, int tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
    float beta, float* c, int ldc) {
  scipy_cblas_sgemm64_(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
"""


def preload() -> None:
    """Loads a fast BLAS in front of MLX's own; call it before MLX is imported. Does nothing where there is none.

    Raises UserError when MLX_GEMMA_MTP_BLAS names a library that cannot be loaded or multiplies wrongly.
    """
    choice = os.path.expanduser(os.environ.get(VARIABLE, ""))
    if not sys.platform.startswith("linux") or choice == "off" or "mlx.core" in sys.modules:
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    reason = _put_first(choice or DEFAULT)
    if reason and choice:
        raise UserError(
            f"{VARIABLE}={choice} is no usable BLAS ({reason}); expected 'off' or the path of an OpenBLAS library"
        )
    if reason:
        with _numpys() as libraries:
            if libraries:
                _put_first(*libraries)


def _put_first(*libraries: str) -> str | None:
    """Loads libraries, of which the last multiplies, if MLX then multiplies correctly. Returns why not; None if so."""
    probe = subprocess.run([sys.executable, "-c", _PROBE, *libraries], capture_output=True, text=True)
    if probe.returncode:
        return (probe.stderr.strip().splitlines() or ["no message"])[-1]
    for each in libraries:
        ctypes.CDLL(each, mode=ctypes.RTLD_GLOBAL)
    return None


@contextmanager
def _numpys() -> Iterator[list[str]]:
    """The OpenBLAS in NumPy's wheel and the bridge to it, which may go once it is loaded; nothing where one of them
    cannot be had.
    """
    spec, libraries = find_spec("numpy"), []  # which does not import it
    found = sorted(Path(spec.origin).parents[1].glob(NUMPYS)) if spec and spec.origin else []
    with ExitStack() as stack:
        with suppress(OSError, subprocess.SubprocessError):
            if found:
                folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                bridge = os.path.join(folder, _BRIDGE)
                command = ["g++", "-x", "c++", "-O1", "-shared", "-fPIC", "-nostdlib", "-o", bridge, "-"]
                subprocess.run(command, input=_SOURCE, check=True, capture_output=True, text=True, timeout=PATIENCE)
                libraries = [str(found[0]), bridge]
        yield libraries


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def is_reference() -> bool:
    """Returns whether the reference BLAS multiplies, which is slow."""
    return name().startswith("reference")


@cache
def small_product() -> int:
    """Returns how many multiply-adds a product may have that the BLAS in use multiplies without packing its matrices,
    which takes as long as some rows of the product itself; 0 where it always packs.

    OpenBLAS does without on x86-64 with AVX-512 (sgemm_small_matrix_permit of its SkylakeX kernels and their heirs).
    """
    if not sys.platform.startswith("linux") or (core := _openblas("get_corename")) is None:
        return 0
    core.restype = ctypes.c_char_p
    return 1_000_000 if core() in (b"SkylakeX", b"Cooperlake", b"SapphireRapids") else 0


@cache
def threads() -> int:
    """Returns how many threads share a product of the BLAS in use; 0 where that is not known."""
    if is_reference():
        return 1
    count = _openblas("get_num_threads")
    return 0 if count is None else int(count())


def _openblas(name: str) -> Any:
    """Returns a function of the OpenBLAS in use, by its name without the prefix; None where another BLAS is."""
    return _function(f"openblas_{name}") or _function(f"scipy_openblas_{name}64_")


def _function(name: str) -> Any:
    """Returns what programs find by a name before they look into MLX's own libraries; None where nothing is."""
    return getattr(ctypes.CDLL(None), name, None)


def name() -> str:
    """Returns the name of the BLAS in use: a library in front of MLX's own (by `preload`, LD_PRELOAD), or that."""
    if not sys.platform.startswith("linux"):
        return "Accelerate" if sys.platform == "darwin" else "MLX's own"
    if (product := _function("cblas_sgemm")) is None:
        return "reference (MLX's own)"
    if (file := _file_of(product)) == _BRIDGE:
        return _file_of(_function("scipy_cblas_sgemm64_"))
    return file


def _file_of(function: Any) -> str:
    """Returns the name of the library file that a function is in."""
    info = _DlInfo()
    ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    return os.path.basename((info.file or b"unknown").decode())
