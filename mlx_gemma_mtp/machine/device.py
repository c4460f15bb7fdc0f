"""Which of Metal, CUDA and CPU computes, and what it is called: nothing else in the package asks MLX for that."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import Any

import mlx.core as mx

from . import blas


class Kind(StrEnum):
    METAL = "Metal"
    CUDA = "CUDA"
    CPU = "CPU"


@cache
def metal_available() -> bool:
    """Returns whether Metal runs and is the default device. MLX is asked once: the answer stays for the process."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def kind() -> Kind:
    """Returns what computes."""
    if metal_available():
        return Kind.METAL
    return Kind.CUDA if mx.cuda.is_available() and mx.default_device() == mx.gpu else Kind.CPU


def info() -> dict[str, Any]:
    """Returns MLX's facts on the device that computes, `device_name` among them."""
    return mx.device_info()


@cache
def name() -> str:
    """Returns the device's name as rules of expert_paths.py begin with it: the GPU's own, such as "Apple M4 Max", or
    "cpu", or "cpu, fast BLAS" where another BLAS than the reference multiplies.
    """
    if kind() is not Kind.CPU:
        return info()["device_name"]
    return "cpu" if blas.is_reference() else "cpu, fast BLAS"
