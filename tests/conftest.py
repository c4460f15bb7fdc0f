"""For all tests: tables of costs go to a folder of this run, not to the user's cache; kernels stay where they are."""

import os
import tempfile

import pytest

KERNELS = 250  # about what all tests compile


@pytest.fixture(scope="session", autouse=True)
def cost_folder():
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_GEMMA_MTP_CACHE"] = folder
        os.environ.setdefault("TMPDIR", tempfile.gettempdir())  # else each run would compile its own
        yield folder


@pytest.fixture(scope="session", autouse=True)
def kernels_in_a_hurry(cost_folder):
    """Where most kernels are still to come, MLX compiles them for a CPU in a fifth of the time."""
    from mlx_gemma_mtp.engine import warmup

    if warmup.metal_available():
        yield
        return
    with warmup.preamble_compiled(KERNELS):
        yield
