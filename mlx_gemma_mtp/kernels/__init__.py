"""Metal kernels, one file an operation: the reference, the source, and the function that chooses.

`metal_available` is the one question about the device, asked in one place so that a test can replace it.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx


@cache
def metal_available() -> bool:
    """True where Metal runs and is the default device."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu
