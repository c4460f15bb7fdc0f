"""The BLAS on Linux: named truthfully, loaded by a command line alone, and only if it multiplies correctly."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_gemma_mtp.machine import blas

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone")
NAME = "from mlx_gemma_mtp.machine import blas; {}; import mlx.core; print(blas.name())"


def run(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LD_PRELOAD", "MLX_GEMMA", "OPENBLAS"))}
    child = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return child.stdout.strip()


def openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return True


@linux
def test_the_import_of_the_package_loads_none():
    assert run(NAME.format("0")).startswith("reference")


@linux
def test_off_means_off():
    assert run(NAME.format("blas.preload()"), MLX_GEMMA_MTP_BLAS="off").startswith("reference")


@linux
@pytest.mark.skipif(not sys.platform.startswith("linux") or not openblas(), reason="no libopenblas.so.0 here")
def test_an_installed_openblas_comes_before_the_reference():
    assert "openblas" in run(NAME.format("blas.preload()"))
    assert "openblas" in run(NAME.format("0"), LD_PRELOAD="libopenblas.so.0", OPENBLAS_NUM_THREADS="1")


@linux
def test_a_library_without_products_is_refused():
    code = (
        "from mlx_gemma_mtp import UserError\nfrom mlx_gemma_mtp.machine import blas\n"
        "try:\n    blas.preload()\nexcept UserError as e:\n    print(e)"
    )
    assert "is no usable BLAS" in run(code, MLX_GEMMA_MTP_BLAS="libc.so.6")


ALONE = "from mlx_gemma_mtp.machine import blas; blas.DEFAULT = 'libnothing.so.0'; "  # no OpenBLAS is installed


def numpys() -> bool:
    """Whether NumPy is a wheel that has an OpenBLAS, and a bridge to it can be made."""
    return any(Path(np.__file__).parents[1].glob(blas.NUMPYS)) and shutil.which("g++") is not None


@linux
@pytest.mark.skipif(not numpys(), reason="no g++, or a NumPy without an OpenBLAS of its own")
def test_where_none_is_installed_numpys_openblas_multiplies(tmp_path):
    says = "print(blas.name(), blas.threads(), blas.is_reference()); import os; print(os.listdir(os.environ['TMPDIR']))"
    product = "a = mx.ones((3, 5)) * 2; b = mx.ones((5, 7)) * 3; print(((a @ b) == 30).all().item())"
    said = run(f"{ALONE} blas.preload(); import mlx.core as mx; {says}; {product}", TMPDIR=str(tmp_path)).splitlines()
    assert said[0].startswith("libscipy_openblas64_") and said[0].endswith(" 1 False")
    assert said[1:] == ["[]", "True"]


@linux
def test_without_any_openblas_nothing_happens():
    none = f"{ALONE} blas.NUMPYS = 'nothing*'; blas.preload(); "
    assert run(none + NAME.format("0")).startswith("reference")


@linux
@pytest.mark.parametrize("fault", ["no g++", "no folder", "another library"])
def test_a_bridge_that_does_not_carry_is_left_out(fault, tmp_path):
    broken, environment = "0", {}
    if fault == "no g++":
        environment = {"PATH": str(tmp_path)}
    elif fault == "no folder":  # for temporary files can be written
        broken = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/nothing']"
    else:  # which has no products
        package = tmp_path / "numpy.libs"
        package.mkdir()
        (package / "libscipy_openblas64_x.so").write_bytes(b"no library")
        broken = f"blas.find_spec = lambda name: type('', (), {{'origin': {str(tmp_path / 'numpy/i')!r}}})"
    assert run(f"{ALONE} {broken}; blas.preload(); {NAME.format('0')}", **environment).startswith("reference")


@linux
def test_which_blas_multiplies_without_packing():
    says = "from mlx_gemma_mtp.machine import blas; blas.preload(); import mlx.core; print(blas.small_product())"
    assert run(says, MLX_GEMMA_MTP_BLAS="off") == "0"
    if openblas():
        library = ctypes.CDLL("libopenblas.so.0")
        library.openblas_get_corename.restype = ctypes.c_char_p
        wide = library.openblas_get_corename() in (b"SkylakeX", b"Cooperlake", b"SapphireRapids")
        assert run(says) == ("1000000" if wide else "0")
