"""Kernels in Metal's language, one file an operation: the reference, the source, and the function that chooses.

The text is one: Metal gets it as it is, CUDA behind metal_on_cuda.h, which says in CUDA what the text says in Metal.
`why_off` says which of our own kernels run. MLX's kernels (mx.fast) are not ours and run wherever a GPU does. To add
one: a module here with its reference, its source and `self_check`, and its name in KERNELS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import mlx.core as mx

from ...machine import device

KERNELS = ("grouping", "gate_up", "down", "head_argmax", "few_rows")  # modules of this package; each has self_check()
SWITCH = "MLX_GEMMA_MTP_METAL"  # 0: the references run instead
NO_GPU = "no GPU"
CONSTANT = 8  # numbers of an input, below which MLX on Metal hands it over in the address space `constant`


@dataclass(frozen=True)
class Kernel:
    """The text of a kernel; called with the arguments of mx.fast.metal_kernel's objects, it launches."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str = ""

    def __call__(self, **launch) -> list[mx.array]:
        kernel = self.on_metal(launch["inputs"]) if device.kind() is device.Kind.METAL else self
        return build(kernel)(**launch)

    def on_metal(self, inputs: Sequence[mx.array]) -> Kernel:
        """Returns the kernel under a name that tells which inputs MLX declares as `constant`. It knows a compiled text
        by name and template, and compiles anew whenever the text under them has changed: with pairs of one token, then
        of two, in turns.
        """
        few = [name for name, array in zip(self.inputs, inputs, strict=True) if array.size < CONSTANT]
        return replace(self, name="_".join((self.name, "few", *few))) if few else self


@cache
def build(kernel: Kernel) -> Callable[..., list[mx.array]]:
    """Returns MLX's object for a kernel. It is compiled at the first launch with a template."""
    made = {"input_names": list(kernel.inputs), "output_names": list(kernel.outputs), "source": kernel.source}
    if device.kind() is not device.Kind.CUDA:
        return mx.fast.metal_kernel(name=kernel.name, header=kernel.header, **made)
    return mx.fast.cuda_kernel(name=cuda_name(kernel), header=cuda_header() + kernel.header, **made)


@cache
def cuda_header() -> str:
    """Returns what stands before a kernel's text on CUDA."""
    return Path(__file__).with_name("metal_on_cuda.h").read_text(encoding="utf-8")


def cuda_name(kernel: Kernel) -> str:
    """Returns a kernel's name on CUDA: with a hash of all text, since MLX finds what it compiled by the name."""
    text = "\0".join((cuda_header(), kernel.header, kernel.source))
    return f"{kernel.name}_{sha256(text.encode()).hexdigest()[:12]}"


def available() -> bool:
    """Returns whether the device that computes runs kernels of ours."""
    return device.traits().custom_kernels


_failed: dict[str, str] = {}  # kernel -> what its self-check found in this process


def why_off(kernel: str) -> str | None:
    """Returns None where a kernel runs, otherwise why its reference runs instead."""
    if not available():
        return NO_GPU
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    finding = _failed.get(kernel)
    return finding and f"self-check failed: {finding}"


def failure(kernel: str) -> str | None:
    """Returns what a kernel's self-check found, None where it passed or did not run."""
    return _failed.get(kernel)


def forget_failures() -> None:
    """Lets every kernel run again until it is checked."""
    _failed.clear()


def status() -> dict[str, str]:
    """Returns for every kernel "on", or why its reference runs instead."""
    return {kernel: why_off(kernel) or "on" for kernel in KERNELS}


def summary() -> str:
    """Returns a phrase for a log line: which kernels are off, and why."""
    off = [f"{kernel} off ({reason})" for kernel in KERNELS if (reason := why_off(kernel))]
    return f"our kernels: {', '.join(off)}" if off else "our kernels on"


def self_check() -> dict[str, str]:
    """Runs every kernel that is on against its reference, small; switches off those that differ or raise.

    Returns `status` afterwards. For the doctor, and for the first load on a machine.
    """
    for kernel in KERNELS:
        if why_off(kernel) is None and (error := import_module(f"{__name__}.{kernel}").self_check()):
            switch_off(kernel, error)
    return status()


def switch_off(kernel: str, reason: str) -> None:
    """Lets the reference of a kernel run from now on: its self-check failed, now or, by a kept report, earlier."""
    _failed[kernel] = reason


def difference(ours: mx.array, reference: mx.array, tolerance: float) -> str | None:
    """Returns None where the largest error is at most tolerance times the largest value, both finite; otherwise a line
    that says how large it is.
    """
    ours, reference = ours.astype(mx.float32), reference.astype(mx.float32)
    error, size = mx.abs(ours - reference).max().item(), mx.abs(reference).max().item()
    return None if error <= tolerance * size else f"off by {error:.3g} where the largest value is {size:.3g}"


def checked(check: Callable[[], str | None]) -> Callable[[], str | None]:
    """Returns a self-check that reports an exception (the compiler refused, the launch failed) as its finding."""

    def run() -> str | None:
        try:
            return check()
        except (RuntimeError, ValueError) as error:
            return " ".join(str(error).split())[:300]

    return run
