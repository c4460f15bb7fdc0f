"""The bundled pair in plain PyTorch, for the tests of what goes on from it."""

import pytest

from mlx_gemma_mtp.files import hub


@pytest.fixture(scope="session")
def pair():
    """The target, frozen, and the drafter. Tests train copies."""
    pytest.importorskip("torch")
    from training import polish

    target, drafter = polish.opened(hub.DEMO)
    return target.requires_grad_(False), drafter
