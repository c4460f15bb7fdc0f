"""Which device computes: asked here, once, and nowhere else."""

from __future__ import annotations

from functools import cache

import mlx.core as mx


@cache
def metal_available() -> bool:
    """Returns whether Metal runs and is the default device."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu
