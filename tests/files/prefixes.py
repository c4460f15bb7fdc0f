"""Prefixes for tests of the store: their layers follow from their tokens, so that whoever reads one can tell."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from mlx_gemma_mtp.files.prefix_store import HostArray, Layers
from mlx_gemma_mtp.files.safetensors import ITEM_BYTES

DTYPES = ("BF16", "F32", "U32", "F16")


def layers(tokens: Sequence[int], salt: str | None = None, width: int = 8) -> Layers:
    """Returns layers of three kinds: two arrays, three, and one of another dtype; any bits, NaNs included."""
    seed = int.from_bytes(hashlib.sha256(repr((list(tokens), salt)).encode()).digest()[:8], "big")
    random, n = np.random.default_rng(seed), len(tokens)
    shapes = [[(1, 2, n, width)] * 2, [(1, 1, n, 4), (1, 1, n, width), (1, 1, n, 1)], [(1, 1, min(n, 5), width)]]
    every, kinds = [], iter(DTYPES * 2)
    for shapes_of_layer in shapes:
        layer = []
        for shape in shapes_of_layer:
            dtype = next(kinds)
            layer.append(HostArray(dtype, shape, random.bytes(int(np.prod(shape)) * ITEM_BYTES[dtype])))
        every.append(layer)
    return every


def same(one: Layers, other: Layers) -> bool:
    """Returns whether two entries agree in every bit."""
    return [[(a.dtype, a.shape, bytes(a.data)) for a in layer] for layer in one] == [
        [(a.dtype, a.shape, bytes(a.data)) for a in layer] for layer in other
    ]
