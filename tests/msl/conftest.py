"""One body for each kernel test, two backends: emulated, and the GPU under `-m metal`, be it Metal or CUDA."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest
from emulator import Emulator, missing

from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import few_rows


@pytest.fixture
def emulator(monkeypatch) -> Iterator[Emulator]:
    """Kernels run in the emulator; its order, flags and counting are the test's to set.

    Of few_rows' self-check a part, since each width is another compilation.
    """
    if reason := missing():
        pytest.skip(reason)
    emulator = Emulator()
    monkeypatch.setattr(kernels, "build", emulator.build)
    monkeypatch.setattr(few_rows, "CHECKED", few_rows.CHECKED[:3])
    monkeypatch.setattr(few_rows, "WIDTHS", few_rows.WIDTHS[-1:])
    mx.disable_compile()  # it computes with values, which a trace has not
    yield emulator
    mx.enable_compile()


@pytest.fixture(params=["emulated", pytest.param("metal", marks=pytest.mark.metal)])
def kernel_backend(request) -> str:
    """Where the kernels of a test run. Results must agree within rounding on both, so bodies ask nothing more."""
    if request.param == "emulated":
        request.getfixturevalue("emulator")
    elif not kernels.available():
        pytest.skip("no GPU here")
    return request.param
