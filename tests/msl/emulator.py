"""Runs the Metal text of `mlx_gemma_mtp.ops.kernels` on a CPU: what it computes, what it reads, what it does wrong.

Needs x86-64 and g++ or clang++. Compiled objects are kept by hash in a temporary folder. Small shapes; evaluates at
once, so not inside mx.compile. What it cannot show: speed, registers, and whether Apple's compiler takes the text.

Results do not depend on the compiler, nor on the machine: floats are computed as written, no product is fused into a
sum, except where `fused` says which are. So any choice of the two below must pass all tests here:

    MSL_CXX=clang++ MSL_MARCH=x86-64-v2 python -m pytest tests/msl
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from guarded import Guarded
from signature import Signature, checked, emulated, signature

from mlx_gemma_mtp.ops.kernels import Kernel

HERE = Path(__file__).resolve().parent
CACHE = Path(tempfile.gettempdir()) / f"msl_emulator_{os.getuid()}"
COMPILER = os.environ.get("MSL_CXX") or ("g++" if shutil.which("g++") else "clang++")
MARCH = f"-march={os.environ.get('MSL_MARCH', 'native')}"
FAST = ("-Og", MARCH, "-ffp-contract=off")
AT_WILL = ("-O2", MARCH, "-ffp-contract=fast")  # the compiler fuses what it likes, across statements, too
SANITIZED = (*FAST, "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
HEADERS = ("msl_emu.h", "msl_fused.h", "msl_driver.h")
CLANG = shutil.which("clang++")
ORDERS = (0, 1, 2)  # forward, reverse, shuffled


class KernelFault(RuntimeError):
    """What a GPU would do silently: an overrun, a barrier that some threads miss, text that does not compile."""


@dataclass(frozen=True)
class Reads:
    """What a launch read of one input: bytes in all, distinct bytes, distinct units of 16 bytes."""

    total: int
    distinct: int
    units: int


class _Tally(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint64), ("seen", ctypes.c_void_p), ("base", ctypes.c_void_p))


def missing() -> str | None:
    """Why the emulator cannot run here, or None."""
    if platform.machine() != "x86_64":
        return f"the emulator switches fibers on x86-64 only, not on {platform.machine()}"
    return None if shutil.which(COMPILER) else f"the emulator needs g++ or clang++; there is no {COMPILER}"


@dataclass
class Emulator:
    """Stands in for MLX's kernel objects. order: of threads and threadgroups; counting: fills `reads`; fused: products
    are fused into sums within an expression (msl_fused.h), in kernels of float32.

    reads: by kernel, then by input, of the latest launch.
    """

    order: int = 0
    counting: bool = False
    fused: bool = False
    flags: tuple[str, ...] = FAST
    reads: dict[str, dict[str, Reads]] = field(default_factory=dict)

    def build(self, kernel: Kernel) -> Callable[..., list[mx.array]]:
        """What `kernels.build` returns: a callable with the arguments of mx.fast.metal_kernel's objects."""

        def launch(*, inputs, output_shapes, output_dtypes, grid, threadgroup, template=()) -> list[mx.array]:
            if len(output_shapes) != len(kernel.outputs) or np.prod(threadgroup) > 1024:
                raise ValueError(f"{kernel.name}: wrong number of outputs, or over 1024 threads in a threadgroup")
            inputs = [mx.contiguous(x if isinstance(x, mx.array) else mx.array(x)) for x in inputs]
            mx.eval(inputs)
            sign = signature(kernel, inputs, output_dtypes, list(template))
            text = emulated(kernel, sign, self.counting, self.fused)
            outputs = list(zip(output_shapes, output_dtypes, strict=True))
            return self._run(kernel, text, sign, inputs, outputs, grid, threadgroup)

        return launch

    def _run(self, kernel, text, sign: Signature, inputs, outputs, grid, threadgroup) -> list[mx.array]:
        library = _library(text, self.flags)
        held = dict(zip(kernel.inputs, inputs, strict=True))
        made = dict(zip(kernel.outputs, outputs, strict=True))
        buffers = [_buffer(name, part, held, made) for name, part in sign.buffers]
        try:
            tallies, seen = self._tallies(buffers)
            message = ctypes.create_string_buffer(512)
            u3 = lambda sizes: (ctypes.c_uint * 3)(*sizes)  # noqa: E731
            pointers = (ctypes.c_void_p * len(buffers))(*(buffer.ptr for buffer in buffers))
            code = library.emu_run(pointers, tallies, u3(threadgroup), u3(grid), self.order, message)
            if code:
                raise KernelFault(f"{kernel.name}: {_located(message.value.decode(), buffers)}")
            for buffer in buffers:
                if buffer.overwritten():
                    raise KernelFault(f"{kernel.name}: wrote past the end of {buffer.name!r}")
            if self.counting:
                self.reads[kernel.name] = {
                    name: _reads(tally.bytes, bits)
                    for (name, part), tally, bits in zip(sign.buffers, tallies, seen, strict=True)
                    if not part and name in held
                }
            results = [buffer for buffer, (name, _) in zip(buffers, sign.buffers, strict=True) if name in made]
            return [_array(buffer, *made[buffer.name]) for buffer in results]
        finally:
            for buffer in buffers:
                buffer.free()

    def _tallies(self, buffers: list[Guarded]) -> tuple[ctypes.Array, list[np.ndarray]]:
        """One for each buffer, with a bit for each of its bytes; rounded up to 16 bytes."""
        seen = [np.zeros(2 * -(-buffer.size // 16) if self.counting else 0, np.uint8) for buffer in buffers]
        rows = [(0, bits.ctypes.data, buffer.ptr) for bits, buffer in zip(seen, buffers, strict=True)]
        return (_Tally * len(buffers))(*rows), seen


def typecheck(kernel: Kernel, inputs: list[mx.array], dtypes: list[mx.Dtype], template: list) -> str:
    """Clang's complaints about a kernel compiled with real address spaces, "" if it has none."""
    text = checked(kernel, signature(kernel, inputs, dtypes, template))
    flags = ["-std=c++17", "-fsyntax-only", "--target=aarch64", "-ffreestanding", "-w", "-Werror=vla", "-I", str(HERE)]
    done = subprocess.run([CLANG, *flags, "-x", "c++", "-"], input=text, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def _reads(total: int, bits: np.ndarray) -> Reads:
    return Reads(total, int(np.unpackbits(bits).sum()), int(np.count_nonzero(bits.view(np.uint16))))


def _buffer(name: str, part: str, held: dict, made: dict) -> Guarded:
    """A guarded copy of an input (or of its shape, strides, rank), or an output full of NaN."""
    if name in made:
        shape, dtype = made[name]
        return Guarded(name, int(np.prod(shape)) * dtype.size, fill=0xFF)
    array = held[name]
    raw = {
        "": lambda: _raw(array),
        "shape": lambda: np.array(array.shape, np.int32),
        "strides": lambda: np.array([int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)], np.int64),
        "ndim": lambda: np.array([array.ndim], np.int32),
    }[part]()
    buffer = Guarded(name, raw.nbytes)
    ctypes.memmove(buffer.ptr, raw.ctypes.data, raw.nbytes)
    return buffer


def _raw(array: mx.array) -> np.ndarray:
    view = {mx.bfloat16: mx.uint16, mx.bool_: mx.uint8}.get(array.dtype)
    return np.ascontiguousarray(np.array(array if view is None else array.view(view)))


def _array(buffer: Guarded, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    view = {mx.bfloat16: np.uint16, mx.bool_: np.uint8}.get(dtype) or np.dtype(str(dtype).split(".")[-1])
    array = mx.array(np.frombuffer(buffer.bytes(), view).reshape(shape).copy())
    return array if array.dtype == dtype else array.view(dtype)


def _located(message: str, buffers: list[Guarded]) -> str:
    """Adds which buffer a faulting address belongs to."""
    found = re.search(r"address (0x[0-9a-f]+)", message)
    address = int(found.group(1), 16) if found else 0
    for buffer in buffers:
        if buffer.holds(address):
            return f"{message}: buffer {buffer.name!r} ({buffer.size} bytes) at byte offset {address - buffer.ptr}"
    return message


@cache
def _library(text: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    path = _compiled(text, flags)
    return ctypes.CDLL(str(path))


def _compiled(text: str, flags: tuple[str, ...]) -> Path:
    """The shared object of a file, from the cache or compiled now against a precompiled header."""
    folder = CACHE / _digest(*flags, COMPILER, *((HERE / name).read_text() for name in HEADERS))
    path = folder / f"{_digest(text)}.so"
    if not path.exists():
        _headers(folder, flags)
        source = path.with_suffix(f".{os.getpid()}.cpp")
        source.write_text(text)
        done = _compile(source, path, ["-shared", "-include", str(folder / "msl_emu.h"), "-I", str(folder), *flags])
        source.unlink()
        if done.returncode:
            raise KernelFault("does not compile:\n" + done.stderr[:4000])
    return path


def _headers(folder: Path, flags: tuple[str, ...]) -> None:
    """The headers beside the objects, msl_emu.h precompiled too: it is half of a kernel's compile time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in HEADERS:
        if not (folder / name).exists():
            temporary = folder / f"{name}.{os.getpid()}"
            shutil.copy(HERE / name, temporary)
            os.replace(temporary, folder / name)
    if not (folder / "msl_emu.h.gch").exists():
        _compile(folder / "msl_emu.h", folder / "msl_emu.h.gch", ["-x", "c++-header", *flags])


def _compile(source: Path, path: Path, flags: list[str]) -> subprocess.CompletedProcess:
    """Compiles beside, then renames: several processes may want the same object."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    fixed = [COMPILER, "-std=gnu++14", "-fPIC", "-fvisibility=hidden", "-w"]
    done = subprocess.run([*fixed, *flags, str(source), "-o", str(temporary)], capture_output=True, text=True)
    if not done.returncode:
        os.replace(temporary, path)
    return done


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]
