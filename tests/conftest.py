"""For all tests: tables of costs go to a folder of this run, not to the user's cache; kernels stay where they are."""

import os
import tempfile

import pytest


@pytest.fixture(scope="session", autouse=True)
def cost_folder():
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_GEMMA_MTP_CACHE"] = folder
        os.environ.setdefault("TMPDIR", tempfile.gettempdir())  # else each run would compile its own
        yield folder
