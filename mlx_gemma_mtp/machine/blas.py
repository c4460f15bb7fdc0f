"""Which BLAS multiplies float32 matrices on Linux.

MLX's Linux wheel brings the reference BLAS, which is 3 to 9 times slower than OpenBLAS on the products of 4 to 32 rows
that MTP makes. A command line (never the import of the package) puts an installed OpenBLAS before it, once a child
process has shown that MLX then still multiplies correctly. MLX_GEMMA_MTP_BLAS: `off`, or the path of a library.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from functools import cache

from ..errors import UserError

VARIABLE = "MLX_GEMMA_MTP_BLAS"
DEFAULT = "libopenblas.so.0"
_PROBE = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL).cblas_sgemm
import mlx.core as mx, numpy as np
r = np.random.default_rng(0)
for m, k, n in ((1, 64, 48), (5, 200, 130), (33, 64, 257)):
    a, b = r.standard_normal((m, k), dtype=np.float32), r.standard_normal((n, k), dtype=np.float32)
    ours = np.array(mx.matmul(mx.array(a), mx.array(b).T, stream=mx.cpu))
    assert np.abs(ours - a @ b.T).max() < 1e-3
"""


def preload() -> None:
    """Loads a fast BLAS in front of MLX's own; call it before MLX is imported. Does nothing where there is none.

    Raises UserError when MLX_GEMMA_MTP_BLAS names a library that cannot be loaded or multiplies wrongly.
    """
    choice = os.path.expanduser(os.environ.get(VARIABLE, ""))
    if not sys.platform.startswith("linux") or choice == "off" or "mlx.core" in sys.modules:
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    library = choice or DEFAULT
    probe = subprocess.run([sys.executable, "-c", _PROBE, library], capture_output=True, text=True)
    if probe.returncode == 0:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    elif choice:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"{VARIABLE}={choice} is no usable BLAS ({reason}); expected 'off' or the path of an OpenBLAS library"
        )


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
    if not sys.platform.startswith("linux") or "openblas" not in name():
        return 0
    try:
        core = ctypes.CDLL(None).openblas_get_corename
    except AttributeError:
        return 0
    core.restype = ctypes.c_char_p
    return 1_000_000 if core() in (b"SkylakeX", b"Cooperlake", b"SapphireRapids") else 0


@cache
def threads() -> int:
    """Returns how many threads share a product of the BLAS in use; 0 where that is not known."""
    if is_reference():
        return 1
    try:
        return int(ctypes.CDLL(None).openblas_get_num_threads())
    except AttributeError:
        return 0


def name() -> str:
    """Returns the name of the BLAS in use: a library in front of MLX's own (by `preload`, LD_PRELOAD), or that."""
    if not sys.platform.startswith("linux"):
        return "Accelerate" if sys.platform == "darwin" else "MLX's own"
    everything = ctypes.CDLL(None)
    try:
        address = ctypes.cast(everything.cblas_sgemm, ctypes.c_void_p)
    except AttributeError:
        return "reference (MLX's own)"
    info = _DlInfo()
    everything.dladdr(address, ctypes.byref(info))
    return os.path.basename((info.file or b"unknown").decode())
