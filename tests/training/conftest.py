"""The bundled pair in plain PyTorch, for the tests of what goes on from it."""

import pytest

from mlx_gemma_mtp.files import hub


@pytest.fixture(scope="session")
def pair():
    """The target, frozen, and the drafter. Tests train copies."""
    pytest.importorskip("torch")
    from training import bundled, dense

    target, drafter = dense.Target(dense.Sizes()), dense.Drafter(dense.Sizes())
    bundled.fill(target, hub.DEMO / "target")
    bundled.fill(drafter, hub.DEMO / "drafter")
    return target.requires_grad_(False), drafter
