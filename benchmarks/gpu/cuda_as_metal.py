"""Lets the package take its Metal paths on an NVIDIA GPU: MLX's CUDA backend answers for Metal.

`install` replaces three of MLX's functions in this process. Whether Metal is there: yes. What makes a kernel of Metal
text: mx.fast.cuda_kernel, with msl_cuda.h before the text. What the device is: with the two facts on memory that only
Apple's devices tell. For checks alone; site/sitecustomize.py installs it in every Python process of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx

HEADER = (Path(__file__).resolve().parent / "msl_cuda.h").read_text(encoding="utf-8")
USABLE = 0.9  # of the memory, as Metal recommends


def metal_kernel(
    name: str, input_names: list[str], output_names: list[str], source: str, header: str = "", **options: Any
) -> Callable[..., list[mx.array]]:
    """Returns MLX's object for a CUDA kernel of a Metal text; the arguments are those of mx.fast.metal_kernel.

    The name gets a hash of the text, since CUDA's compiled kernels are looked up by name.
    """
    if options.pop("atomic_outputs", False):
        raise NotImplementedError(f"{name}: outputs that are atomic are not translated")
    text = HEADER + header
    return mx.fast.cuda_kernel(
        name=f"{name}_{sha256((text + source).encode()).hexdigest()[:8]}",
        input_names=input_names,
        output_names=output_names,
        source=source,
        header=text,
        **options,
    )


def install() -> bool:
    """Replaces the three functions where CUDA computes. Returns whether it does. Call it before the package asks."""
    if mx.metal.is_available() or mx.default_device() != mx.gpu:
        return mx.metal.is_available()
    asked = mx.device_info

    def device_info(*device: Any) -> dict[str, Any]:
        facts = asked(*device)
        memory = facts["total_memory"]
        return {"memory_size": memory, "max_recommended_working_set_size": int(USABLE * memory)} | facts

    mx.metal.is_available = lambda: True
    mx.fast.metal_kernel = metal_kernel
    mx.device_info = device_info
    return True
