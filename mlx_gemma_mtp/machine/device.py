"""Which of Metal, CUDA and CPU computes, and what the package leaves to it: one table. Nothing else asks MLX for that.

A decision that depends on the device is a named trait here, and whoever decides reads `traits()`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import mlx.core as mx

from . import blas


class Kind(StrEnum):
    METAL = "Metal"
    CUDA = "CUDA"
    CPU = "CPU"


@dataclass(frozen=True)
class Traits:
    """What is decided by the kind of device: a line for each decision, with what it rests on."""

    custom_kernels: bool  # MLX launches kernels of a text: mx.fast.metal_kernel or cuda_kernel
    fused_norms: bool  # mx.fast.rms_norm is one launch, not a chain of primitives
    fused_rope: bool  # so is mx.fast.rope
    fused_attention: bool  # mx.fast.scaled_dot_product_attention takes a mask of bools, and keeps no scores
    splits_by_slots: bool  # attention splits its sums by the number of slots: another number gives other bits
    float32_sums: bool  # 16-bit products add up in float32, quantised and gathered ones, too
    cheap_exponentials: bool  # e^x and tanh cost what other arithmetic does; else they are calls of the C library
    input_major: bool  # products are faster where the outer axis of a weight is the input's
    walks_first: bool  # MLX walks a whole graph before its first operation begins, so layers are dispatched one by one
    packed_batches: bool  # quantised products take a batch of matrices, as packed K/V are; else these are dequantised
    reads_packed: bool  # such products read them where they lie; else they take contiguous copies
    wide: bool  # a pass over all rows of a vocabulary is faster than over a few that stay in a processor's cache
    compiles_on_host: bool  # mx.compile needs g++, half a second a kernel
    gives_back: bool  # buffers that are not used again are given back now and then: ever new sizes pile up
    wires: bool  # weights can be wired
    memory: tuple[str, float] | None  # MLX's name for the bytes of the device, and a model's share; None: the machine's


_GPU = {
    "custom_kernels": True,
    "fused_norms": True,
    "fused_rope": True,
    "fused_attention": True,
    "splits_by_slots": True,
    "float32_sums": True,
    "cheap_exponentials": True,
    "input_major": False,
    "walks_first": False,
    "reads_packed": True,
    "wide": True,
    "compiles_on_host": False,
    "gives_back": True,
}
TABLE = {
    Kind.METAL: Traits(**_GPU, packed_batches=True, wires=True, memory=("max_recommended_working_set_size", 1.0)),
    Kind.CUDA: Traits(**_GPU, packed_batches=False, wires=False, memory=("total_memory", 0.9)),
    Kind.CPU: Traits(
        custom_kernels=False,
        fused_norms=False,
        fused_rope=False,
        fused_attention=False,
        splits_by_slots=False,
        float32_sums=False,
        cheap_exponentials=False,
        input_major=True,
        walks_first=True,
        packed_batches=True,
        reads_packed=False,
        wide=False,
        compiles_on_host=True,
        gives_back=False,
        wires=False,
        memory=None,
    ),
}
TF32 = "MLX_ENABLE_TF32"  # environment; MLX's default is 1
NEURAL = 17  # the first generation of Apple's GPUs whose products of float32 go through TF32


@cache
def kind() -> Kind:
    """Returns what computes. MLX is asked once: the answer stays for the process."""
    if mx.default_device() != mx.gpu:
        return Kind.CPU
    if mx.metal.is_available():
        return Kind.METAL
    return Kind.CUDA if mx.cuda.is_available() else Kind.CPU


@cache
def traits() -> Traits:
    """Returns what is decided by the device that computes."""
    return TABLE[kind()]


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


@cache
def rounds_by_width() -> bool:
    """Returns whether a row of a CPU's products has other bits among another number of rows, so that there is nothing
    to keep for what comes after them. On a GPU that is asked product by product.
    """
    return kind() is Kind.CPU and not blas.is_reference()


@cache
def streams_take_cores() -> bool:
    """Returns whether a second stream takes a core that lies idle: on a CPU with two at least, where a product takes
    one alone. On a GPU, and where a product takes all cores, streams share what there is.
    """
    return kind() is Kind.CPU and blas.threads() == 1 and len(os.sched_getaffinity(0)) > 1


@cache
def small_product() -> int:
    """Returns how many multiply-adds a product may have before the CPU's BLAS packs its matrices (see blas.py); 0 where
    it always does, and where a GPU multiplies.
    """
    return blas.small_product() if kind() is Kind.CPU else 0


def float32_products() -> str:
    """Returns how MLX multiplies float32 here: "float32" or "TF32", which has 10 bits of mantissa, as float16."""
    on = os.environ.get(TF32, "1") != "0"
    return "TF32" if on and _has_tf32() else "float32"


def _has_tf32() -> bool:
    if kind() is Kind.METAL:
        generation = re.match(r"applegpu_g(\d+)", str(info().get("architecture", "")))
        return generation is not None and int(generation[1]) >= NEURAL
    return kind() is Kind.CUDA
